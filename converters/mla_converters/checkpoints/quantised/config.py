"""``quantization_config``: which formats are read, and what OUT's says."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from mla_converters.checkpoints.quantised.weights import AWQ, BLOCKS, GPTQ, PACKED, SCALED, Groups, WeightFormat
from mla_converters.errors import ConversionError

COMPRESSED = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense")
"""The formats of compressed-tensors that are read."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
"""The attention's projections in OUT, and the source's, of which vLLM wants that all or none are quantised."""
ATTENTION = ".self_attn."
KV_CACHE = "kv_cache_scheme"


@dataclass(frozen=True)
class Quantisation:
    """How a source is quantised.

    Attributes:
        method: ``quant_method`` of its configuration.
        formats: of its weights, in the order in which they are looked for.
        groups: see :class:`mla_converters.checkpoints.quantised.weights.Groups`.
        settings: the whole ``quantization_config``.
    """

    method: str
    formats: tuple[WeightFormat, ...]
    groups: Groups
    settings: dict[str, Any]

    def carried(self, layers: int) -> dict[str, Any]:
        """OUT's ``quantization_config``: the source's, in which the attention is not quantised.

        Args:
            layers: of the model.
        """
        kept = {name: value for name, value in self.settings.items() if name != KV_CACHE}
        return kept | METHODS[self.method].ignored(self.settings, layers)

    @property
    def warnings(self) -> list[str]:
        """Sentences for the user."""
        if not self.settings.get(KV_CACHE):
            return []
        return [
            "The source has scales for a KV cache of 8 bits, which a latent does not need: OUT leaves them out, and is "
            "served with a cache as --latent-bits or vLLM's --kv-cache-dtype say."
        ]


@dataclass(frozen=True)
class _Method:
    formats: tuple[WeightFormat, ...]
    ignored: Callable[[dict[str, Any], int], dict[str, Any]]
    """The keys that say which modules are not quantised, from those of the source and the number of layers."""


def find_quantisation(config: dict[str, Any]) -> Quantisation | None:
    """How a model is quantised, by its ``config.json``; None if it is not.

    Raises:
        ConversionError: its format is not read.
    """
    settings = config.get("quantization_config")
    if not settings:
        return None
    method = settings.get("quant_method", "unknown") if isinstance(settings, dict) else settings
    if not isinstance(settings, dict) or method not in METHODS:
        raise _refused(f"{method}")
    if (reason := _unread(method, settings)) is not None:
        raise _refused(f"{method}, {reason}")
    offset = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    return Quantisation(method, METHODS[method].formats, Groups(tuple(_group_sizes(settings)), offset), settings)


def _refused(what: str) -> ConversionError:
    return ConversionError(
        f"The source's weights are quantised ({what}): convert the unquantised model and quantise after."
    )


def _unread(method: str, settings: dict[str, Any]) -> str | None:
    """What is not read of a configuration of a known method; None if all is."""
    if method == "compressed-tensors":
        groups = settings.get("config_groups")
        formats = [settings.get("format")]
        formats += [group.get("format") for group in groups.values() if isinstance(group, dict)] if groups else []
        unread = [f"format {name}" for name in formats if name is not None and name not in COMPRESSED]
        unread += [key for key in ("sparsity_config", "transform_config") if settings.get(key)]
        return unread[0] if unread else None
    if method == "gptq" and settings.get("checkpoint_format", "gptq") not in ("gptq", "gptq_v2"):
        return f"checkpoint_format {settings['checkpoint_format']}"
    if method == "awq" and str(settings.get("version", "gemm")).lower() != "gemm":
        return f"version {settings['version']}"
    return None


def _group_sizes(settings: Any) -> Iterable[int]:
    """Every size of a group or of a block that a configuration names, however deep."""
    if isinstance(settings, dict):
        for name, value in settings.items():
            sizes = value if isinstance(value, list) else [value]
            if name in ("group_size", "q_group_size", "weight_block_size", "block_structure"):
                yield from (size for size in sizes if type(size) is int)
            else:
                yield from _group_sizes(value)


def _ignored_fp8(settings: dict[str, Any], layers: int) -> dict[str, Any]:
    # vLLM compares whole names.
    name = "ignored_layers" if settings.get("ignored_layers") else "modules_to_not_convert"
    attention = [f"model.layers.{index}{ATTENTION}{part}" for index in range(layers) for part in PROJECTIONS]
    return {name: [*_others(settings.get(name)), *attention]}


def _ignored_compressed(settings: dict[str, Any], layers: int) -> dict[str, Any]:
    return {"ignore": [*_others(settings.get("ignore")), r"re:.*\.self_attn\..*"]}


def _ignored_gptq(settings: dict[str, Any], layers: int) -> dict[str, Any]:
    # The first expression that matches a module counts.
    ignored: dict[str, Any] = {"dynamic": {r"-:.*\.self_attn\..*": {}, **(settings.get("dynamic") or {})}}
    if listed := settings.get("modules_in_block_to_quantize"):
        blocks = [[name for name in block if not name.startswith("self_attn.")] for block in listed]
        ignored["modules_in_block_to_quantize"] = [block for block in blocks if block]
    return ignored


def _ignored_awq(settings: dict[str, Any], layers: int) -> dict[str, Any]:
    # Parts of names count.
    return {"modules_to_not_convert": [*(settings.get("modules_to_not_convert") or ()), "self_attn"]}


def _others(names: list[str] | None) -> list[str]:
    """Ignored modules outside the attention."""
    return [name for name in names or () if name.startswith("re:") or ATTENTION not in f"{name}."]


METHODS = {
    "fp8": _Method((BLOCKS, SCALED), _ignored_fp8),
    "compressed-tensors": _Method((PACKED, SCALED), _ignored_compressed),
    "gptq": _Method((GPTQ,), _ignored_gptq),
    "awq": _Method((AWQ,), _ignored_awq),
}
"""The methods that are read, by ``quant_method``."""
