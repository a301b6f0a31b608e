"""Damaged sources are converted correctly or refused in one sentence. ``FUZZ_EXAMPLES`` sets their number."""

import contextlib
import hashlib
import io
import json
import math
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from support.commands import UNPACKED, without_progress
from support.files import CALIBRATION
from support.models import MIXTRAL_EXPERTS, QWEN3_EXPERTS, RandomModel, load
from transformers import AutoModelForCausalLM

from mla_converters.cli.main import main
from mla_converters.proof import PROBE
from mla_converters.verify import verify

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
SOUND = 1e4  # largest logit of a sound source; one with larger logits, or NaN, overflows before it is converted
SECONDS = 60  # time limit of a case; most cases take less than one second
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CALIBRATED = ("--calibration", CALIBRATION, "--calibration-tokens", 512)
METHODS = (
    ("--method", "exact"),
    ("--method", "transmla", "--cache-ratio", 0.5, *CALIBRATED),
    ("--method", "mha2mla", "--cache-ratio", 0.75, *CALIBRATED),
    ("--method", "attention-aware", "--refit-steps", 1, *UNPACKED, *CALIBRATED),
)
MODELS = {
    "llama": RandomModel(),
    "llama-tied-bfloat16": RandomModel(tied=True, bias=True, dtype=torch.bfloat16),
    "mistral": RandomModel("mistral", window=256),
    "qwen2": RandomModel("qwen2"),
    "qwen3": RandomModel("qwen3"),
    "qwen3-moe": RandomModel("qwen3_moe", experts=QWEN3_EXPERTS),
    "mixtral": RandomModel("mixtral", experts=MIXTRAL_EXPERTS),
}
NUMBERS = (0, 1, 2, 3, 7, -1, 10**6, 10**12, 2**63, 2**70, 0.5, -0.5, 1e-300, 1e300, math.nan, math.inf)
WORDS = ("", "big", "float16", "float8_e4m3fn", "gelu", "yarn", "../x")
HOSTILE = st.sampled_from((None, True, False, *NUMBERS, *WORDS, [], [1], [None] * 3, {}, {"a": 1}))
FOREIGN_KEYS = [
    "attn_logit_softcapping",
    "auto_map",
    "dtype",
    "head_dim",
    "kv_lora_rank",
    "layer_types",
    "max_window_layers",
    "mlp_only_layers",
    "num_local_experts",
    "num_nextn_predict_layers",
    "partial_rotary_factor",
    "quantization_config",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "torch_dtype",
    "use_sliding_window",
]
NOT_JSON = st.sampled_from((b"", b"{", b"null", b"[]", b"5", b'"text"', b"\xff\xfe", b"{}", b"[" * 10**5, b"NaN"))


@dataclass(frozen=True)
class Damage:
    """A damage to a source, and its description ``what`` for reports of failures."""

    what: str
    do: Callable[[Path], None] = field(repr=False)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@st.composite
def config_damage(draw: st.DrawFn) -> Damage:
    """A key of ``config.json``, or of a dictionary in it, gets another value or is removed."""
    pick, inner, value, remove = draw(st.integers(0, 999)), draw(st.integers(0, 99)), draw(HOSTILE), draw(st.booleans())

    def damage(folder: Path) -> None:
        config = read(folder / "config.json")
        keys = sorted({*config, *FOREIGN_KEYS})
        key, place = keys[pick % len(keys)], config
        if isinstance(config.get(key), dict) and inner % 2 and config[key]:
            place = config[key]
            key = sorted(place)[inner % len(place)]
        if remove:
            place.pop(key, None)
        else:
            place[key] = value
        (folder / "config.json").write_text(json.dumps(config))

    return Damage(f"config key {pick}.{inner} = {'removed' if remove else repr(value)}", damage)


