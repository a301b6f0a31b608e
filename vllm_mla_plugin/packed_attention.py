"""vLLM's MLA attention layer with a packed cache, and when a layer has one."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat
from vllm_mla_plugin.latent_attention import LatentAttention

UNPACK = '{"latent_cache": null}'


def served_format(config: VllmConfig, layer: int) -> CacheFormat | None:
    """How a layer's cache is packed, or None if it is not: the checkpoint decides, and ``--kv-cache-dtype`` undoes it.

    Raises:
        ValueError: the cache is packed, but another dtype than the model's is asked for, or decode context parallelism.
    """
    format: CacheFormat | None = config.model_config.hf_text_config.cache_format(layer)
    if format is None:
        return None
    wanted, dtype = config.cache_config.cache_dtype, config.model_config.dtype
    if wanted != "auto":
        if STR_DTYPE_TO_TORCH_DTYPE.get(wanted) == dtype:
            return None
        raise ValueError(
            f"This checkpoint's cache is packed ({format.name}), so it is not kept as {wanted} too: leave "
            f"--kv-cache-dtype out, or give --hf-overrides '{UNPACK}' to have 16-bit numbers."
        )
    if config.parallel_config.decode_context_parallel_size > 1:
        raise ValueError(
            "Decode context parallelism does not take a packed cache yet: leave --decode-context-parallel-size out, or "
            f"give --hf-overrides '{UNPACK}'."
        )
    return format


class PackedMLAAttention(LatentAttention):
    """``LatentAttention`` whose cache has rows of bytes.

    vLLM allocates and hands on the cache as it would any other; only the backend reads it. To vLLM, the cache's dtype
    stays ``auto``: it must not take the bytes for numbers.

    Args:
        cache_format: of the rows.
        cache_mean: ``[2, latent + rope]`` float32, which is taken out of what is cached, or None.
        rope_freqs: ``[rope / 2]``, radians per position.
        max_position: how many positions there are.
        arguments: as for ``LatentAttention``.
    """

    def __init__(
        self,
        *,
        cache_format: CacheFormat,
        cache_mean: nn.Parameter | None,
        rope_freqs: nn.Parameter,
        max_position: int,
        **arguments: Any,
    ) -> None:
        for_the_backend = {"cache_mean": cache_mean, "rope_freqs": rope_freqs, "max_position": max_position}
        super().__init__(cache_format=cache_format, **for_the_backend, **arguments)
        self.cache_format = cache_format

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return replace(
            super().get_kv_cache_spec(vllm_config),
            dtype=torch.uint8,
            state_content_bytes=self.cache_format.bytes_per_token,
            cache_dtype_str=self.cache_format.name,
        )
