"""MLA attention backends for latent sizes that vLLM's own do not serve."""

from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend


def select_backend() -> type[AttentionBackend] | None:
    """The backend of a converted layer, or None to let vLLM choose.

    vLLM's CPU backend decodes 512 + 64 numbers per token and nothing else, so on CPU ours serves
    every size. Elsewhere vLLM chooses among its own.
    """
    if not current_platform.is_cpu():
        return None
    from vllm_mla_plugin.backends.cpu import AnySizeCPUMLABackend

    return AnySizeCPUMLABackend
