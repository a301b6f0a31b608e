"""MLA prefill on CPU by vLLM's kernel for extending sequences, which takes all requests of a batch at once.

The kernel (``extend_attention_cpu``) exists in builds for x86 with AVX-512, for bfloat16. It attends to cached tokens
without a mask, wherever they lie, and to the new tokens causally.
"""

import torch
import torch.nn.functional as F
from vllm import _custom_ops as ops

MULTIPLE = 32
"""The kernel takes head sizes that are multiples of this."""


def has_extend_kernel(dtype: torch.dtype) -> bool:
    """Whether vLLM's kernel runs here."""
    return (
        dtype == torch.bfloat16
        and hasattr(torch.ops._C, "extend_attention_cpu")
        and torch.cpu._is_avx512_bf16_supported()
    )


def extend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor,
    contexts: torch.Tensor,
    cached_k: torch.Tensor,
    cached_v: torch.Tensor,
    slots: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention of the new tokens of some requests.

    Args:
        q: ``[tokens, heads, size]``, request after request.
        k: ``[tokens, kv heads, size]`` of the same tokens.
        v: ``[tokens, kv heads, value size]``.
        starts: ``[requests + 1]`` int32, the position where each request's tokens begin.
        contexts: ``[requests]`` int32, how many cached tokens each request has.
        cached_k, cached_v: ``[anything, kv heads, size]`` and ``[…, value size]``.
        slots: ``[requests, >= longest context]`` int32, the rows of ``cached_k`` and ``cached_v`` that hold a
            request's tokens.
        scale: factor on the scores.

    Returns:
        ``[tokens, heads, value size]``.
    """
    value_size = v.shape[-1]
    q, k, v, cached_k, cached_v = (_padded(x) for x in (q, k, v, cached_k, cached_v))
    lengths = starts.diff()
    totals = (contexts + lengths).long()
    # The kernel wants a slot for every token, even for the new ones, whose slots it does not read.
    slots = F.pad(slots, (0, max(0, int(totals.max()) - slots.shape[1]))).contiguous()
    output = q.new_empty(*q.shape[:2], v.shape[-1])
    ops.cpu_mla_extend(
        q,
        k,
        v,
        output,
        cached_k,
        cached_v,
        slots,
        torch.arange(len(lengths)),
        totals,
        lengths,
        starts[:-1],
        int(lengths.max()),
        scale,
        0.0,  # no cap on the scores
        False,
        0,  # no sliding window
        None,
        None,
    )
    return output[..., :value_size]


def _padded(x: torch.Tensor) -> torch.Tensor:
    return F.pad(x, (0, -x.shape[-1] % MULTIPLE)) if x.shape[-1] % MULTIPLE else x
