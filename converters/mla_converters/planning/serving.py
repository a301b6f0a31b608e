"""Which attention backends serve a cache, on which hardware."""

from mla_converters.methods.asked_cache import AskedCache
from vllm_mla_plugin.checkpoint.layouts import GPUS, gpu_backends

CPU = "CPU"


def serving_backends(cache: AskedCache, nope_dim: int, dtype: str, differ: bool = False) -> dict[str, list[str]]:
    """Backends by hardware, vLLM's first choice first. Hardware that does not serve the cache is left out.

    Args:
        cache: its sizes, and how it is packed.
        nope_dim: ``qk_nope_head_dim`` of the converted model.
        dtype: the dtype that the model is served in.
        differ: whether layers differ in size; the cache's sizes are then those of a typical one.
    """
    serving = {CPU: ["any-size backend of this plugin"]}
    for gpu in GPUS:
        layout = (cache.budget.kv_lora_rank, cache.budget.qk_rope_head_dim)
        if names := gpu_backends(layout, nope_dim, dtype, gpu, cache.format, differ):
            serving[gpu] = names
    return serving
