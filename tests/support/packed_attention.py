"""A backend's implementation on packed rows, against attention in float64."""

from types import SimpleNamespace
from typing import Any

import torch
from support.packed import as_read, fill_cache
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonPrefillMetadata,
    build_mla_chunked_context_metadata,
)

from vllm_mla_plugin.testing.layer import Sizes, reference

TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
LENGTHS = [1, 31, 32, 33, 1024, 1025, 2100, 5]
PREFILLS = {
    "no-context": ([0, 0, 0, 0], [1, 300, 16, 77]),
    "context": ([32, 0, 520, 1500], [200, 40, 1, 31]),
    "few-new-tokens": ([900, 16, 400], [3, 1, 2]),
}


def assert_close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    error = (got.double() - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE[dtype], f"relative error {error:.1e}"


def projection_error(parts: Any, merged: torch.Tensor, values: int = 40) -> float:
    """The largest error of merging together with the product with W_UV, against the product of what merging alone gave.

    Args:
        parts: :class:`vllm_mla_plugin.backends.gpu_merge.Parts`.
        merged: ``[rows, heads, latent]``.
        values: ``v_head_dim``.
    """
    rows, heads, latent = merged.shape
    # As in vLLM, W_UV is a part of kv_b_proj's weight, and its latent is what lies side by side in memory.
    kv_b_proj = torch.randn(heads, 5 + values, latent, dtype=merged.dtype) / latent**0.5
    weight = kv_b_proj[:, 5:].transpose(1, 2)
    out = torch.full((rows, heads * values + 8), float("nan"), dtype=merged.dtype)[:, : heads * values]
    parts.project(weight, out)
    expected = torch.einsum("bhl,hlv->bhv", merged.double(), weight.double()).flatten(1)
    return (out - expected).abs().max().item()


def check_decode(impl: Any, sizes: Sizes, dtype: torch.dtype, lengths: list[int] = LENGTHS) -> None:
    """``forward_mqa``, with one query for each sequence."""
    cache, table, sequences = fill_cache(impl, sizes, lengths, dtype)
    q = torch.randn(len(lengths), sizes.heads, sizes.latent + sizes.rope, dtype=dtype) / 4
    decode = SimpleNamespace(block_table=table, seq_lens=torch.tensor(lengths, dtype=torch.int32))
    parts = q.split([sizes.latent, sizes.rope], dim=-1)
    got, _ = impl.forward_mqa(parts, cache, SimpleNamespace(decode=decode, causal=True), None)
    for i, new in enumerate(sequences):
        keys = as_read(impl, new)[:, None].expand(-1, sizes.heads, -1)
        expected = reference(q[i : i + 1], keys, keys[..., : sizes.latent], impl.scale)
        assert_close(got[i : i + 1], expected, dtype)


def check_prefill(
    impl: Any, sizes: Sizes, dtype: torch.dtype, contexts: list[int], lengths: list[int], backend: Any = None
) -> None:
    """``forward_mha``, with a prefill backend of vLLM if the implementation wants one."""
    totals = [context + length for context, length in zip(contexts, lengths, strict=True)]
    cache, table, sequences = fill_cache(impl, sizes, totals, dtype)
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    chunked = build_mla_chunked_context_metadata(
        context_lens_cpu=torch.tensor(contexts, dtype=torch.int32),
        prefill_query_start_loc_cpu=starts,
        chunked_prefill_workspace=torch.empty(1024, sizes.latent + sizes.rope, dtype=dtype),
        chunked_prefill_workspace_size=1024,
        block_size=sizes.block,
        align_chunk_to_block=True,
        device=torch.device("cpu"),
        dcp_world_size=1,
        dcp_local_block_size=1,
        dcp_virtual_block_size=1,
    )
    prefill = MLACommonPrefillMetadata(table, starts, max(lengths), chunked)
    if backend is not None:
        prefill.prefill_backend = backend
        backend.prepare_metadata(prefill)
    q = torch.randn(sum(lengths), sizes.heads, sizes.nope + sizes.rope, dtype=dtype) / 4
    new = torch.cat([x[context:] for x, context in zip(sequences, contexts, strict=True)])
    latent, k_rope = new.split([sizes.latent, sizes.rope], dim=-1)
    output = torch.empty(len(q), sizes.heads * sizes.v, dtype=dtype)
    impl.forward_mha(q, latent, k_rope[:, None], cache, SimpleNamespace(prefill=prefill), None, output)
    weight = impl.kv_b_proj.weight.double().view(sizes.heads, sizes.nope + sizes.v, sizes.latent)
    for i, sequence in enumerate(sequences):
        tokens, cached = slice(int(starts[i]), int(starts[i + 1])), as_read(impl, sequence)
        kv = torch.einsum("tl,hdl->thd", cached[:, : sizes.latent], weight)
        rope = cached[:, None, sizes.latent :].expand(-1, sizes.heads, -1)
        k = torch.cat((kv[..., : sizes.nope], rope), dim=-1)
        expected = reference(q[tokens], k, kv[..., sizes.nope :], impl.scale).flatten(1)
        assert_close(output[tokens], expected, dtype)
