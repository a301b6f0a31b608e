"""The field ``latent_cache`` of a checkpoint's ``config.json``: each layer's cache format."""

from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from typing import Any

from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat, Segment

FORMAT_VERSION = 1
"""Version of the layout of rows, and of how numbers are rounded to codes."""


def latent_cache_json(formats: Sequence[CacheFormat]) -> dict[str, Any]:
    """The field of a checkpoint.

    Args:
        formats: one for all layers, or one for each.
    """
    every = formats[:1] if len(set(formats)) == 1 else formats
    return {"format_version": FORMAT_VERSION, "formats": [_format_json(format) for format in every]}


def parse_latent_cache(value: Any, sizes: Sequence[tuple[int, int]]) -> list[CacheFormat]:
    """Each layer's format.

    Args:
        value: the field.
        sizes: ``(kv_lora_rank, qk_rope_head_dim)`` of each layer.

    Raises:
        ValueError: the field cannot be read, or its formats do not fit the layers.
    """
    if not isinstance(value, dict) or set(value) != {"format_version", "formats"}:
        raise ValueError("latent_cache must have the fields format_version and formats, and no others.")
    if value["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"latent_cache has format_version {value['format_version']!r}, but this version of vllm-mla-plugin reads "
            f"{FORMAT_VERSION}: install the version that wrote the checkpoint."
        )
    every = value["formats"]
    if not isinstance(every, list) or len(every) not in (1, len(sizes)):
        raise ValueError(f"latent_cache must have one format, or one for each of the {len(sizes)} layers.")
    formats = [_parse_format(each) for each in every] * (len(sizes) if len(every) == 1 else 1)
    for layer, (format, (latent, rope)) in enumerate(zip(formats, sizes, strict=True)):
        if format.sizes != (latent, rope):
            raise ValueError(
                f"latent_cache packs {format.sizes[0]} + {format.sizes[1]} numbers in layer {layer}, which caches "
                f"{latent} + {rope}."
            )
    return formats


def _format_json(format: CacheFormat) -> dict[str, Any]:
    parts = {name: [_segment_json(segment) for segment in getattr(format, name)] for name in ("latent", "rope")}
    return {**parts, "mean": format.mean, "alignment": format.alignment}


def _segment_json(segment: Segment) -> dict[str, Any]:
    value = asdict(segment)
    return {name: value[name] for name in ("size", "bits")} if segment.bits == 16 else value


def _parse_format(value: Any) -> CacheFormat:
    arguments = dict(_known_fields(value, CacheFormat, "A cache format"))
    for name in ("latent", "rope"):
        segments = arguments[name]
        if not isinstance(segments, list):
            raise ValueError(f"A cache format's {name!r} is {segments!r}, but must be a list of segments.")
        arguments[name] = tuple(Segment(**_known_fields(segment, Segment, "A segment")) for segment in segments)
    return CacheFormat(**arguments)


def _known_fields(value: Any, cls: Any, what: str) -> dict[str, Any]:
    needed = {field.name: field.default is MISSING for field in fields(cls)}
    if not isinstance(value, dict) or not {name for name in needed if needed[name]} <= set(value) <= set(needed):
        raise ValueError(f"{what} of latent_cache is {value!r}, but must be an object with fields {', '.join(needed)}.")
    return value
