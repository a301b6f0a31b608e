"""vLLM's MLA attention layer, as this plugin's models have it."""

from dataclasses import replace
from typing import Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention import MLAAttention
from vllm.v1.kv_cache_interface import KVCacheSpec


class LatentAttention(MLAAttention):
    """``MLAAttention`` whose size may differ from other layers', and which merges the parts of a decode itself."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        # Later, vLLM tells the layers of a draft model the configuration of the model that it drafts for.
        self.sizes_differ: bool = get_current_vllm_config().model_config.hf_text_config.sizes_differ

    @property
    def merges_parts(self) -> bool:
        """Whether W_UV is there, in the model's dtype: on some GPUs vLLM keeps it in 8 or 4 bits instead."""
        return hasattr(self, "W_UV")

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """As vLLM's, but different for different splits of one width, because layers of equal specs share a builder of
        metadata, which takes its sizes from the first of them."""
        spec = super().get_kv_cache_spec(vllm_config)
        if not self.sizes_differ:
            return spec
        return replace(spec, cache_dtype_str=f"{self.kv_cache_dtype}:{self.kv_lora_rank}+{self.qk_rope_head_dim}")

    def _v_up_proj(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """As vLLM's, or for the :class:`vllm_mla_plugin.backends.gpu_merge.Parts` that a backend left as they are."""
        if isinstance(x, torch.Tensor):
            super()._v_up_proj(x, out)
        else:
            x.project(self.W_UV, out)
