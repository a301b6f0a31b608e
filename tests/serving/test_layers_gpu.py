"""Layers of different sizes on a GPU that is not there: vLLM's own planning, and decode in Triton's interpreter."""

from types import SimpleNamespace
from typing import Any

import pytest
from support.engine import VLLM
from support.modules import run_support
from vllm.config import CompilationConfig
from vllm.v1.attention.backends.mla.prefill.base import MLADimensions

pytest.importorskip("triton", reason="without Triton, vLLM has no such kernel")

from vllm_mla_plugin import backends
from vllm_mla_plugin.backends.gpu import AnySizeTritonMLABackend

BLOCK, MEMORY = 16, 1 << 20
GRAPHS = "UNIFORM_BATCH" if VLLM >= (0, 31) else "UNIFORM_SINGLE_TOKEN_DECODE"
ROWS = {"16 bits": [160, 80, 160, 160], "packed": [64, 32, 64, 64], "vLLM's sizes": [1152, 640, 1152, 1152]}
"""Bytes of a token in each layer: no more than its numbers take."""
GROUPS = {"16 bits": [[0, 3], [1], [2]], "packed": [[0, 3], [1], [2]], "vLLM's sizes": [[0, 2], [1], [3]]}


@pytest.fixture(scope="module")
def planned() -> dict[str, Any]:
    return run_support("interpreted_layers", TRITON_INTERPRET="1")


@pytest.mark.slow
@pytest.mark.parametrize("case", ROWS)
def test_plan(planned: dict[str, Any], case: str) -> None:
    """Layers of one split share a builder of metadata, and others do not, however wide; memory pays for rows alone."""
    plan = planned[case]
    packed = case == "packed"
    assert plan["backends"] == ["PackedTritonMLABackend" if packed else "AnySizeTritonMLABackend"]
    assert plan["prefill"] == ["FlashAttention"] and plan["graphs"] == GRAPHS
    assert plan["groups"] == GROUPS[case]
    assert len({tuple(sizes) for sizes in plan["builders"]}) == len(plan["builders"]) == 3
    assert plan["workspaces"] == [0, 0, 0]
    assert plan["rows"] == ROWS[case]
    assert plan["blocks"] == MEMORY // (BLOCK * sum(ROWS[case]))
    assert plan["tokens"] == BLOCK * plan["blocks"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ROWS)
def test_decode(planned: dict[str, Any], case: str) -> None:
    """Each layer's attention is that in float64, through vLLM's layer, metadata, cache and shared workspace."""
    decoded = planned[case]["decoded"]
    assert len(decoded) == 4
    assert all(run["error"] < 1e-3 for layer in decoded for run in layer.values()), decoded


@pytest.mark.slow
@pytest.mark.parametrize("case", ROWS)
def test_launches(planned: dict[str, Any], case: str) -> None:
    """With W_UV in the merge, a layer's attention is three launches instead of four."""
    for layer in planned[case]["decoded"]:
        assert layer["apart"]["launches"] == {"aten.bmm.out": 2, "_attend_part": 1, "merge_parts": 1}
        assert layer["together"]["launches"] == {"aten.bmm.out": 1, "_attend_part": 1, "project_parts": 1}


class Wanted(SimpleNamespace):
    """A prefill backend that the user asks for. It takes DeepSeek's heads alone."""

    name = "FLASHINFER"

    def get_class(self) -> Any:
        return SimpleNamespace(supports_mla_dimensions=lambda dims: dims.qk_rope_head_dim == 64)


def serve_on_gpu(monkeypatch: pytest.MonkeyPatch, differ: bool, prefill: Any = None) -> Any:
    """As if vLLM were configured to serve a model on a GPU, for which it has a prefill backend; its configuration."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(dtype=None, hf_text_config=SimpleNamespace(sizes_differ=differ)),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        attention_config=SimpleNamespace(mla_prefill_backend=prefill),
        compilation_config=CompilationConfig(),
    )
    config.compilation_config.pass_config.fuse_rope_kvcache_cat_mla = True
    platform = SimpleNamespace(is_cpu=lambda: False, is_cuda_alike=lambda: True)
    monkeypatch.setattr(backends, "current_platform", platform)
    monkeypatch.setattr(backends, "get_current_vllm_config", lambda: config)
    monkeypatch.setattr(backends, "get_mla_prefill_backend", lambda config: object)
    monkeypatch.setattr("vllm_mla_plugin.backends.gpu.shared_memory", lambda: 227 << 10)
    return config


def test_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own decode backends serve their sizes only where all layers have them."""
    config = serve_on_gpu(monkeypatch, differ=False)
    assert backends.select_backend(512, 64) is None
    assert config.compilation_config.pass_config.fuse_rope_kvcache_cat_mla is True
    config = serve_on_gpu(monkeypatch, differ=True)
    assert backends.select_backend(512, 64) is AnySizeTritonMLABackend
    assert config.compilation_config.pass_config.fuse_rope_kvcache_cat_mla is False


def test_prefill_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefill backend that the user asks for must take every layer's heads, because vLLM asks for the largest."""
    known, other = (MLADimensions(qk_nope_head_dim=128, qk_rope_head_dim=rope, v_head_dim=128) for rope in (64, 32))
    serve_on_gpu(monkeypatch, differ=False)
    assert backends.select_prefill_backend(known) is None
    serve_on_gpu(monkeypatch, differ=True, prefill=Wanted())
    assert backends.select_prefill_backend(known) is None
    with pytest.raises(ValueError, match=r"FLASHINFER does not take heads of .*qk_rope_head_dim=32"):
        backends.select_prefill_backend(other)
