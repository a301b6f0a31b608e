"""The CPU backend of one layer."""

import torch
from vllm.platforms import current_platform

from vllm_mla_plugin.backends.cpu import AnySizeCPUMLAImpl
from vllm_mla_plugin.testing.layer import Projection, Sizes, impl_arguments


def make_impl(sizes: Sizes, dtype: torch.dtype) -> AnySizeCPUMLAImpl:
    """The backend's implementation for a layer with a random up-projection ``kv_b_proj``."""
    current_platform.import_kernels()  # as vLLM's workers do at their start
    kv_b_proj = Projection(sizes.latent, sizes.heads * (sizes.nope + sizes.v), bias=False, dtype=dtype)
    kv_b_proj.weight.data.normal_(std=sizes.latent**-0.5)
    impl = AnySizeCPUMLAImpl(**impl_arguments(sizes, kv_b_proj))
    impl.process_weights_after_loading(dtype)
    return impl
