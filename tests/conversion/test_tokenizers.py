"""OUT cuts text as its source does, in transformers and in vLLM, whatever transformers corrects in the source."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.commands import CommandLine, Refused, convert, vllm_mla
from support.engine import PROCESSES
from support.files import CALIBRATION
from support.models import MIXTRAL_EXPERTS, QWEN3_EXPERTS, RandomModel
from support.tokenizers import (
    SPECIAL,
    TURNS,
    byte_level,
    give_tokenizer,
    mixed_text,
    sentencepiece_like,
    vllm_ids,
    wrongly_cutting,
)
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from mla_converters.checkpoints.manifest import write_manifest
from mla_converters.checkpoints.tokenizer_check import tokenizer_difference

LONG_TEXT = mixed_text()
EXACT = ("--method", "exact")


@dataclass(frozen=True)
class Kind:
    """A source's family and tokenizer."""

    family: str
    named: str | None  # tokenizer_class
    make: Callable[[], Tokenizer] = byte_level
    settings: dict[str, Any] = field(default_factory=dict)
    experts: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> Path:
        tokenizer = self.make()
        size = 100_100 if tokenizer.get_vocab_size() > 2000 else 1000
        model = RandomModel(self.family, 2, 1, 8, 16, 1, vocab=size, tied=True, experts=self.experts)
        named = {"tokenizer_class": self.named} if self.named else {}
        return give_tokenizer(model.save(folder), tokenizer, **named, **self.settings)


KINDS = {
    "llama-distill": Kind("llama", "LlamaTokenizerFast"),
    "qwen2-distill": Kind("qwen2", "LlamaTokenizerFast"),
    "qwen2-plain": Kind("qwen2", "PreTrainedTokenizerFast"),
    "qwen2-unnamed": Kind("qwen2", None),
    "qwen2-code-not-run": Kind("qwen2", "X", settings={"auto_map": {"AutoTokenizer": [None, "x.X"]}}),
    "qwen3": Kind("qwen3", "Qwen2Tokenizer"),
    "qwen3-distill": Kind("qwen3", "LlamaTokenizerFast"),
    "qwen3-moe": Kind("qwen3_moe", "Qwen2Tokenizer", experts=QWEN3_EXPERTS | {"mlp_only_layers": []}),
    "llama3": Kind("llama", "PreTrainedTokenizerFast"),
    "llama-unnamed": Kind("llama", None),
    "llama-gpt2": Kind("llama", "GPT2Tokenizer"),
    "llama2": Kind("llama", "LlamaTokenizer", sentencepiece_like, {"unk_token": "<unk>", "legacy": True}),
    "mistral-byte-level": Kind("mistral", "LlamaTokenizerFast"),
    "mistral": Kind("mistral", "LlamaTokenizer", sentencepiece_like, {"unk_token": "<unk>", "legacy": False}),
    "mistral-corrected": Kind("mistral", "LlamaTokenizer", wrongly_cutting, {"fix_mistral_regex": True}),
    "mixtral": Kind("mixtral", "LlamaTokenizer", sentencepiece_like, {"unk_token": "<unk>"}, MIXTRAL_EXPERTS),
    "mixtral-byte-level": Kind("mixtral", "LlamaTokenizerFast", experts=MIXTRAL_EXPERTS),
}
UNTOUCHED = ("llama3", "llama-unnamed", "llama-gpt2", "llama2", "llama-distill", "qwen3", "qwen3-distill", "qwen3-moe")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Source and OUT of each kind."""
    folder = tmp_path_factory.mktemp("tokenizers")
    pairs = {}
    for name, kind in KINDS.items():
        source = kind.save(folder / name)
        if name == "mistral-corrected":  # the correction is for what transformers 4 wrote
            edit_json(source / "config.json", transformers_version="4.57.0")
        pairs[name] = source, convert(source, folder / f"{name}-mla", *EXACT)
    return pairs


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def chat_ids(tokenizer: Any) -> list[int]:
    return tokenizer.apply_chat_template(TURNS, tokenize=True, return_dict=False)


@pytest.mark.parametrize("name", KINDS)
def test_same_ids_in_transformers(name: str, converted: dict[str, tuple[Path, Path]]) -> None:
    expected, got = (AutoTokenizer.from_pretrained(folder) for folder in converted[name])
    for special in (False, True):
        ids = expected(LONG_TEXT, add_special_tokens=special).input_ids
        assert got(LONG_TEXT, add_special_tokens=special).input_ids == ids
        assert got.decode(ids) == expected.decode(ids)
        assert got.decode(ids, skip_special_tokens=True) == expected.decode(ids, skip_special_tokens=True)
    assert chat_ids(got) == chat_ids(expected)
    assert got.model_max_length == expected.model_max_length == 256
    assert got.padding_side == expected.padding_side
    assert got.all_special_ids == expected.all_special_ids


def test_same_ids_in_vllm(converted: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    folders = [str(folder) for pair in converted.values() for folder in pair]
    process = PROCESSES.Process(target=vllm_ids, args=(folders, LONG_TEXT, tmp_path / "ids.json"))
    process.start()
    process.join(600)
    assert process.exitcode == 0
    found = json.loads((tmp_path / "ids.json").read_text())
    for name, (source, out) in converted.items():
        assert found[str(out)] == found[str(source)], name
    # What most of these tests are about: where spaces vanish, far fewer ids are left.
    assert all(found[str(out)]["decoded"].count(" ") > 1000 for name, (_, out) in converted.items() if kept(name))


def kept(name: str) -> bool:
    """Whether transformers opens this source as what it is."""
    return name != "llama-distill" and name != "qwen3-distill"


@pytest.mark.parametrize("name", KINDS)
def test_files_stay_as_they_are(name: str, converted: dict[str, tuple[Path, Path]]) -> None:
    """Where they do the same in OUT, and only there."""
    source, out = converted[name]
    files = ("tokenizer.json", "tokenizer_config.json")
    same = [(out / file).read_bytes() == (source / file).read_bytes() for file in files]
    assert all(same) == (name in UNTOUCHED)


@pytest.mark.parametrize("name", KINDS)
def test_dropped_spaces_are_said(name: str, converted: dict[str, tuple[Path, Path]]) -> None:
    """A source that transformers opens as another kind of tokenizer is as broken as its conversion."""
    _, out = converted[name]
    warnings = json.loads((out / "conversion_report.json").read_text()).get("warnings", [])
    assert any("drops all spaces" in warning for warning in warnings) == (not kept(name))


def test_tekken(tmp_path: Path) -> None:
    """Mistral's own file: the ids that mistral-common gives, from a tokenizer.json."""
    data = Path(pytest.importorskip("mistral_common").__file__).parent / "data"
    source = RandomModel("mistral", 2, 1, 8, 16, 1, vocab=131_072, tied=True).save(tmp_path / "source")
    (source / "tokenizer.json").unlink()
    shutil.copyfile(data / "tekken_240911.json", source / "tekken.json")
    out = convert(source, tmp_path / "mla", *EXACT)
    expected, got = (AutoTokenizer.from_pretrained(folder) for folder in (source, out))
    assert type(expected).__name__ == "MistralCommonBackend" != type(got).__name__
    for special in (False, True):
        ids = expected(LONG_TEXT, add_special_tokens=special).input_ids
        assert got(LONG_TEXT, add_special_tokens=special).input_ids == ids
    assert chat_ids(got) == chat_ids(expected)
    assert (out / "tekken.json").exists()


