"""vLLM's CPU platform, which leaves chunked prefill and prefix caching on for the models of this plugin.

vLLM switches both off for every MLA model on CPU, because its own CPU backend cannot attend to earlier context in
prefill. Ours can. A platform plugin is the only place that comes after that decision.
"""

from typing import TYPE_CHECKING

from vllm.platforms.cpu import CpuPlatform

from vllm_mla_plugin.checkpoint.families import FAMILIES

if TYPE_CHECKING:
    from vllm.config import VllmConfig


BLOCK_SIZE = 16
"""Tokens in a block of the cache. Prefixes rarely are multiples of much more."""


class MLACpuPlatform(CpuPlatform):
    """The CPU platform; nothing changes for other models."""

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
        chunked, tokens, cached = (
            scheduler.enable_chunked_prefill,
            scheduler.max_num_batched_tokens,
            cache.enable_prefix_caching,
        )
        super().check_and_update_config(vllm_config)
        model = vllm_config.model_config
        if model is not None and model.hf_config.model_type in {family.mla_model_type for family in FAMILIES.values()}:
            scheduler.enable_chunked_prefill = chunked
            scheduler.max_num_batched_tokens = tokens
            cache.enable_prefix_caching = cached
            if not cache.user_specified_block_size:
                cache.block_size = BLOCK_SIZE  # where AMX is, vLLM has made it 128