@st.composite
def json_damage(draw: st.DrawFn) -> Damage:
    """A JSON file gets other content, is cut short, or has one value of another type."""
    names = ("config.json", INDEX, "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    name = draw(st.sampled_from((*names, "special_tokens_map.json")))
    content = draw(st.one_of(NOT_JSON, st.floats(0, 1), st.tuples(st.integers(0, 99), HOSTILE)))

    def damage(folder: Path) -> None:
        path = folder / name
        if isinstance(content, bytes) or not path.exists():
            path.write_bytes(content if isinstance(content, bytes) else b"{}")
        elif isinstance(content, float):
            whole = path.read_bytes()
            path.write_bytes(whole[: int(content * len(whole))])
        else:
            pick, value = content
            fields = read(path)
            if isinstance(fields, dict) and fields:
                fields[sorted(fields)[pick % len(fields)]] = value
            path.write_text(json.dumps(fields))

    return Damage(f"{name}: {str(content)[:40]}", damage)


@st.composite
def index_damage(draw: st.DrawFn) -> Damage:
    """The index names a file that is elsewhere, missing or impossible, for one weight or for all."""
    elsewhere = ("../model.safetensors", "/etc/passwd", "/", ".", "..", "", "nowhere.safetensors", "config.json")
    target = draw(st.one_of(st.sampled_from((*elsewhere, "a/../model.safetensors", "\0", 5, None)), HOSTILE))
    everything, pick = draw(st.booleans()), draw(st.integers(0, 99))

    def damage(folder: Path) -> None:
        index = read(folder / INDEX) if (folder / INDEX).exists() else {}
        names = index.get("weight_map") or dict.fromkeys(load_file(folder / WEIGHTS), WEIGHTS)
        chosen = sorted(names)[pick % len(names)]
        weight_map = {name: target if everything or name == chosen else file for name, file in names.items()}
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return Damage(f"index: {target!r}, everything {everything}", damage)


@st.composite
def file_damage(draw: st.DrawFn) -> Damage:
    """A file is cut, altered, missing, a folder, or a link (to itself, to nothing, or to its content elsewhere)."""
    kind = draw(st.sampled_from(("cut", "flip", "missing", "folder", "loop", "dangling", "moved")))
    pick, place, bit = draw(st.integers(0, 99)), draw(st.floats(0, 1)), draw(st.integers(0, 7))

    def damage(folder: Path) -> None:
        files = sorted(path for path in folder.iterdir() if path.is_file())
        path = files[pick % len(files)]
        content = bytearray(path.read_bytes())
        path.unlink()
        if kind == "cut":
            path.write_bytes(content[: int(place * len(content))])
        elif kind == "flip" and content:
            content[int(place * (len(content) - 1))] ^= 1 << bit
            path.write_bytes(content)
        elif kind == "folder":
            path.mkdir()
        elif kind == "loop":
            path.symlink_to(path.name)
        elif kind == "dangling":
            path.symlink_to("/nowhere/at/all")
        elif kind == "moved":
            elsewhere = folder.parent / "blobs"
            elsewhere.mkdir(exist_ok=True)
            (elsewhere / path.name).write_bytes(content)
            path.symlink_to(elsewhere / path.name)

    return Damage(f"file {pick} {kind} at {place:.2f}", damage)


def with_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that sets one element of a tensor to ``value``."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return change


TENSOR_CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "nan": with_value(math.nan),
    "infinity": with_value(math.inf),
    "large": with_value(1e30),
    "all-large": lambda tensor: torch.full_like(tensor, torch.finfo(tensor.dtype).max),
    "zeros": torch.zeros_like,
    "double": lambda tensor: tensor.double(),
    "half": lambda tensor: tensor.half(),
    "integers": lambda tensor: tensor.to(torch.int8),
    "float8": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "transposed": lambda tensor: tensor.t().contiguous() if tensor.dim() == 2 else tensor[None],
    "shorter": lambda tensor: tensor[:-1].contiguous(),
    "scalar": lambda tensor: torch.tensor(1.0),
    "empty": lambda tensor: tensor[:0].contiguous(),
}
SURPLUS = [
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.layers.0.self_attn.rope_freqs",
    "model.layers.2.mlp.up_proj.weight",
    "model.layers.0.self_attn.kv_b_proj.weight",
    "model.layers.0.self_attn.q_proj.bias",
    "model.layers.-1.x",
    "lm_head.weight",
    "model.layers.0.self_attn.k_norm.weight",
    "x",
    "../x",
]


@st.composite
def tensor_damage(draw: st.DrawFn) -> Damage:
    """A tensor has other values or another type, is missing or renamed, or there is a surplus tensor."""
    pick = draw(st.integers(0, 999))
    change = draw(st.sampled_from((*TENSOR_CHANGES, "missing", "surplus", "surplus", "renamed")))
    surplus = draw(st.sampled_from(SURPLUS))

    def damage(folder: Path) -> None:
        files = sorted(folder.glob("*.safetensors")) or [folder / WEIGHTS]
        path = files[pick % len(files)]
        tensors = load_file(path)
        name = sorted(tensors)[pick % len(tensors)]
        if change == "missing":
            del tensors[name]
        elif change == "renamed":
            tensors[surplus] = tensors.pop(name)
        elif change == "surplus":
            tensors[surplus] = torch.ones(3, 2)
        else:
            tensors[name] = TENSOR_CHANGES[change](tensors[name])
        save_file(tensors, path)

    return Damage(f"tensor {pick} {change} ({surplus})", damage)


