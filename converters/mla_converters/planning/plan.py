"""The plan, put together."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mla_converters.checkpoints.families import window_refusal
from mla_converters.checkpoints.shape import PlannedSource, read_source
from mla_converters.errors import ConversionError
from mla_converters.methods.attention_aware.run import enough_text, too_little_text
from mla_converters.options import Options
from mla_converters.planning.cost import (
    METHOD_COSTS,
    conversion_core_seconds,
    conversion_disk,
    conversion_memory,
    sampling_core_seconds,
    sampling_memory,
    written_bytes,
)
from mla_converters.planning.layouts import Candidate, candidates, recommend
from mla_converters.planning.serving import serving_backends
from mla_converters.text.calibration import WINDOW


def plan(
    name: str,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    memory_bytes: int,
    calibration_tokens: int = Options.calibration_tokens,
    refit_steps: int = Options.refit_steps,
) -> dict[str, Any]:
    """What converting a model would give and cost.

    Args:
        name: a folder with ``config.json``, such a file, a ``.gguf`` file, or a hub id.
        revision: of a hub id.
        dtype: to serve in; None is what ``vllm serve`` takes: the source's, but bfloat16 for float32.
        memory_bytes: memory for the KV cache, to say how many tokens fit.
        calibration_tokens: how many tokens calibrate.
        refit_steps: of each layer.

    Returns:
        The plan, as ``--json`` writes it. Sizes are in bytes, times in seconds on one core.

    Raises:
        ConversionError: the source cannot be converted, or its configuration cannot be read.
    """
    if calibration_tokens < WINDOW:
        raise ConversionError(
            f"--calibration-tokens is {calibration_tokens}, but must be at least {WINDOW} (one window)."
        )
    if refit_steps < 0:
        raise ConversionError(f"--refit-steps is {refit_steps}, but must be 0 or more.")
    source = read_source(name, revision, dtype)
    chosen, reason = recommend(source.kv_heads, source.head_dim, source.cache_dtype)
    return {
        "source": _describe_source(source, memory_bytes),
        "memory_bytes": memory_bytes,
        "layouts": [
            _describe_layout(source, candidate, memory_bytes)
            for candidate in candidates(source.kv_heads, source.head_dim)
        ],
        "conversion": _describe_conversion(source, chosen, calibration_tokens, refit_steps),
        "recommended": {**asdict(chosen.layout), "reason": reason},
        "warnings": _warnings(source, calibration_tokens, refit_steps),
        "command": _command(source, chosen, calibration_tokens, refit_steps),
    }


def _describe_source(source: PlannedSource, memory_bytes: int) -> dict[str, Any]:
    return {
        "name": source.name,
        "revision": source.revision,
        "architecture": source.architecture,
        "dtype": source.dtype,
        "cache_dtype": source.cache_dtype,
        "layers": source.layers,
        "hidden_size": source.hidden,
        "query_heads": source.query_heads,
        "kv_heads": source.kv_heads,
        "head_dim": source.head_dim,
        "context": source.context,
        "sliding_window": source.window,
        "parameters": source.parameters,
        "weights_bytes": source.parameters * source.weight_bytes,
        **_describe_cache(source, source.cached, memory_bytes),
    }


def _describe_cache(source: PlannedSource, width: int, memory_bytes: int) -> dict[str, int]:
    per_token = width * source.layers * source.cache_bytes
    return {
        "cached_per_token_and_layer": width,
        "kv_bytes_per_token": per_token,
        "tokens_in_memory": memory_bytes // per_token,
    }


def _describe_layout(source: PlannedSource, candidate: Candidate, memory_bytes: int) -> dict[str, Any]:
    layout = candidate.layout
    return {
        **asdict(layout),
        **_describe_cache(source, layout.width, memory_bytes),
        "cache_ratio": round(layout.width / source.cached, 6),
        "options": list(candidate.options),
        "backends": serving_backends(layout, source.head_dim, source.cache_dtype),
    }


def _describe_conversion(
    source: PlannedSource, chosen: Candidate, calibration_tokens: int, refit_steps: int
) -> dict[str, Any]:
    """Cost of the recommended conversion by each method, calibrated on a file or on text that the model writes."""
    weights_bytes = written_bytes(source, chosen.layout)
    memory = conversion_memory(source, chosen.layout, calibration_tokens, refit_steps)
    return {
        "calibration_tokens": calibration_tokens,
        "refit_steps": refit_steps,
        "weights_bytes": weights_bytes,
        "peak_disk_bytes": conversion_disk(source, calibration_tokens, weights_bytes, refit_steps),
        "peak_memory_bytes": {
            "file": memory,
            "self": max(memory, sampling_memory(source, calibration_tokens)),
        },
        "core_seconds": {
            method: round(conversion_core_seconds(source, method, calibration_tokens, weights_bytes, refit_steps), 1)
            for method in METHOD_COSTS
        },
        "sampling_core_seconds": round(sampling_core_seconds(source, calibration_tokens), 1),
    }


def _warnings(source: PlannedSource, calibration_tokens: int, refit_steps: int) -> list[str]:
    warnings = [] if source.window is None else [window_refusal(source.window)]
    read = source.query_heads * source.head_dim
    if not refit_steps and not enough_text(calibration_tokens, read):
        warnings.append(too_little_text(read))
    return warnings


def _command(source: PlannedSource, chosen: Candidate, calibration_tokens: int, refit_steps: int) -> str:
    out = f"./{Path(source.name).resolve().name.removesuffix('.gguf')}-mla"
    words = ["vllm-mla", "convert", source.name, out, *chosen.options]
    if source.revision:
        words += ["--revision", source.revision]
    if source.window:
        words += ["--max-context", str(source.window)]
    if calibration_tokens != Options.calibration_tokens:
        words += ["--calibration-tokens", str(calibration_tokens)]
    if refit_steps != Options.refit_steps:
        words += ["--refit-steps", str(refit_steps)]
    return shlex.join(words)
