"""Conversions to packed caches: what is in the checkpoint and in the report, the same bytes again, and SmolLM2."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.commands import contents, convert
from support.files import CALIBRATION, ROOT
from support.models import RandomModel, load

from mla_converters.convert import convert as convert_api
from mla_converters.errors import StoppedError
from mla_converters.evaluation.run import evaluate
from mla_converters.latent.module import LatentAttention
from mla_converters.options import AttentionAwareOptions, ConvertOptions, EvalOptions
from mla_converters.resume.layer_pass import Record
from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat
from vllm_mla_plugin.checkpoint.latent_cache import latent_cache_json

TEXT = ("--calibration", CALIBRATION, "--calibration-tokens", 1024)
FEW_STEPS = (*TEXT, "--refit-steps", 3)
EXACT_4 = ("--method", "exact", "--latent-bits", 4)
LAYERS, SOURCE_BYTES = 3, 192
FAMILIES = {
    "llama": RandomModel(heads=6, kv_heads=3, hidden=96, layers=LAYERS, bias=True),
    "qwen3": RandomModel("qwen3", heads=6, kv_heads=3, hidden=96, layers=LAYERS),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["llama"].save(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def packed(source: Path) -> Path:
    """A conversion with the default size."""
    return convert(source, source.with_name("packed"), *FEW_STEPS)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any], CacheFormat]:
    """Configuration and report of a packed checkpoint, and its format."""
    config, report = (json.loads((folder / name).read_text()) for name in ("config.json", "conversion_report.json"))
    format = CacheFormat.parse(report["latent_cache"])
    assert config["latent_cache"] == latent_cache_json([format])
    assert format.sizes == (config["kv_lora_rank"], config["qk_rope_head_dim"])
    return config, report, format


def means(folder: Path) -> list[torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return [tensor for name, tensor in sorted(tensors.items()) if name.endswith("cache_mean")]


def test_default(packed: Path) -> None:
    """A quarter of the bytes, a mean for each layer, and a report of all of it."""
    config, report, format = read(packed)
    assert format.mean and format.bytes_per_token <= SOURCE_BYTES / 4
    found = means(packed)
    assert [(tuple(mean.shape), mean.dtype) for mean in found] == [((2, sum(format.sizes)), torch.float32)] * LAYERS
    assert all(mean[0].any() and not torch.equal(mean[0], mean[1]) for mean in found)
    assert report["bytes_per_token_and_layer"] == {"source": SOURCE_BYTES, "mla": format.bytes_per_token}
    assert report["cache_ratio"] == round(format.bytes_per_token / SOURCE_BYTES, 6)
    assert report["cached_per_token_and_layer"] == {"source": SOURCE_BYTES // 2, "mla": sum(format.sizes)}
    assert report["lossless"] is False and len(report["per_layer"]) == LAYERS
    (search,) = report["searches"]
    assert search["title"] == "cache format" and 2 <= len(search["errors"]) <= 4
    assert report["latent_cache"] == min(search["errors"], key=search["errors"].get)
    for spec in search["errors"]:
        assert CacheFormat.parse(spec).bytes_per_token <= SOURCE_BYTES / 4
    assert f"- Cache format: `{report['latent_cache']}`, 25.0% of the bytes" in (packed / "README.md").read_text()
    assert "--cache-ratio" not in report["command"] and config["mla_conversion"] == report


@pytest.mark.parametrize("ratio", [0.1, 1.0])
def test_bytes_stay_within_the_share(ratio: float, source: Path, tmp_path: Path) -> None:
    out = convert(source, tmp_path / "out", *TEXT, "--refit-steps", 0, "--cache-ratio", ratio, "--dtype", "bfloat16")
    _, report, format = read(out)
    assert format.bytes_per_token <= ratio * SOURCE_BYTES
    assert report["cache_ratio"] <= ratio
    assert report["dtype"] == "bfloat16"
    assert {mean.dtype for mean in means(out)} == {torch.float32} and len(means(out)) == LAYERS


SIZES: dict[str, tuple[tuple[object, ...], str]] = {
    "by-hand": (("--refit-steps", 0, "--latent-cache", "30x4g15+10x2g5c/16x6g16/a4"), "30x4g15+10x2g5c/16x6g16/a4"),
    "by-hand-without-mean": (
        ("--refit-steps", 0, "--latent-cache", "40x4g20/24x5g12/nomean/a4"),
        "40x4g20/24x5g12/nomean/a4",
    ),
    "numbers": (
        ("--refit-steps", 0, "--latent-bits", 4, "--kv-lora-rank", 32, "--qk-rope-head-dim", 16),
        "32x4g32/16x4g16/a4",
    ),
    "not-searched": (("--refit-steps", 0, "--latent-bits", 4, "--without", "search"), "64x4g32/16x4g16"),
    "transmla": (("--method", "transmla", "--latent-bits", 4), "64x4g32/16x4g16"),
    "mha2mla": (("--method", "mha2mla", "--latent-bits", 8), "30x8g30s/16x8g16s"),
    "mha2mla-without-text": (
        ("--method", "mha2mla", "--latent-bits", 8, "--rope-keep", "high"),
        "30x8g30s/16x8g16s/nomean",
    ),
}


@pytest.mark.parametrize("case", SIZES)
def test_other_sizes(case: str, source: Path, tmp_path: Path) -> None:
    """Formats that are given, or follow from sizes and bits that are; every method packs."""
    options, spec = SIZES[case]
    text = () if "--rope-keep" in options else TEXT
    out = convert(source, tmp_path / "out", *text, *options)
    _, report, format = read(out)
    assert format.spec == spec and report["lossless"] is False
    assert len(means(out)) == (LAYERS if format.mean else 0)
    assert not [search for search in report["searches"] if search["title"] == "cache format"]


def test_uniform_bits_are_searched(source: Path, tmp_path: Path) -> None:
    """With --latent-bits, the candidates differ in their widths alone."""
    out = convert(source, tmp_path / "out", *TEXT, "--refit-steps", 0, "--latent-bits", 4)
    _, report, _ = read(out)
    (search,) = report["searches"]
    formats = [CacheFormat.parse(spec) for spec in search["errors"]]
    assert len({format.sizes for format in formats}) == len(formats) > 1
    assert {part.bits for format in formats for part in (*format.latent, *format.rope)} == {4}


def test_packed_exact(source: Path, tmp_path: Path) -> None:
    """All numbers, in 4 bits, with means that were measured on random tokens of the seed."""
    one, again, other = (
        convert(source, tmp_path / name, *EXACT_4, "--seed", seed) for name, seed in (("1", 1), ("2", 1), ("3", 2))
    )
    _, report, format = read(one)
    assert format.spec == "48x4g32/48x4g32/a8" and report["lossless"] is False
    assert "calibration" not in report and len(report["per_layer"]) == LAYERS
    assert all(layer["energy_kept"] == 1 and 0 < layer["output_error"] < 0.1 for layer in report["per_layer"])
    assert (one / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert {name for name in ours if not torch.equal(ours[name], theirs[name])} == {
        f"model.layers.{layer}.self_attn.cache_mean" for layer in range(LAYERS)
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_module_equals_transformers(family: str, tmp_path: Path) -> None:
    """The module that is measured and trained rounds as the written model does: the same output and gradient."""
    source = FAMILIES[family].save(tmp_path / "source")
    out = convert(source, tmp_path / "out", *TEXT, "--refit-steps", 0)
    _, _, format = read(out)
    model, tensors = load(out), load_file(out / "model.safetensors")
    own = "model.layers.1.self_attn."
    weights = {name.removeprefix(own): tensor for name, tensor in tensors.items() if name.startswith(own)}
    attention = model.model.layers[1].self_attn
    eps = None if family == "llama" else model.config.rms_norm_eps
    arguments: dict[str, Any] = {"heads": 6, "scale": attention.scaling, "qk_norm_eps": eps}
    module = LatentAttention(weights, **arguments, cache_format=format)
    torch.manual_seed(0)
    x, positions = torch.randn(2, 50, 96), torch.arange(50)[None]
    output, expected = module(x), attention(x, positions)[0]
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    unrounded = LatentAttention(weights, **arguments)(x)
    assert (output - unrounded).norm() > 0.02 * unrounded.norm(), "rounding must be seen"
    for result in (output, expected):
        result.square().sum().backward()
    for name, parameter in module.named_parameters():
        gradient = attention.get_parameter(name).grad
        assert gradient is not None and gradient.any(), name
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())


def test_interrupted_in_every_phase(
    source: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is interrupted after each save of each phase goes on from there, and gives the same bytes."""
    options = ConvertOptions(
        method=AttentionAwareOptions(refit_steps=3), calibration=(str(CALIBRATION),), calibration_tokens=1024
    )
    phases = ("profile", "formats", "layers")
    stops = [("texts", 1), *((phase, layer) for phase in phases for layer in range(1, LAYERS + 1))]
    passed: list[tuple[str, int]] = []
    save = Record.save

    def save_and_stop(self: Record) -> None:
        save(self)
        assert self.path is not None
        passed.append((self.path.stem, self.done))
        raise KeyboardInterrupt

    monkeypatch.setattr(Record, "save", save_and_stop)
    for _ in stops:
        with pytest.raises(StoppedError, match="Interrupted"):
            convert_api(str(source), tmp_path / "packed", options, quiet=True)
    assert passed == stops
    convert_api(str(source), tmp_path / "packed", options, quiet=True)
    assert contents(tmp_path / "packed") == contents(packed)


@pytest.mark.slow
def test_real_model_in_4_bits(smollm2: Path, tmp_path: Path) -> None:
    """All of SmolLM2's cache in 4 bits, without any text, is within 4% of the source's perplexity."""
    out = convert(smollm2, tmp_path / "out", *EXACT_4)
    assert read(out)[2].spec == "192x4g32/192x4g32/a8"
    options = EvalOptions(text=ROOT / "scripts" / "demo_text.txt", windows=1, length=800)
    rows = evaluate([str(smollm2), str(out)], options, quiet=True).models
    assert rows[1].perplexity < 1.04 * rows[0].perplexity
