"""What of the GPU backend can be checked without a GPU: vLLM's decode kernel in Triton's interpreter, and the gather.

``tests/gpu`` has the rest.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_backend_cpu import PREFILLS, Projection, Sizes, check_prefill
from vllm.v1.attention.backends.mla.prefill.cpu_sdpa import CPUSDPAMLAPrefillBackend

from vllm_mla_plugin.backends.gpu import AnySizeTritonMLAImpl, decode_width, split_units

pytest.importorskip("triton", reason="without Triton, vLLM has no such kernel")

LAYOUTS = [(128, 64), (100, 28), (384, 64), (448, 128), (256, 320), (500, 76), (128, 160), (120, 8), (48, 6), (8, 64)]


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    """Largest error of each layout, with 1 and with 9 heads."""
    cases = [(heads, *layout) for layout in LAYOUTS for heads in (1, 9)]
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("interpreted_kernel.py"), json.dumps(cases)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("heads", [1, 9])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_decode_kernel_takes_every_layout(errors: dict[str, float], layout: tuple[int, int], heads: int) -> None:
    """With the width that we give it, vLLM's kernel is right for sizes that are no power of two."""
    assert errors[str((heads, *layout))] < 1e-5


def test_tiles_are_wide_enough() -> None:
    """Triton's products need 16 columns on a GPU, which its interpreter does not check: wide tiles where one is not."""
    assert decode_width(512, 64) == 512 and decode_width(100, 28) == 100 and decode_width(100, 9) == 100
    assert decode_width(120, 8) == 128 and decode_width(8, 64) == 72 and decode_width(64, 0) == 64


@pytest.mark.parametrize("layout", [(544, 32), (280, 8)], ids=str)
def test_layouts_that_no_tile_fits(layout: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="cannot split"):
        decode_width(*layout)


def test_a_latent_too_wide_for_any_gpu() -> None:
    with pytest.raises(ValueError, match="smaller --kv-lora-rank"):
        decode_width(4032, 64)


@pytest.mark.parametrize("heads", [1, 9, 32, 40])
def test_contexts_are_split_no_more_than_keeps_the_gpu_busy(heads: int) -> None:
    """However many queries: enough programs for every SM, and scratch that stays small."""
    units = 132
    for queries in range(1, 1025):
        parts = 2 * split_units(queries, heads, units)
        assert parts & (parts - 1) == 0, "another number would compile another kernel"
        assert queries * -(-heads // 16) * parts >= units, "SMs stand idle"
        assert queries * heads * parts * 1025 * 4 <= 400e6, "bytes of scratch at 960 + 64"


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
