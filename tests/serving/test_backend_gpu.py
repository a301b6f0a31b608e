"""Checks of the GPU backend that need no GPU: the decode kernel in Triton's interpreter, and the gather.

``tests/gpu`` checks the other parts.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from support.attention import PREFILLS, check_prefill
from support.modules import run_support
from vllm.v1.attention.backends.mla.prefill.cpu_sdpa import CPUSDPAMLAPrefillBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker import workspace

from vllm_mla_plugin.backends import gpu as gpu_backend
from vllm_mla_plugin.backends.gpu import AnySizeTritonMLABackend, AnySizeTritonMLAImpl, scratch_rows
from vllm_mla_plugin.backends.gpu_decode import suited_parts
from vllm_mla_plugin.checkpoint.layouts import (
    GPUS,
    MAX_PREFILL_HEAD_SIZE,
    PLUGIN_BACKEND,
    SHARED_BYTES,
    VLLM_BACKENDS,
    VLLM_FP8_LAYOUTS,
    VLLM_LAYOUTS,
    gpu_backends,
    suited_tiles,
)
from vllm_mla_plugin.testing.layer import Projection, Sizes

pytest.importorskip("triton", reason="without Triton, vLLM has no such kernel")

LAYOUTS = [(128, 64), (100, 28), (448, 64), (448, 128), (256, 320), (500, 76), (120, 8), (48, 6), (8, 64), (64, 0)]
# heads, latent, rope, number of new tokens that are queries, whether these attend causally
CASES = [
    *((9, *layout, 1, True) for layout in LAYOUTS),
    *((heads, 128, 64, queries, causal) for heads in (1, 40) for queries, causal in ((1, True), (3, True), (3, False))),
]


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    """The largest error of each case."""
    return run_support("interpreted_kernel", json.dumps(CASES), TRITON_INTERPRET="1")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_kernel(errors: dict[str, float], case: tuple) -> None:
    """The kernel is right for every layout and number of heads, and for several new tokens of a request at once."""
    assert errors[str(case)] < 1e-5


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("kib", [99, 163, 227])
@pytest.mark.parametrize("heads", [1, 9, 32, 40])
def test_tiles_fit(heads: int, kib: int, fp8: bool) -> None:
    """Every layout's tiles hold its rows, have sizes that Triton accepts, and fit the GPU."""
    for latent, rope in LAYOUTS:
        tiles = suited_tiles(latent, rope, heads, fp8, kib << 10)
        sizes = [tiles.latent, tiles.tokens, tiles.heads, *([tiles.rope] if tiles.rope else [])]
        assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)
        assert tiles.latent >= latent and tiles.rope >= rope if tiles.rope else tiles.latent >= latent + rope
        assert tiles.shared_bytes(fp8) <= kib << 10


def test_a_latent_too_wide_for_the_gpu() -> None:
    assert suited_tiles(1984, 64, 32, False, 163 << 10).tokens == 16, "an A100 takes it"
    with pytest.raises(ValueError, match="smaller --kv-lora-rank"):
        suited_tiles(1984, 64, 32, False, 99 << 10)
    with pytest.raises(ValueError, match="smaller --kv-lora-rank"):
        suited_tiles(4032, 64, 1, False, 227 << 10)


def takes(layout: tuple[int, int], heads: int, shared_bytes: int) -> bool:
    """Whether the decode kernel accepts 16-bit rows of these sizes."""
    try:
        suited_tiles(*layout, heads, False, shared_bytes)
    except ValueError as refusal:
        assert "smaller --kv-lora-rank" in str(refusal)
        return False
    return True


@pytest.mark.parametrize("gpu", GPUS)
def test_plan_names_this_backend_where_it_serves(gpu: str) -> None:
    """For every number of heads and a grid of sizes, the kernel accepts exactly the sizes for which ``vllm-mla plan``
    names this backend."""
    answers = set()
    for latent in (1, 15, 64, 192, 256, 448, 511, 512, 513, 960, 1024, 1408, 1920, 1984, 2048, 4032):
        for rope in (2, 8, 48, 64, 128, 160):
            layout = (latent, rope)
            served = gpu_backends(layout, 64, "bfloat16", gpu) == [PLUGIN_BACKEND]
            answers.add(served)
            expected = layout not in VLLM_LAYOUTS
            for heads in (1, 9, 32, 40, 128):
                assert served == (expected and takes(layout, heads, SHARED_BYTES[gpu])), (layout, heads)
    assert answers == {True, False}


def test_backends_of_vllms_layouts() -> None:
    """vLLM's own backends serve its layouts on every GPU. No backend serves float32, or heads too large for prefill."""
    assert set(VLLM_FP8_LAYOUTS) < set(VLLM_LAYOUTS)
    names = {backend.name for backend in VLLM_BACKENDS}
    for gpu in GPUS:
        for layout in VLLM_LAYOUTS:
            served = gpu_backends(layout, 128, "bfloat16", gpu)
            assert served and set(served) <= names
            assert served == gpu_backends(layout, 128, "float16", gpu)
            assert gpu_backends(layout, MAX_PREFILL_HEAD_SIZE - layout[1] + 1, "bfloat16", gpu) == []
        for layout in (*VLLM_LAYOUTS, (128, 64)):
            assert gpu_backends(layout, 128, "float32", gpu) == []


