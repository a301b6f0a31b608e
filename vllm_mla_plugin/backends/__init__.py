"""MLA attention backends for the sizes that vLLM's own do not serve, and the choice between them."""

from collections.abc import Sequence

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.mla.prefill.base import MLADimensions, MLAPrefillBackend
from vllm.v1.attention.backends.mla.prefill.selector import get_mla_prefill_backend

from vllm_mla_plugin.backends.context_parallel import refuse_context_parallel
from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat
from vllm_mla_plugin.checkpoint.layouts import MAX_PREFILL_HEAD_SIZE, VLLM_FP8_LAYOUTS, VLLM_LAYOUTS, packed_tiles


def select_backend(latent: int, rope: int, format: CacheFormat | None = None) -> type[AttentionBackend] | None:
    """The decode backend of a layer, or None to let vLLM choose among its own.

    vLLM's CPU backend decodes 512 + 64 numbers per token and nothing else, so on CPU ours serves every size. Where
    layers differ in size, ours serves all of them, because vLLM's own check every layer's metadata against the largest
    size of the model.

    Args:
        latent: ``kv_lora_rank`` of the layer.
        rope: its ``qk_rope_head_dim``.
        format: how its cache is packed; None if it is not.

    Raises:
        ValueError: no GPU kernel takes the sizes or the dtypes; or nothing serves packed rows, or decode context
            parallelism, on this device.
    """
    if format is not None:
        return _select_packed_backend(format)
    config = get_current_vllm_config()
    refuse_context_parallel(config, latent)
    if current_platform.is_cpu():
        _refuse_other_dtypes(config)
        from vllm_mla_plugin.backends.cpu import AnySizeCPUMLABackend

        return AnySizeCPUMLABackend
    if not current_platform.is_cuda_alike():
        return None
    cache_dtype, differ = config.cache_config.cache_dtype, config.model_config.hf_text_config.sizes_differ
    if not differ and (latent, rope) in (VLLM_FP8_LAYOUTS if cache_dtype.startswith("fp8") else VLLM_LAYOUTS):
        return None
    _refuse_float32(config)
    from vllm_mla_plugin.backends.gpu import AnySizeTritonMLABackend, gpu_tiles

    _refuse_other_dtypes(config, AnySizeTritonMLABackend.supported_kv_cache_dtypes)
    gpu_tiles(latent, rope, 1, cache_dtype)  # refuses sizes before weights are loaded
    if differ:
        _let_backends_write_the_cache(config)  # the compiler's pass knows the sizes of the first layer alone
    return AnySizeTritonMLABackend


def _select_packed_backend(format: CacheFormat) -> type[AttentionBackend]:
    if current_platform.is_cpu():
        from vllm_mla_plugin.backends.cpu_packed import PackedCPUMLABackend

        return PackedCPUMLABackend
    if not current_platform.is_cuda_alike():
        raise ValueError(
            f"Only CPUs, and GPUs with CUDA or ROCm, serve this checkpoint's packed cache ({format.name}): give "
            "--hf-overrides '{\"latent_cache\": null}' to serve it with a cache of 16-bit numbers."
        )
    config = get_current_vllm_config()
    _refuse_float32(config)
    from vllm_mla_plugin.backends.gpu import shared_memory
    from vllm_mla_plugin.backends.gpu_packed import PackedTritonMLABackend

    packed_tiles(format, shared_memory())  # refuses sizes before weights are loaded
    _let_backends_write_the_cache(config)  # the compiler's pass would write 16-bit numbers
    return PackedTritonMLABackend


def _let_backends_write_the_cache(config: VllmConfig) -> None:
    """Switch a pass of vLLM's compiler off that writes into the cache itself, past the backend."""
    if hasattr(config.compilation_config.pass_config, "fuse_rope_kvcache_cat_mla"):
        config.compilation_config.pass_config.fuse_rope_kvcache_cat_mla = False


def _refuse_other_dtypes(config: VllmConfig, fp8_among: Sequence[str] = ()) -> None:
    """Refuse a dtype of the cache that a backend of ours does not read; vLLM does not ask one that is given to a layer.

    Args:
        fp8_among: dtypes of which the backend takes those of 8 bits, beside the model's own.
    """
    own = str(config.model_config.dtype).removeprefix("torch.")
    served = ("auto", own, *(name for name in fp8_among if name.startswith("fp8")))
    if (wanted := config.cache_config.cache_dtype) not in served:
        raise ValueError(
            f"The plugin keeps this cache as {', '.join(served)} here, not as {wanted}: give another --kv-cache-dtype, "
            "or leave it out."
        )


def _refuse_float32(config: VllmConfig) -> None:
    if (dtype := config.model_config.dtype) == torch.float32:
        raise ValueError(f"vLLM's GPU kernels for MLA take 16-bit numbers, not {dtype}: give --dtype bfloat16.")


def select_prefill_backend(dims: MLADimensions) -> type[MLAPrefillBackend] | None:
    """The prefill backend of a layer, or None to let vLLM choose. Ours serves where vLLM has none, and where layers
    differ in size, because vLLM chooses one for the largest size of the model.

    Raises:
        ValueError: nothing on this GPU takes heads of these sizes; or the user's choice does not take all layers.
    """
    config = get_current_vllm_config()
    if not current_platform.is_cuda_alike():
        return None
    differ, wanted = config.model_config.hf_text_config.sizes_differ, config.attention_config.mla_prefill_backend
    if wanted is not None:
        if differ and not wanted.get_class().supports_mla_dimensions(dims):  # vLLM checks the largest size
            raise ValueError(
                f"The prefill backend {wanted.name} does not take heads of {dims}, which a layer of this checkpoint "
                "has: leave mla_prefill_backend out, and the plugin chooses one for every layer."
            )
        return None
    if not differ and _vllm_has_one(config):
        return None
    from vllm_mla_plugin.backends.gpu_prefill import AnySizeFlashAttnPrefillBackend

    if not AnySizeFlashAttnPrefillBackend.supports_mla_dimensions(dims):
        raise ValueError(
            f"On a GPU, prefill takes heads of at most {MAX_PREFILL_HEAD_SIZE} numbers, but this checkpoint's have "
            f"{dims}: convert with a smaller --qk-rope-head-dim."
        )
    return AnySizeFlashAttnPrefillBackend


def _vllm_has_one(config: VllmConfig) -> bool:
    try:
        get_mla_prefill_backend(config)
    except ValueError:
        return False
    return True
