"""Rotation of queries on CPUs, by vLLM's kernel where it can."""

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config

from vllm_mla_plugin.rope import FrequencyRotaryEmbedding

POSITIONS = 300


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rope", [2, 12, 16, 20, 40, 48, 64, 192])
def test_rotated_queries(rope: int, dtype: torch.dtype) -> None:
    """Every size is rotated as complex numbers are; vLLM's kernel alone ends the process at some of these."""
    generator = torch.Generator().manual_seed(0)
    freqs = torch.rand(rope // 2, generator=generator)
    positions = torch.randint(POSITIONS, (17,), generator=generator)
    queries = torch.randn(17, 3, rope, generator=generator).to(dtype)
    turns = torch.polar(torch.ones(17, 1, rope // 2), positions[:, None, None] * freqs)
    expected = torch.complex(*queries.float().chunk(2, dim=-1)) * turns
    with set_current_vllm_config(VllmConfig()):
        embedding = FrequencyRotaryEmbedding(freqs, POSITIONS, dtype)
    rotated = embedding.rotated_queries(positions, queries)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        rotated.float(), torch.cat((expected.real, expected.imag), dim=-1), rtol=0, atol=max(tolerance, 1e-4)
    )
