"""Prefill of a backend's implementation against attention in float64."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonBaseImpl,
    MLACommonPrefillMetadata,
    build_mla_chunked_context_metadata,
)
from vllm.v1.attention.backends.mla.prefill.base import MLAPrefillBackend

from vllm_mla_plugin.testing.cpu import make_impl
from vllm_mla_plugin.testing.layer import Sizes, cached_tokens, make_cache, reference

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
PREFILLS = {
    "no-context": ([0, 0, 0, 0], [1, 300, 16, 77]),
    "context": ([32, 0, 520, 1500], [200, 40, 1, 31]),
    "few-new-tokens": ([900, 16, 400], [3, 1, 2]),
}


def assert_close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    error = (got.double() - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE[dtype], f"relative error {error:.1e}"


def check_prefill(
    sizes: Sizes,
    dtype: torch.dtype,
    contexts: list[int],
    lengths: list[int],
    make: Callable[[Sizes, torch.dtype], MLACommonBaseImpl] = make_impl,
    make_prefill: Callable[[Sizes, float], MLAPrefillBackend] | None = None,
) -> None:
    """``forward_mha`` of an implementation; vLLM's metadata builder and, where it uses one, prefill backend."""
    torch.manual_seed(0)
    impl = make(sizes, dtype)
    cache, table = make_cache(sizes, [c + n for c, n in zip(contexts, lengths, strict=True)], dtype)
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    width = sizes.latent + sizes.rope
    chunked = build_mla_chunked_context_metadata(
        context_lens_cpu=torch.tensor(contexts, dtype=torch.int32),
        prefill_query_start_loc_cpu=starts,
        chunked_prefill_workspace=torch.empty(1024, width, dtype=dtype),
        chunked_prefill_workspace_size=1024,
        block_size=sizes.block,
        align_chunk_to_block=True,
        device=torch.device("cpu"),
        dcp_world_size=1,
        dcp_local_block_size=1,
        dcp_virtual_block_size=1,
    )
    prefill = MLACommonPrefillMetadata(table, starts, max(lengths), chunked)
    if make_prefill is not None:
        prefill.prefill_backend = make_prefill(sizes, impl.scale)
        prefill.prefill_backend.prepare_metadata(prefill)
    q = torch.randn(sum(lengths), sizes.heads, sizes.nope + sizes.rope, dtype=dtype)
    everything = [
        cached_tokens(cache, table[i], context + length)
        for i, (context, length) in enumerate(zip(contexts, lengths, strict=True))
    ]
    new = torch.cat([x[context:] for x, context in zip(everything, contexts, strict=True)]).to(dtype)
    latent, k_rope = new.split([sizes.latent, sizes.rope], dim=-1)
    output = torch.empty(len(q), sizes.heads * sizes.v, dtype=dtype)
    metadata = SimpleNamespace(prefill=prefill)
    impl.forward_mha(q, latent, k_rope[:, None], cache, metadata, None, output)
    weight = impl.kv_b_proj.weight.double().view(sizes.heads, sizes.nope + sizes.v, sizes.latent)
    for i, cached in enumerate(everything):
        tokens = slice(int(starts[i]), int(starts[i + 1]))
        kv = torch.einsum("tl,hdl->thd", cached[:, : sizes.latent], weight)
        rope = cached[:, None, sizes.latent :].expand(-1, sizes.heads, -1)
        k = torch.cat((kv[..., : sizes.nope], rope), dim=-1)
        expected = reference(q[tokens], k, kv[..., sizes.nope :], impl.scale).flatten(1)
        assert_close(output[tokens], expected, dtype)
