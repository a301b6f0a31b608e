"""MLA prefill on CPU by vLLM's kernel for extending sequences, which takes all requests of a batch at once.

The kernel (``extend_attention_cpu``) exists in builds for x86 with AVX-512, for bfloat16. It attends to cached tokens
without a mask, wherever they lie, and to the new tokens causally. Keys and values come from a kernel of ours.
"""

import ctypes

import torch
import torch.nn.functional as F
from vllm import _custom_ops as ops

from vllm_mla_plugin.backends.cpu_kernel import compile_library

MULTIPLE = 32
"""The kernel takes head sizes that are multiples of this."""


LANES, VECTORS = 16, 4
"""Results in a vector, and vectors in a block, as in ``cpu_expand.cpp``."""


class ExpandKernel:
    """Keys and values of all heads from latents.

    Args:
        w_uk: ``[heads, nope, latent]``.
        w_uv: ``[heads, v, latent]``.
        rope: size of the rotary key.
        library: what :func:`compile_expansion` made for these sizes.
    """

    def __init__(self, w_uk: torch.Tensor, w_uv: torch.Tensor, rope: int, library: ctypes.CDLL) -> None:
        self._sizes = (len(w_uk), w_uk.shape[1] + rope, w_uv.shape[1])
        self._expand = library.expand
        self._expand.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64]
        self._expand.restype = None
        own, values = (F.pad(w, (0, w.shape[-1] % 2, 0, -w.shape[1] % LANES)) for w in (w_uk, w_uv))
        vectors = torch.cat((own, values), dim=1).flatten(0, 1).unflatten(0, (-1, LANES)).unflatten(-1, (-1, 2))
        vectors = vectors.transpose(1, 2)  # [vectors, pairs of the latent, LANES, 2]
        self._weight = F.pad(vectors, (0, 0, 0, 0, 0, 0, 0, -len(vectors) % VECTORS)).contiguous()

    def __call__(self, cached: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys ``[tokens, heads, nope + rope]`` and values ``[tokens, heads, v]`` of ``[tokens, latent + rope]``."""
        heads, key, value = self._sizes
        cached = cached.contiguous()
        k, v = (cached.new_empty(len(cached), heads, size) for size in (key, value))
        self._expand(*(tensor.data_ptr() for tensor in (cached, self._weight, k, v)), len(cached))
        return k, v


def compile_expansion(heads: int, latent: int, rope: int, nope: int, value: int) -> ctypes.CDLL | None:
    """The library of :class:`ExpandKernel`; see :func:`vllm_mla_plugin.backends.cpu_kernel.compile_library`."""
    sizes = {"HEADS": heads, "LATENT": latent, "ROPE": rope, "NOPE": nope, "VALUE": value}
    options = tuple(f"-D{name}={size}" for name, size in sizes.items())
    return compile_library("cpu_expand.cpp", torch.bfloat16, options)


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
