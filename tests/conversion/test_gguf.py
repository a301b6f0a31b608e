"""GGUF files: each converts to what its folder converts to, or is refused by name."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import (
    CALIBRATION,
    LLAMA3,
    MIXTRAL_EXPERTS,
    QWEN3_EXPERTS,
    YARN,
    RandomModel,
    Refused,
    contents,
    convert,
    heal,
    load,
)
from safetensors.torch import load_file
from support.gguf_files import CONTROL, OWN, TEMPLATE, GgufFile
from transformers import AutoTokenizer, GenerationConfig

from mla_converters.checkpoints.gguf import values
from mla_converters.checkpoints.gguf.header import read_header
from mla_converters.checkpoints.manifest import MANIFEST
from mla_converters.checkpoints.source import open_source
from mla_converters.errors import ConversionError
from mla_converters.evaluation.run import EvalOptions, evaluate
from mla_converters.planning.plan import plan
from mla_converters.verify import verify

EXACT = ("--method", "exact")
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
MOE = QWEN3_EXPERTS | {"mlp_only_layers": [], "norm_topk_prob": True}


@dataclass
class Case:
    """A model, and how its file is written."""

    model: RandomModel
    file: GgufFile = field(default_factory=GgufFile)

    def write(self, folder: Path) -> tuple[Path, list[Path]]:
        source = self.model.save(folder / "source")
        return source, self.file.write(source, folder / "model.gguf")


RIGHT = {
    "llama": Case(RandomModel()),
    "llama-tied": Case(RandomModel(tied=True)),
    "llama-biases": Case(RandomModel(bias=True)),
    "llama-nine-heads": Case(RandomModel(heads=9, kv_heads=3, hidden=144)),
    "llama-no-lengths": Case(
        RandomModel(), GgufFile(keys={"llama.attention.key_length": None, "llama.attention.value_length": None})
    ),
    "split": Case(RandomModel(), GgufFile(tensors_per_part=8)),
    "linear": Case(RandomModel(rope=LINEAR)),
    "linear-old": Case(
        RandomModel(rope=LINEAR),
        GgufFile(
            keys={"llama.rope.scaling.type": None, "llama.rope.scaling.factor": None, "llama.rope.scale_linear": 4.0}
        ),
    ),
    "llama31": Case(RandomModel(rope=LLAMA3)),
    "llama31-8192": Case(RandomModel(rope=LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192})),
    "yarn": Case(RandomModel(rope=YARN)),
    "yarn-betas": Case(
        RandomModel(rope=YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3}),
        GgufFile(
            keys={
                "llama.rope.scaling.yarn_beta_fast": 16.0,
                "llama.rope.scaling.yarn_beta_slow": 2.0,
                "llama.rope.scaling.yarn_attn_factor": 1.3,
            }
        ),
    ),
    "mistral": Case(RandomModel("mistral", window=256)),
    "mixtral": Case(RandomModel("mixtral", experts=MIXTRAL_EXPERTS)),
    "mixtral-one-by-one": Case(RandomModel("mixtral", experts=MIXTRAL_EXPERTS), GgufFile(stacked=False)),
    "qwen2": Case(RandomModel("qwen2")),
    "qwen2-yarn": Case(RandomModel("qwen2", rope=YARN)),
    "qwen3": Case(RandomModel("qwen3", head_dim=32, tied=True)),
    "qwen3moe": Case(RandomModel("qwen3_moe", head_dim=32, experts=MOE)),
}


def logits(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    ids = torch.randint(0, 199, (2, 150), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        # transformers' faster loop over experts has no float64.
        return load(folder, dtype, experts_implementation="eager")(ids).logits


@pytest.mark.parametrize("case", RIGHT)
def test_right(case: str, tmp_path: Path) -> None:
    """The converted file computes what the folder computes of which the file was made."""
    source, files = RIGHT[case].write(tmp_path)
    out = convert(files[-1], tmp_path / "out", *EXACT)
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-4)):
        expected, got = logits(source, dtype), logits(out, dtype)
        assert (got - expected).norm() < tolerance * expected.norm()
    assert "unknown_keys" not in json.loads((out / "config.json").read_text())["mla_conversion"]


@pytest.mark.parametrize("case", RIGHT)
def test_same_tensors(case: str, tmp_path: Path) -> None:
    """Bit for bit, under the folder's names; as a folder of its own too."""
    source, files = RIGHT[case].write(tmp_path)
    expected = load_file(source / "model.safetensors")
    with open_source(str(files[0])) as opened:
        assert opened.names() == sorted(expected)
        assert all(torch.equal(opened.tensor(name), expected[name]) for name in expected)
        unpacked = load_file(opened.model_folder / "model.safetensors")
    assert unpacked.keys() == expected.keys()
    assert all(torch.equal(unpacked[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_stored_kinds(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers as ``gguf`` dequantises whole tensors; 16-bit floats stay what they are."""
    monkeypatch.setattr(values, "BLOCK", 5 * 64)  # five rows of the embedding
    _, (path,) = Case(RandomModel("qwen2"), GgufFile(kind=kind)).write(tmp_path)
    plain = {"F16": torch.float16, "BF16": torch.bfloat16}
    names = {"model.embed_tokens": "token_embd", "model.layers.1.mlp.up_proj": "blk.1.ffn_up"}
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    with open_source(str(path)) as source:
        for name, own in ((f"{name}.weight", f"{own}.weight") for name, own in names.items()):
            assert stored[own].tensor_type.name == kind
            expected = gguf.dequantize(stored[own].data, stored[own].tensor_type)
            assert source.tensor(name).dtype == plain.get(kind, torch.float32)
            np.testing.assert_array_equal(source.tensor(name).float().numpy(), expected)
        assert source.tensor("model.norm.weight").dtype == torch.float32
    out = convert(path, tmp_path / "out", *EXACT)
    assert json.loads((out / "config.json").read_text())["dtype"] == str(plain.get(kind, torch.float32))[6:]


def test_header(tmp_path: Path) -> None:
    """The same header that the ``gguf`` package reads."""
    _, (path,) = RIGHT["llama31"].write(tmp_path)
    reader, header = gguf.GGUFReader(path), read_header(path)
    keys = {name: item.contents() for name, item in reader.fields.items() if not name.startswith("GGUF.")}
    assert header.keys == keys
    tensors = {tensor.name: (tensor.data_offset, tensor.tensor_type, tensor.n_bytes) for tensor in reader.tensors}
    assert {name: (x.offset, x.kind, x.size) for name, x in header.tensors.items()} == tensors


def written(source: Path, out: Path) -> dict[str, bytes]:
    """What a conversion writes, without the source's name and the checksums that depend on it."""
    files = contents(convert(source, out, *EXACT))
    del files[MANIFEST]
    return {name: content.replace(source.stem.encode(), b"SOURCE") for name, content in files.items()}


def test_parts_give_the_same_bytes(tmp_path: Path) -> None:
    """Whole or in parts, and whichever part is named: nothing differs but the name of the source."""
    source = RandomModel("qwen2").save(tmp_path / "source")
    (whole,) = GgufFile().write(source, tmp_path / "undivided.gguf")
    parts = GgufFile(tensors_per_part=9).write(source, tmp_path / "part.gguf")
    assert len(parts) > 2
    expected = written(whole, tmp_path / "out")
    for part in (parts[0], parts[-1]):
        assert written(part, tmp_path / part.stem) == expected


REFUSED: dict[str, tuple[GgufFile, str]] = {
    "architecture": (
        GgufFile(keys={"general.architecture": "gemma3"}),
        "architecture 'gemma3', which is not",
    ),
    "adapter": (GgufFile(keys={"general.type": "adapter"}), "general.type 'adapter'"),
    "missing": (GgufFile(tensors={"blk.1.ffn_down.weight": None}), "blk.1.ffn_down.weight is missing"),
    "no-embedding": (GgufFile(tensors={"token_embd.weight": None}), "lacks token_embd.weight"),
    "surplus": (
        GgufFile(tensors={"blk.0.attn_sinks.weight": np.ones(4, np.float32)}),
        "attn_sinks.weight is no part",
    ),
    "foreign-name": (
        GgufFile(tensors={"lm_head.weight": np.ones((199, 64), np.float32)}),
        ": lm_head.weight is no part",
    ),
    "foreign-names": (
        GgufFile(tensors={"output_norm.weight": None, "model.norm.weight": np.ones(64, np.float32)}),
        ": output_norm.weight is missing; model.norm.weight is no part",
    ),
    "bias": (GgufFile(tensors={"blk.0.attn_k.bias": np.ones(32, np.float32)}), "blk.0.attn_k.bias is no part"),
    "shape": (
        GgufFile(tensors={"blk.0.attn_q.weight": np.ones((64, 32), np.float32)}),
        "blk.0.attn_q.weight has",
    ),
    "integers": (GgufFile(tensors={"output_norm.weight": np.ones(64, np.int8)}), "output_norm.weight has dtype I8"),
    "nan": (GgufFile(tensors={"output_norm.weight": np.full(64, np.nan, np.float32)}), "output_norm.weight of"),
    "no-key": (GgufFile(keys={"llama.block_count": None}), "lacks llama.block_count"),
    "text-key": (GgufFile(keys={"llama.block_count": "two"}), "has llama.block_count 'two'"),
    "layers-differ": (
        GgufFile(keys={"llama.attention.head_count_kv": [2, 1]}),
        "attention.head_count_kv [2, 1], where",
    ),
    "scale": (GgufFile(keys={"llama.logit_scale": 0.5}), "has llama.logit_scale 0.5"),
    "gating": (GgufFile(keys={"llama.expert_gating_func": 2}), "has llama.expert_gating_func 2"),
    "partial": (GgufFile(keys={"llama.rope.dimension_count": 8}), "rotates 8 of the 16"),
    "longrope": (GgufFile(keys={"llama.rope.scaling.type": "longrope"}), "rope.scaling.type 'longrope'"),
    "factor": (GgufFile(keys={"llama.rope.scaling.attn_factor": 1.5}), "rope.scaling.attn_factor 1.5"),
    "yarn-extrapolation": (
        GgufFile(
            keys={
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.yarn_ext_factor": 0.5,
            }
        ),
        "yarn_ext_factor 0.5",
    ),
    "yarn-no-factor": (GgufFile(keys={"llama.rope.scaling.type": "yarn"}), "lacks llama.rope.scaling.factor"),
    "frequencies": (
        GgufFile(tensors={"rope_freqs.weight": np.arange(1, 9, dtype=np.float32)}),
        "rope_freqs.weight that no setting",
    ),
    "fewer-frequencies": (
        GgufFile(tensors={"rope_freqs.weight": np.full(4, 2, np.float32)}),
        "rope_freqs.weight that are not 8 positive numbers",
    ),
    "twice": (
        GgufFile(
            keys={"llama.rope.scaling.factor": 2.0}, tensors={"rope_freqs.weight": np.arange(1, 9, dtype=np.float32)}
        ),
        "by rope_freqs.weight and by rope.scaling too",
    ),
    "tokenizer": (GgufFile(keys={"tokenizer.ggml.model": "bert"}), "tokenizer.ggml.model 'bert'"),
    "pre": (GgufFile(keys={"tokenizer.ggml.pre": "default"}), "tokenizer.ggml.pre 'default'"),
    "no-pre": (GgufFile(keys={"tokenizer.ggml.pre": None}), "tokenizer.ggml.pre 'missing'"),
    "no-merges": (GgufFile(keys={"tokenizer.ggml.merges": None}), "tokenizer.ggml.merges"),
    "same-tokens": (GgufFile(keys={"tokenizer.ggml.tokens": ["a"] * 199}), "the token 'a' 199 times"),
    "types": (GgufFile(keys={"tokenizer.ggml.token_type": [1] * 10}), "10 values in tokenizer.ggml.token_type"),
    "more-tokens": (
        GgufFile(tensors={"token_embd.weight": np.ones((150, 64), np.float32)}),
        "199 tokens in its tokenizer, and token_embd.weight has 150 rows",
    ),
    "special": (GgufFile(keys={"tokenizer.ggml.eos_token_id": 500}), "tokenizer.ggml.eos_token_id 500"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path, refusal: Refused) -> None:
    """In one sentence that names the tensor or key; nothing is left behind."""
    file, reason = REFUSED[case]
    _, (path,) = Case(RandomModel(), file).write(tmp_path)
    assert reason in refusal("convert", path, tmp_path / "out", *EXACT)
    assert not list(tmp_path.glob("out*"))


def test_refused_experts(tmp_path: Path, refusal: Refused) -> None:
    """A mixture whose experts are missing, or too few, names the file's own tensor once."""
    model = RandomModel("mixtral", experts=MIXTRAL_EXPERTS)
    few, one = np.ones((2, 48, 64), np.float32), np.ones((48, 64), np.float32)
    for tensors, reason in (
        ({"blk.1.ffn_up_exps.weight": None}, ": blk.1.ffn_up_exps.weight is missing."),
        ({"blk.0.ffn_gate_exps.weight": few}, ": blk.0.ffn_gate_exps.weight is missing."),
        (
            {"blk.0.ffn_gate.1.weight": one},
            "holds blk.0.ffn_gate_exps.weight and, for the same, blk.0.ffn_gate.1.weight",
        ),
    ):
        _, (path,) = Case(model, GgufFile(tensors=tensors)).write(tmp_path)
        assert reason in refusal("convert", path, tmp_path / "out", *EXACT)


def test_refused_window(tmp_path: Path, refusal: Refused) -> None:
    """Mistral's, which all layers have, with the way out; Qwen's, because not all do."""
    _, (path,) = Case(RandomModel("mistral", window=100)).write(tmp_path)
    assert "--max-context 100" in refusal("convert", path, tmp_path / "out", *EXACT)
    _, (path,) = Case(RandomModel("qwen2"), GgufFile(keys={"qwen2.attention.sliding_window": 100})).write(tmp_path)
    assert "window of 100 tokens in some layers" in refusal("convert", path, tmp_path / "out", *EXACT)


def test_refused_parts(tmp_path: Path, refusal: Refused) -> None:
    _, parts = RIGHT["split"].write(tmp_path)
    first, second, third = parts
    third.rename(tmp_path / "elsewhere.gguf")
    assert f"lacks {third.name}" in refusal("convert", first, tmp_path / "out", *EXACT)
    assert "one of 3 parts" in refusal("convert", tmp_path / "elsewhere.gguf", tmp_path / "out", *EXACT)
    third.write_bytes(second.read_bytes())
    assert "its name does not" in refusal("convert", first, tmp_path / "out", *EXACT)
    assert "does not exist" in refusal("convert", tmp_path / "model-00004-of-00003.gguf", tmp_path / "out", *EXACT)


def test_refused_files(tmp_path: Path, refusal: Refused) -> None:
    _, (path,) = RIGHT["llama"].write(tmp_path)
    whole = path.read_bytes()
    for content, reason in (
        (b"GGML" + whole[4:], "does not begin with GGUF"),
        (whole[:4] + (1).to_bytes(4, "little") + whole[8:], "its version is 1"),
        (whole[:100], "ends in the middle of its header"),
        (whole[:16] + (2**60).to_bytes(8, "little") + whole[24:], "not a readable GGUF file"),
        (whole[:-1000], "ends after"),
        (b"", "not a readable GGUF file"),
    ):
        path.write_bytes(content)
        assert reason in refusal("convert", path, tmp_path / "out", *EXACT)
        assert "not a readable GGUF file" in refusal("plan", path)


def test_unknown_keys_are_reported(tmp_path: Path) -> None:
    keys = {
        "llama.new_idea": 3,
        "tokenizer.ggml.new_idea": 3,
        "llama.rope.scaling.finetuned": True,
        "llama.logit_scale": 1.0,
    }
    _, (path,) = Case(RandomModel(), GgufFile(keys=keys)).write(tmp_path)
    out = convert(path, tmp_path / "out", *EXACT)
    assert json.loads((out / "conversion_report.json").read_text())["unknown_keys"] == [
        "llama.new_idea",
        "tokenizer.ggml.new_idea",
    ]


def opened_tokenizer(tmp_path: Path, keys: dict[str, Any]) -> Any:
    _, (path,) = Case(RandomModel(), GgufFile(keys=keys)).write(tmp_path)
    return AutoTokenizer.from_pretrained(convert(path, tmp_path / "out", *EXACT))


def test_tokenizer(tmp_path: Path) -> None:
    """Pieces, special tokens, chat template and the ids at which a text ends."""
    tokenizer = opened_tokenizer(tmp_path, {})
    assert tokenizer.tokenize("a th 12<think>") == ["a", "Ġth", "Ġ", "1", "2", "<think>"]
    assert tokenizer.tokenize("".join(CONTROL)) == CONTROL
    text = "The 12th.\n<|im_end|><think> \tx"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text.replace("<|im_end|>", "")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert len(tokenizer) == 128 + 4 + len(CONTROL) + len(OWN)  # without rows that only pad the embedding
    assert tokenizer.chat_template == TEMPLATE
    ends = GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|endoftext|>", "<|im_end|>"]


def test_tokenizer_variants(tmp_path: Path) -> None:
    """Digits by the file's cutting, the beginning by its own word or by the kind's, templates by name."""
    keys = {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": None}
    tokenizer = opened_tokenizer(tmp_path / "a", keys | {"tokenizer.chat_template.tools": "tools"})
    assert tokenizer.convert_ids_to_tokens(tokenizer("12").input_ids) == ["<|im_start|>", "12"]
    assert tokenizer.chat_template == {"default": TEMPLATE, "tools": "tools"}
    keys = {"tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    tokenizer = opened_tokenizer(tmp_path / "b", keys)
    assert tokenizer.convert_ids_to_tokens(tokenizer("12").input_ids) == ["<|im_start|>", "1", "2", "<|im_end|>"]


def test_sentencepiece(tmp_path: Path) -> None:
    """Merged by scores, with a space before the text, and bytes for what no token has."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(128))]
    pieces += ["▁", "a", "b", "ab", "▁a", "bb", "▁ab"]
    rest = [f"[PAD{i}]" for i in range(len(pieces), 199)]
    types = [2, 3, 3] + [6] * 128 + [1] * 7 + [5] * len(rest)
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [*pieces, *rest],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [0.0] * 131 + [-9.0, -8.0, -7.0, -3.0, -2.0, -1.0, -4.0] + [0.0] * len(rest),
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.add_bos_token": None,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    tokenizer = opened_tokenizer(tmp_path / "a", keys)
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab abb\n").input_ids) == ["<s>", "▁ab", "▁a", "bb", "<0x0A>"]
    assert tokenizer.decode(tokenizer("ab abb\n").input_ids, skip_special_tokens=True) == "ab abb\n"
    tokenizer = opened_tokenizer(tmp_path / "b", keys | {"tokenizer.ggml.add_space_prefix": False})
    assert tokenizer.tokenize("ab") == ["ab"]


def test_without_tokenizer(tmp_path: Path) -> None:
    _, (path,) = Case(RandomModel(), GgufFile(keys={"tokenizer.ggml.model": "no_vocab"})).write(tmp_path)
    out = convert(path, tmp_path / "out", *EXACT)
    assert not list(out.glob("tokenizer*"))


def test_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """From the header alone, what the folder's plan says."""
    source, (path,) = RIGHT["qwen3moe"].write(tmp_path)
    expected = plan(str(source), memory_bytes=2**30)
    monkeypatch.setattr("mla_converters.checkpoints.gguf.config.read_values", pytest.fail)
    got = plan(str(path), memory_bytes=2**30)
    assert got["layouts"] == expected["layouts"]
    assert got["conversion"] == expected["conversion"]
    assert got["source"] | {"name": expected["source"]["name"]} == expected["source"]
    assert f"convert {path} ./model-mla" in got["command"]
    _, (lacking,) = Case(RandomModel(), REFUSED["missing"][0]).write(tmp_path)
    with pytest.raises(ConversionError, match=r"blk\.1\.ffn_down\.weight is missing"):
        plan(str(lacking), memory_bytes=2**30)


def test_as_source_of_everything(tmp_path: Path) -> None:
    """Calibration on the model's own text, verification against the file, and evaluation of it."""
    _, (path,) = Case(RandomModel(std=0.05), GgufFile(kind="Q8_0")).write(tmp_path)
    options = ("--calibration", "self", "--calibration-tokens", 1024, "--refit-steps", 1)
    out = convert(path, tmp_path / "out", "--cache-ratio", 0.5, *options)
    report = verify(out, source=str(path))
    assert report["ok"], report
    few_steps = ("--text", CALIBRATION, "--tokens", 2048, "--batch-size", 1, "--steps", 3, "--learning-rate", 1e-4)
    assert heal(out, tmp_path / "healed", "--source", path, *few_steps).is_dir()
    text = Path(__file__)
    (row,) = evaluate([str(path)], EvalOptions(text=text, windows=1, length=64), reference=str(path), quiet=True)[
        "models"
    ]
    assert row["name"] == str(path) and row["kl"] == 0


@pytest.mark.slow
def test_real_model_in_parts(smollm2_gguf: Path, tmp_path: Path) -> None:
    """SmolLM2 whole and cut in three: the same bytes, but for the name of the source."""
    reader = gguf.GGUFReader(smollm2_gguf)
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama", split_max_tensors=-(-len(reader.tensors) // 3))
    for name, item in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            array = item.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(name, item.contents(), item.types[0], sub_type=item.types[-1] if array else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part = tmp_path / "part-00002-of-00003.gguf"
    link = tmp_path / smollm2_gguf.name
    link.symlink_to(smollm2_gguf)
    expected, got = (written(path, tmp_path / path.stem) for path in (link, part))
    assert all(got[name] == expected[name] for name in got.keys() | expected.keys())
