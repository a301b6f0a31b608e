"""Checks of the GPU backend for packed rows that need no GPU: its kernels in Triton's interpreter, and compiled for
GPUs that are not there. ``tests/gpu`` runs them on one."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.modules import run_support
from vllm.config import CompilationConfig

pytest.importorskip("triton", reason="without Triton, vLLM has no such kernel")

from vllm_mla_plugin import backends
from vllm_mla_plugin.backends import gpu
from vllm_mla_plugin.backends.gpu_packed import PackedTritonMLABackend
from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat

# Format, heads, dtype, compute capability; and how many bytes of each thread may not fit the registers.
COMPILED = {
    ("512x4g64/64x8g64s", 32, "bfloat16", 90): 64,
    ("512x4g64/64x8g64s", 8, "float16", 80): 0,
    ("512x16/64x16/nomean", 8, "bfloat16", 90): 0,
    ("192x4g32/192x5g32", 9, "bfloat16", 90): 256,
    ("512x4g64/64x8g64s", 16, "bfloat16", 100): 64,
    ("960x4g64/64x8g64s", 32, "bfloat16", 90): 256,
    ("960x4g64/64x8g64s", 16, "bfloat16", 89): 256,
    ("37x5g16+5x2g8c+6x16/6x6g6s/a4", 9, "float16", 80): 256,
}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    return run_support("interpreted_packed", TRITON_INTERPRET="1")


@pytest.mark.slow
def test_rows(interpreted: dict[str, Any]) -> None:
    """Every kind of format packs to the bytes that torch packs to."""
    shares = {name: share for name, share in interpreted.items() if name.startswith("rows ")}
    assert len(shares) == 13
    # The sums of squares of two scales may differ in their last bits only, and these depend on the processor.
    assert all(share < 0.1 for share in shares.values()) and sum(shares.values()) < 0.2, shares


@pytest.mark.slow
def test_ties(interpreted: dict[str, Any]) -> None:
    """Where sums of squares are exact, every row is torch's: of equally good scales, the first is taken."""
    shares = {name: share for name, share in interpreted.items() if name.startswith("ties ")}
    assert len(shares) == 6 and not any(shares.values()), shares


@pytest.mark.slow
def test_widened_tokens(interpreted: dict[str, Any]) -> None:
    errors = {name: error for name, error in interpreted.items() if name.startswith("widen ")}
    assert len(errors) == 13 and all(error < 2e-6 for error in errors.values()), errors


@pytest.mark.slow
def test_attention(interpreted: dict[str, Any]) -> None:
    """Decode is attention in float64 for every kind of format, number of heads, and several new tokens at once."""
    errors = {name: error for name, error in interpreted.items() if name.startswith("attention ")}
    assert len(errors) == 19 and all(error < 1e-5 for error in errors.values()), errors


@pytest.mark.slow
def test_implementation(interpreted: dict[str, Any]) -> None:
    """It decodes and prefills from the rows that it packs; new tokens are attended as they are packed."""
    assert [passed for name, passed in interpreted.items() if name.startswith("impl ")] == [True] * 4


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cache: Path = tmp_path_factory.mktemp("triton")
    return run_support("compiled_packed", json.dumps(list(COMPILED)), TRITON_CACHE_DIR=str(cache))


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_compiled(compiled: dict[str, Any], case: tuple[str, int, str, int]) -> None:
    """GPUs' compilers take all kernels, and they fit: the shared memory is what the tiles promise, or less."""
    kernels = dict(compiled[str(case)])
    promised = kernels.pop("promised")
    small = ("_absorb", "_pack", "_widen", "merge_parts", "project_parts")
    assert set(kernels) == {"_attend_part", *small}
    assert kernels["_attend_part"]["shared"] <= promised
    assert kernels["_attend_part"]["local"] <= COMPILED[case]
    assert not any(kernels[name]["local"] for name in small)
    assert all(kernels[name]["shared"] <= 48 << 10 for name in small)


def serve_on_gpu(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.bfloat16, differ: bool = False) -> Any:
    """As if vLLM were configured to serve a packed model on a Hopper GPU; its configuration."""
    model = SimpleNamespace(dtype=dtype, hf_text_config=SimpleNamespace(sizes_differ=differ))
    config = SimpleNamespace(model_config=model, compilation_config=CompilationConfig())
    config.compilation_config.pass_config.fuse_rope_kvcache_cat_mla = True
    platform = SimpleNamespace(is_cpu=lambda: False, is_cuda_alike=lambda: True)
    monkeypatch.setattr(backends, "current_platform", platform)
    monkeypatch.setattr(backends, "get_current_vllm_config", lambda: config)
    monkeypatch.setattr(gpu, "shared_memory", lambda: 227 << 10)
    return config


@pytest.mark.parametrize("differ", [False, True])
def test_choice(differ: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed rows of any size get this backend, and vLLM's pass that would write numbers into them is off."""
    config = serve_on_gpu(monkeypatch, differ=differ)
    for spec in ("512x4g64/64x8g64s", "37x4g16/6x6g6s"):
        format = CacheFormat.parse(spec)
        assert backends.select_backend(*format.sizes, format) is PackedTritonMLABackend
    assert config.compilation_config.pass_config.fuse_rope_kvcache_cat_mla is False


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    format = CacheFormat.parse("512x4g64/64x8g64s")
    serve_on_gpu(monkeypatch, torch.float32)
    with pytest.raises(ValueError, match="give --dtype bfloat16"):
        backends.select_backend(512, 64, format)
    serve_on_gpu(monkeypatch)
    wide = CacheFormat.parse("4032x4g64/64x8g64s")
    with pytest.raises(ValueError, match=r"packed cache of 4032 \+ 64 .* smaller --kv-lora-rank"):
        backends.select_backend(4032, 64, wide)
