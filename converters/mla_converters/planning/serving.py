"""Which attention backends serve a cache layout, on which hardware."""

from mla_converters.latent.cache_size import CacheBudget
from vllm_mla_plugin.checkpoint.layouts import GPUS, gpu_backends


def serving_backends(layout: CacheBudget, head_dim: int, dtype: str) -> dict[str, list[str]]:
    """Backends by hardware, vLLM's first choice first. Hardware that does not serve the layout is left out.

    Args:
        layout: the sizes of the cache.
        head_dim: head size of the source.
        dtype: the dtype that the model is served in.
    """
    serving = {"CPU": ["any-size backend of this plugin"]}
    for gpu in GPUS:
        if names := gpu_backends((layout.kv_lora_rank, layout.qk_rope_head_dim), head_dim, dtype, gpu):
            serving[gpu] = names
    return serving