def test_vllm_has_these_backends() -> None:
    """The names are valid for ``--attention-backend``. vLLM's Triton backend, and thus ours, takes 16 bits and fp8."""
    assert all(backend.name in AttentionBackendEnum.__members__ for backend in VLLM_BACKENDS)
    assert torch.float32 not in AnySizeTritonMLABackend.supported_dtypes
    assert {"auto", "bfloat16", "float16", "fp8"} <= set(AnySizeTritonMLABackend.supported_kv_cache_dtypes)


@pytest.mark.parametrize("layout", [(128, 64), (512, 64), (960, 64)], ids=str)
@pytest.mark.parametrize("heads", [1, 9, 32, 40])
def test_contexts_are_cut_no_more_than_keeps_the_gpu_busy(heads: int, layout: tuple[int, int]) -> None:
    """For every number of queries there are enough programs for the GPU's units, and the scratch stays small."""
    units, most = 132, 1024
    tiles = suited_tiles(*layout, heads, False, 227 << 10)
    for rows in range(1, most + 1):
        parts = suited_parts(rows, heads, tiles, units)
        assert rows * -(-heads // tiles.heads) * parts >= units, "units stand idle"
    assert scratch_rows(most, heads, tiles, units) * heads * (layout[0] + 1) * 4 <= 400e6, "bytes"


@pytest.mark.parametrize("ranks", [1, 2])
def test_scratch_is_reserved(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is reserved before vLLM sizes the cache is enough for every batch, once the workspace must not grow."""
    monkeypatch.setattr(gpu_backend, "shared_memory", lambda: 227 << 10)
    monkeypatch.setattr(gpu_backend, "current_platform", SimpleNamespace(num_compute_units=lambda: 132))
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)  # vLLM's workspace wants a GPU for it
    gpu_backend.gpu_tiles.cache_clear()
    impl = AnySizeTritonMLAImpl.__new__(AnySizeTritonMLAImpl)  # its constructor needs a GPU
    impl.num_heads, impl.dcp_world_size, impl.kv_lora_rank, impl.qk_rope_head_dim = 9, ranks, 128, 64
    impl.kv_cache_dtype, impl._sm_count = "auto", 132
    impl._vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=64), speculative_config=None)
    workspace.init_workspace_manager(torch.device("cpu"))
    try:
        impl.reserve_workspace()
        workspace.lock_workspace()
        for rows in range(1, 65):
            q_latent = torch.empty(rows, 9 * ranks, 128)  # vLLM gathers the heads of all ranks
            scratch = impl.make_scratch(q_latent, *impl.decode_tiles(9 * ranks))
            assert scratch.shape[:2] == (rows, 9 * ranks) and scratch.shape[3] == 129
        with pytest.raises(AssertionError, match=r"[Ww]orkspace"):
            impl.make_scratch(torch.empty(640, 9 * ranks, 128), *impl.decode_tiles(9 * ranks))
    finally:
        workspace.reset_workspace_manager()
        gpu_backend.gpu_tiles.cache_clear()


@pytest.mark.parametrize("case", ["context", "few-new-tokens"])
def test_earlier_context(case: str) -> None:
    """Merging chunks from pages gives attention to everything; vLLM's CPU prefill computes each chunk."""

    def make_impl(sizes: Sizes, dtype: torch.dtype) -> AnySizeTritonMLAImpl:
        impl = AnySizeTritonMLAImpl.__new__(AnySizeTritonMLAImpl)  # its constructor needs a GPU
        impl.kv_b_proj = Projection(sizes.latent, sizes.heads * (sizes.nope + sizes.v), bias=False, dtype=dtype)
        impl.kv_b_proj.weight.data.normal_(std=sizes.latent**-0.5)
        impl.num_heads, impl.kv_lora_rank, impl.qk_rope_head_dim = sizes.heads, sizes.latent, sizes.rope
        impl.qk_nope_head_dim, impl.v_head_dim, impl.scale = sizes.nope, sizes.v, sizes.v**-0.5
        impl.dcp_world_size, impl._use_flashinfer_concat_mla_k = 1, False
        return impl

    check_prefill(Sizes(latent=100, rope=28), torch.float32, *PREFILLS[case], make_impl, prefill_backend)


def prefill_backend(sizes: Sizes, scale: float) -> CPUSDPAMLAPrefillBackend:
    return CPUSDPAMLAPrefillBackend(
        sizes.heads, scale, sizes.latent, sizes.nope, sizes.rope, sizes.v, SimpleNamespace()
    )
