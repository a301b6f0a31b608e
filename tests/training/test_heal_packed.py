"""Healing a model with a packed cache: it is trained with the rounding, and stays packed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.agreement import assert_mostly_agrees
from support.commands import convert, heal
from support.engine import run_engine
from support.files import CALIBRATION
from support.models import RandomModel, load

from mla_converters.evaluation.hf_engine import kl_per_token
from mla_converters.heal import run as healing
from mla_converters.streaming import layers
from mla_converters.support import devices
from mla_converters.training.distillation import Distillation
from mla_converters.training.stored import Examples

TEXT = ("--calibration", CALIBRATION, "--calibration-tokens", 1024, "--refit-steps", 0, "--cache-ratio", 0.2)
FEW_STEPS = ("--text", CALIBRATION, "--tokens", 8192, "--length", 256, "--batch-size", 4, "--steps", 24)
PROMPTS = [list(range(5, 35)) * 5, [7], list(range(100, 117)), list(range(20, 60))]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Weights so small that a rounding to another code changes little.
    model = RandomModel(heads=6, kv_heads=3, head_dim=32, hidden=192, std=0.08)
    return model.save(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def mla(source: Path) -> Path:
    return convert(source, source.with_name("mla"), *TEXT)


Scored = list[tuple[torch.Tensor, float]]


@pytest.fixture(scope="module")
def scored() -> Scored:
    """The windows held out and the loss on them, before the training and after."""
    return []


@pytest.fixture(scope="module")
def healed(mla: Path, scored: Scored) -> Iterator[Path]:
    """Trained in float32, as on machines without bfloat16, so that other programs can compute the same losses."""
    held_out_loss = healing.held_out_loss

    def spy(model: Distillation, examples: Examples, *arguments: Any) -> torch.Tensor:
        losses = held_out_loss(model, examples, *arguments)
        scored.append((examples.columns["input_ids"], losses[0].item()))
        return losses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(healing, "held_out_loss", spy)
        for module in (healing, layers, devices):
            patch.setattr(module, "native_bfloat16", lambda device: False)
        yield heal(mla, mla.with_name("healed"), *FEW_STEPS)


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@torch.inference_mode()
def divergence(model: torch.nn.Module, source: torch.nn.Module, windows: torch.Tensor) -> float:
    pairs = ((source(row[None]).logits[0], model(row[None]).logits[0]) for row in windows)
    return torch.cat([kl_per_token(*pair) for pair in pairs]).mean().item()


def test_losses_are_those_of_the_packed_model(source: Path, mla: Path, healed: Path, scored: Scored) -> None:
    """Before and after. Without the rounding, the same weights lose less."""
    (windows, before), (_, after) = scored
    reference = load(source)
    assert before == pytest.approx(divergence(load(mla), reference, windows), rel=1e-3)
    assert after == pytest.approx(divergence(load(healed), reference, windows), rel=1e-3)
    assert after < 0.95 * before
    assert divergence(load(mla, latent_cache=None), reference, windows) < 0.9 * before
    reported = read(healed)["mla_conversion"]["healing"]["kl_held_out"]
    assert (reported["before"], reported["after"]) == (round(before, 6), round(after, 6))


def test_format_and_means_are_carried_over(mla: Path, healed: Path) -> None:
    """Projections are trained; the means that packing takes out are no weights."""
    assert read(healed)["latent_cache"] == read(mla)["latent_cache"]
    for name in ("latent_cache", "bytes_per_token_and_layer", "cache_ratio", "lossless"):
        assert read(healed)["mla_conversion"][name] == read(mla)["mla_conversion"][name]
    old, new = (load_file(folder / "model.safetensors") for folder in (mla, healed))
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        assert new[name].dtype == tensor.dtype
        trained = ".self_attn." in name and not name.endswith(("rope_freqs", "cache_mean"))
        assert torch.equal(new[name], tensor) != trained, name
    assert sum(name.endswith("cache_mean") for name in new) == 2


def test_packed_exact_can_be_healed(source: Path, tmp_path: Path) -> None:
    """Rounding loses something, so the conversion counts as lossy, and training makes up for some of it."""
    out = convert(source, tmp_path / "mla", "--method", "exact", "--latent-bits", 2)
    healed = heal(out, tmp_path / "healed", *FEW_STEPS)
    kl = read(healed)["mla_conversion"]["healing"]["kl_held_out"]
    assert 0 < kl["after"] < kl["before"]


@pytest.mark.engine
def test_served(healed: Path) -> None:
    """vLLM predicts what transformers does, from rows of the bytes that the report says."""
    job: dict[str, Any] = {"max_tokens": 12, "prompt_logprobs": True, "no_tokenizer": True}
    result = run_engine(healed, PROMPTS, engine={"max_model_len": 256}, **job)
    assert_mostly_agrees(result, load(healed), PROMPTS)
    row = read(healed)["mla_conversion"]["bytes_per_token_and_layer"]["mla"]
    assert result["kv_tokens"] == pytest.approx(2**30 / (2 * row), rel=1e-3)
