"""vLLM's CPU platform. For this plugin's models it leaves chunked prefill, prefix caching and the block size alone.

vLLM switches the first two off for every MLA model on CPU, because its own CPU backend cannot attend to earlier context
in prefill. Ours can. A platform plugin is the only place that comes after that decision.
"""

from typing import TYPE_CHECKING

from vllm.platforms.cpu import CpuPlatform

from vllm_mla_plugin.checkpoint.families import FAMILIES

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class MLACpuPlatform(CpuPlatform):
    """The CPU platform; nothing changes for other models."""

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
        chunked, tokens, cached, block_size = (
            scheduler.enable_chunked_prefill,
            scheduler.max_num_batched_tokens,
            cache.enable_prefix_caching,
            cache.block_size,
        )
        super().check_and_update_config(vllm_config)
        model = vllm_config.model_config
        if model is not None and model.hf_config.model_type in {family.mla_model_type for family in FAMILIES.values()}:
            scheduler.enable_chunked_prefill = chunked
            scheduler.max_num_batched_tokens = tokens
            cache.enable_prefix_caching = cached
            # vLLM makes it 16, or 128 where AMX is. Ours takes any: what a user asks for, or what the model needs for
            # which this one drafts.
            cache.block_size = block_size