DAMAGE = st.one_of(config_damage(), config_damage(), json_damage(), index_damage(), file_damage(), tensor_damage())


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every model, as one file and in shards."""
    folder = tmp_path_factory.mktemp("pristine")
    for name, model in MODELS.items():
        whole = model.save(folder / name)
        (whole / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        (whole / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.5, "eos_token_id": 1}')
        sharded = Path(shutil.copytree(whole, folder / f"{name}-sharded"))
        (sharded / WEIGHTS).unlink()
        AutoModelForCausalLM.from_pretrained(whole).save_pretrained(sharded, max_shard_size="60KB")
        assert (sharded / INDEX).exists()
    return folder


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Fail if the block takes longer."""

    def expired(*_: object) -> None:
        raise AssertionError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def command_line(*arguments: object) -> tuple[int, str]:
    """Run ``vllm-mla`` in this process; return its exit code, and its stderr without progress."""
    complaint = io.StringIO()
    with (
        patch.object(sys, "argv", ["vllm-mla", *map(str, arguments)]),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(complaint),
        pytest.raises(SystemExit) as exit_info,
    ):
        main()
    return exit_info.value.code, without_progress(complaint.getvalue())


def contents(folder: Path) -> dict[str, str]:
    """The contents of a folder: for each path, a checksum, or the target of a link."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes() if path.is_file() else b"").hexdigest()
        for path in sorted(folder.rglob("*"))
    }


def check(pristine: Path, model: str, sharded: bool, damages: list[Damage], options: tuple[object, ...]) -> None:
    """Damage a source, convert it, and check the result."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(shutil.copytree(pristine / f"{model}{'-sharded' * sharded}", Path(scratch, "source")))
        for damage in damages:
            # The second damage may be unable to read the files that the first left.
            with contextlib.suppress(OSError, ValueError, AttributeError, TypeError, RuntimeError, SafetensorError):
                damage.do(source)
        before = contents(Path(scratch))
        out = Path(scratch, "out")
        with time_limit(SECONDS):
            code, complaint = command_line("convert", source, out, *options)
        if code:
            assert code == 2, complaint
            (line,) = complaint.strip().splitlines()
            assert line.startswith("vllm-mla: error: ")
            assert contents(Path(scratch)) == before
            return
        after = contents(Path(scratch))
        assert {name: after[name] for name in after if Path(name).parts[0] != "out"} == before
        expected = logits(source)
        if expected is not None and expected.abs().max() < SOUND:
            report = verify(out)
            # A source may come without a tokenizer.
            assert not [check for check in report.checks if check.problems and check.name != "tokenizer"]
            if "exact" in options:
                # What is converted is written in the dtype of the tensors that it is made of.
                narrow = any(tensor.element_size() < 4 for tensor in load_file(out / WEIGHTS).values())
                rounding = 0.05 if narrow else 1e-3
                assert (logits(out) - expected).norm() <= rounding * expected.norm()


@torch.inference_mode()
def logits(folder: Path) -> torch.Tensor | None:
    """Logits ``[1, tokens, vocabulary]`` of verification's text; None if transformers cannot load the model."""
    try:
        model = load(folder)
    except Exception:  # it may raise anything
        return None
    ids = torch.tensor([ord(character) for character in PROBE])[None, : model.config.max_position_embeddings]
    return model(ids % model.config.vocab_size).logits


@pytest.mark.parametrize("options", METHODS, ids=lambda options: options[1])
@pytest.mark.parametrize("dead", ["input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"])
def test_dead_layer(pristine: Path, tmp_path: Path, dead: str, options: tuple[object, ...]) -> None:
    """A layer whose keys, values or queries are all zero converts without a division by zero."""
    source = Path(shutil.copytree(pristine / "llama", tmp_path / "source"))
    tensors = load_file(source / WEIGHTS)
    tensors[f"model.layers.0.{dead}.weight"].zero_()
    save_file(tensors, source / WEIGHTS)
    assert command_line("convert", source, tmp_path / "out", *options) == (0, "")
    assert verify(tmp_path / "out").ok


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
@given(
    model=st.sampled_from(tuple(MODELS)),
    sharded=st.booleans(),
    damages=st.lists(DAMAGE, min_size=1, max_size=2),
    options=st.sampled_from(METHODS),
)
def test_converted_or_refused(
    pristine: Path, model: str, sharded: bool, damages: list[Damage], options: tuple[object, ...]
) -> None:
    """The conversion verifies, or it is refused in one sentence and leaves nothing. The source does not change."""
    check(pristine, model, sharded, damages, options)
