"""The proof refuses a checkpoint that does not compute what its report says, and lets every right one through."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import convert
from support.files import CALIBRATION
from support.models import MIXTRAL_EXPERTS, RandomModel

from mla_converters.cards.card import read_report
from mla_converters.checkpoints.source import open_source
from mla_converters.errors import ConversionError
from mla_converters.proof import prove

Tensors = dict[str, torch.Tensor]
# Sharper attention than initialisation gives, so that a wrong RoPE shows.
MODELS = {
    "llama": RandomModel(heads=6, kv_heads=3, hidden=96, std=0.3),
    "qwen3": RandomModel("qwen3", heads=6, kv_heads=3, hidden=96, std=0.3),
    "mixtral": RandomModel("mixtral", experts=MIXTRAL_EXPERTS, std=0.3),
}
METHODS = {
    "exact": ("--method", "exact"),
    "closed-form": ("--refit-steps", 0, "--cache-ratio", 0.75, "--latent-bits", 16),
}


def frequencies(tensors: Tensors) -> None:
    for name in tensors:
        if name.endswith("rope_freqs"):
            tensors[name] = tensors[name].flip(0) * 3


def values(tensors: Tensors) -> None:
    for name in tensors:
        if name.endswith("kv_b_proj.weight"):
            tensors[name] = tensors[name].flip(0).contiguous()


def outputs(tensors: Tensors) -> None:
    for name in tensors:
        if name.endswith("o_proj.weight"):
            tensors[name] = -tensors[name]


def head(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].flip(0).contiguous()


def has_norm(out: Path) -> bool:
    return "model.layers.0.self_attn.k_norm.weight" in load_file(out / "model.safetensors")


@pytest.fixture(scope="module", params=[(family, method) for family in MODELS for method in METHODS], ids="-".join)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    family, method = request.param
    folder = tmp_path_factory.mktemp("proof")
    source = MODELS[family].save(folder / "source")
    calibration = () if method == "exact" else ("--calibration", CALIBRATION, "--calibration-tokens", 2048)
    return source, convert(source, folder / "mla", *METHODS[method], *calibration), method


def check(source: Path, out: Path) -> None:
    with open_source(str(source)) as opened:
        prove(opened, out, read_report(out), "cpu")


@pytest.mark.parametrize("damage", [frequencies, values, outputs, head], ids=lambda damage: damage.__name__)
def test_damage_is_found(converted: tuple[Path, Path, str], damage: Callable[[Tensors], None]) -> None:
    source, out, method = converted
    if damage is head and method != "exact":
        pytest.skip("what a conversion loses is known for attention outputs, not for predictions")
    if damage is frequencies and method != "exact" and has_norm(out):
        pytest.skip("with normalised keys, a random model attends nearly evenly, and RoPE hardly matters")
    weights = out / "model.safetensors"
    whole = weights.read_bytes()
    tensors = load_file(weights)
    damage(tensors)
    save_file(tensors, weights, metadata={"format": "pt"})
    try:
        with pytest.raises(ConversionError, match="The converted model"):
            check(source, out)
    finally:
        weights.write_bytes(whole)


def test_numbers_are_in_report(converted: tuple[Path, Path, str]) -> None:
    source, out, method = converted
    check(source, out)
    found = read_report(out).self_check
    assert found is not None and found.text and found.tokens > 100
    assert (found.kl == 0) == (method == "exact")
    assert found.source_perplexity > 0 and 0 <= found.top1_agreement <= 1
