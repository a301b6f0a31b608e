"""What of the GPU backend can be checked without a GPU: the decode kernel in Triton's interpreter, and the gather.

``tests/gpu`` has the rest.
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from support.attention import PREFILLS, check_prefill
from support.backend_cpu import Projection, Sizes
from support.files import ROOT
from vllm.v1.attention.backends.mla.prefill.cpu_sdpa import CPUSDPAMLAPrefillBackend

from vllm_mla_plugin.backends.gpu import AnySizeTritonMLAImpl, scratch_rows
from vllm_mla_plugin.backends.gpu_decode import suited_parts, suited_tiles

pytest.importorskip("triton", reason="without Triton, vLLM has no such kernel")

LAYOUTS = [(128, 64), (100, 28), (448, 64), (448, 128), (256, 320), (500, 76), (120, 8), (48, 6), (8, 64), (64, 0)]
# heads, latent, rope, newest tokens that ask, whether they do not see each other's future
CASES = [
    *((9, *layout, 1, True) for layout in LAYOUTS),
    *((heads, 128, 64, queries, causal) for heads in (1, 40) for queries, causal in ((1, True), (3, True), (3, False))),
]


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    """Largest error of each case."""
    result = subprocess.run(
        [sys.executable, "-m", "support.interpreted_kernel", json.dumps(CASES)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_kernel(errors: dict[str, float], case: tuple) -> None:
    """Right for every layout and number of heads, and for several new tokens of a request at once."""
    assert errors[str(case)] < 1e-5


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("kib", [99, 163, 227])
@pytest.mark.parametrize("heads", [1, 9, 32, 40])
def test_tiles_fit(heads: int, kib: int, fp8: bool) -> None:
    """Every layout's tiles hold its rows, are sizes that Triton takes, and fit the GPU."""
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


@pytest.mark.parametrize("layout", [(128, 64), (512, 64), (960, 64)], ids=str)
@pytest.mark.parametrize("heads", [1, 9, 32, 40])
def test_contexts_are_cut_no_more_than_keeps_the_gpu_busy(heads: int, layout: tuple[int, int]) -> None:
    """However many queries: enough programs for the GPU's units, and scratch that stays small."""
    units, most = 132, 1024
    tiles = suited_tiles(*layout, heads, False, 227 << 10)
    for rows in range(1, most + 1):
        parts = suited_parts(rows, heads, tiles, units)
        assert rows * -(-heads // tiles.heads) * parts >= units, "units stand idle"
    assert scratch_rows(most, heads, tiles, units) * heads * (layout[0] + 1) * 4 <= 400e6, "bytes"


@pytest.mark.parametrize("case", ["context", "few-new-tokens"])
def test_earlier_context(case: str) -> None:
    """Chunks gathered from pages and merged give attention to everything; per chunk, vLLM's CPU prefill attends."""

    def make_impl(sizes: Sizes, dtype: torch.dtype) -> AnySizeTritonMLAImpl:
        impl = AnySizeTritonMLAImpl.__new__(AnySizeTritonMLAImpl)  # its constructor asks for a GPU
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