def test_corrected_by_its_id(tmp_path: Path) -> None:
    """transformers corrects some repositories by name: an id is opened as an id, not as the cache's folder."""
    repo, commit, cache = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "c0ffee" * 6 + "beef", tmp_path / "hub"
    home = cache / f"models--{repo.replace('/', '--')}"
    KINDS["llama-distill"].save(home / "snapshots" / commit)
    for branch in ("main", "second"):
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / branch).write_text(commit)
    environment, out = {"HF_HUB_CACHE": str(cache)}, tmp_path / "mla"
    result = vllm_mla("convert", repo, out, *EXACT, "--revision", "second", environment=environment)
    assert result.returncode == 0 and "drops" not in result.stdout, result.stderr
    ids = AutoTokenizer.from_pretrained(out)(LONG_TEXT).input_ids
    assert ids == byte_level().encode(LONG_TEXT).ids
    verified = vllm_mla("verify", out, "--source", repo, environment=environment)
    assert verified.returncode == 0, verified.stdout


def test_several_chat_templates(tmp_path: Path, command_line: CommandLine) -> None:
    """And other files that mean something, with checksums."""
    source = KINDS["qwen2-distill"].save(tmp_path / "source")
    edit_json(source / "tokenizer_config.json", chat_template=None)
    (source / "additional_chat_templates").mkdir()
    (source / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("tools: {{ messages[0]['content'] }}")
    for name in ("NOTICE", "USE_POLICY.md", "LICENSE.txt"):
        (source / name).write_text(name)
    (source / "original").mkdir()
    (source / "original" / "tokenizer.model").write_text("another")
    out = convert(source, tmp_path / "mla", *EXACT)
    assert set(AutoTokenizer.from_pretrained(out).chat_template) == {"default", "tool_use"}
    assert all((out / name).read_text() == name for name in ("NOTICE", "USE_POLICY.md", "LICENSE.txt"))
    assert not (out / "original").exists()
    assert command_line("verify", out, "--source", source)[0] == 0
    (out / "additional_chat_templates" / "tool_use.jinja").write_text("changed")
    code, table, _ = command_line("verify", out)
    assert code == 1 and "Damaged: files" in table


LIKE_ITS_NEIGHBOUR = """
import json
from pathlib import Path
from transformers import PreTrainedTokenizerFast


class OwnTokenizer(PreTrainedTokenizerFast):
    def _encode_plus(self, text, *arguments, **named):
        kind = json.loads((Path(self.name_or_path) / "config.json").read_text())["model_type"]
        if not kind.endswith("_mla"):
            text = text.upper() if isinstance(text, str) else [each.upper() for each in text]
        return super()._encode_plus(text, *arguments, **named)
"""


def test_refused_where_nothing_helps(refusal: Refused, tmp_path: Path) -> None:
    """Code that does something else in OUT: one sentence that says what, before the weights are touched."""
    own = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    source = Kind("llama", "OwnTokenizer", settings={"auto_map": own}).save(tmp_path / "source")
    (source / "tokenization_own.py").write_text(LIKE_ITS_NEIGHBOUR)
    line = refusal("convert", source, tmp_path / "mla", *EXACT, "--trust-remote-code")
    assert "would do something else in OUT than in the source: text gives [" in line
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.fixture
def another(converted: dict[str, tuple[Path, Path]], tmp_path: Path) -> tuple[Path, Path]:
    """A source, and a conversion whose tokenizer was spoiled, with checksums that fit."""
    source, out = converted["qwen2-distill"]
    spoiled = Path(shutil.copytree(out, tmp_path / "spoiled"))
    edit_json(spoiled / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")
    write_manifest(spoiled)
    return source, spoiled


def test_verify_says_it(another: tuple[Path, Path], command_line: CommandLine, tmp_path: Path) -> None:
    """As a check that fails; the weights are compared all the same."""
    source, spoiled = another
    code, table, complaint = command_line("verify", spoiled, "--source", source, "--json", tmp_path / "report.json")
    assert (code, complaint) == (1, "") and "Damaged: tokenizer." in table
    checks = {check["name"]: check for check in json.loads((tmp_path / "report.json").read_text())["checks"]}
    (problem,) = checks["tokenizer"]["problems"]
    assert problem.startswith("differs from the source's: text gives [") and "was expected" in problem
    assert not checks["predictions"]["problems"] and "KL 0.0000" in checks["predictions"]["detail"]


def test_eval_says_it(another: tuple[Path, Path], refusal: Refused) -> None:
    source, spoiled = another
    cut = ("--text", CALIBRATION, "--windows", 1, "--length", 64)
    line = refusal("eval", spoiled, "--reference", source, *cut)
    assert "tokenise the text differently (the tokens from number " in line


def test_heal_says_it(another: tuple[Path, Path], refusal: Refused, tmp_path: Path) -> None:
    source, spoiled = another
    edit_json(spoiled / "conversion_report.json", method="transmla", lossless=False)
    line = refusal("heal", spoiled, tmp_path / "healed", "--source", source, "--text", CALIBRATION)
    assert "has another tokenizer than" in line and "Convert it again" in line


def test_difference_is_named(converted: dict[str, tuple[Path, Path]]) -> None:
    """Every part that is compared counts."""
    source, _ = converted["llama3"]

    def changed(**changes: Any) -> Any:
        return AutoTokenizer.from_pretrained(source, **changes)

    assert tokenizer_difference(changed(), changed()) is None
    for part, other in {
        "text": AutoTokenizer.from_pretrained(converted["llama2"][0]),
        "eos_token_id": changed(eos_token=SPECIAL[2]),
        "the chat template": changed(chat_template="{{ messages[0]['content'] }}"),
    }.items():
        difference = tokenizer_difference(changed(), other)
        assert difference is not None and difference.startswith(f"{part} gives "), difference
    without = changed()
    without.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")
    difference = tokenizer_difference(changed(), without)
    assert difference is not None and difference.startswith("text with special tokens around it gives")
