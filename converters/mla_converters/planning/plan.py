"""The plan, put together. :func:`plan` is the Python API behind ``vllm-mla plan``."""

import shlex
from dataclasses import asdict
from pathlib import Path

from mla_converters.checkpoints.families import window_refusal
from mla_converters.checkpoints.shape import PlannedSource, read_source
from mla_converters.methods.base import Cost
from mla_converters.methods.registry import METHODS, method_of
from mla_converters.options import CacheSizes, ConvertOptions, PlanOptions
from mla_converters.options.convert import conversion_flags
from mla_converters.planning.layouts import Candidate, candidates, recommend
from mla_converters.planning.proof import proof_core_seconds
from mla_converters.planning.sampling import sampling_core_seconds, sampling_memory
from mla_converters.planning.serving import serving_backends
from mla_converters.reports.plan import CacheSize, Layout, Plan, PlannedConversion, PlannedModel, Recommendation


def plan(name: str, options: PlanOptions | None = None) -> Plan:
    """What converting a model would give and cost.

    Args:
        name: a folder with ``config.json``, such a file, a ``.gguf`` file, or a hub id.
        options: memory, method, calibration; None for the defaults.

    Returns:
        The plan. Sizes are in bytes, times in seconds on one core.

    Raises:
        ConversionError: the source cannot be converted, or its configuration cannot be read.
    """
    options = options or PlanOptions()
    source = read_source(name, options.revision, options.dtype)
    shape = source.shape
    chosen, reason = _recommend(source, options)
    costs = _costs(source, chosen, options)
    own = costs[options.method.name]
    return Plan(
        source=_describe_source(source, options.memory_bytes),
        memory_bytes=options.memory_bytes,
        layouts=[
            _describe_layout(source, candidate, options.memory_bytes)
            for candidate in candidates(shape.kv_heads, shape.head_dim)
        ],
        conversion=_describe_conversion(source, options, costs),
        recommended=Recommendation(**asdict(chosen.layout), reason=reason),
        warnings=[*([] if shape.window is None else [window_refusal(shape.window)]), *own.warnings],
        command=_command(source, chosen, options),
    )


def _recommend(source: PlannedSource, options: PlanOptions) -> tuple[Candidate, str]:
    """The layout to take, and why; a method that loses nothing has no choice."""
    method, shape = method_of(options.method), source.shape
    if method.lossless:
        return Candidate(method.budget(shape, CacheSizes()), ()), f"--method {options.method.name} keeps the cache."
    return recommend(shape.kv_heads, shape.head_dim, source.cache_dtype)


def _costs(source: PlannedSource, chosen: Candidate, options: PlanOptions) -> dict[str, Cost]:
    """What each method takes for the recommended layout; all but the chosen one with their defaults."""
    costs = {}
    for name, entry in METHODS.items():
        method = method_of(options.method if name == options.method.name else entry.options())
        costs[name] = method.cost(source.shape, chosen.layout, options.calibration_tokens)
    return costs


def _describe_source(source: PlannedSource, memory_bytes: int) -> PlannedModel:
    shape = source.shape
    return PlannedModel(
        name=source.name,
        revision=source.revision,
        architecture=source.architecture,
        dtype=source.dtype,
        cache_dtype=source.cache_dtype,
        layers=shape.layers,
        hidden_size=shape.hidden,
        query_heads=shape.query_heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        context=shape.context,
        sliding_window=shape.window,
        parameters=shape.parameters,
        weights_bytes=shape.parameters * shape.weight_bytes,
        **_cache(source, shape.cached, memory_bytes).model_dump(),
    )


def _cache(source: PlannedSource, width: int, memory_bytes: int) -> CacheSize:
    per_token = width * source.shape.layers * source.cache_bytes
    return CacheSize(
        cached_per_token_and_layer=width,
        kv_bytes_per_token=per_token,
        tokens_in_memory=memory_bytes // per_token,
    )


def _describe_layout(source: PlannedSource, candidate: Candidate, memory_bytes: int) -> Layout:
    layout, shape = candidate.layout, source.shape
    return Layout(
        **asdict(layout),
        **_cache(source, layout.width, memory_bytes).model_dump(),
        cache_ratio=round(layout.width / shape.cached, 6),
        options=list(candidate.options),
        backends=serving_backends(layout, shape.head_dim, source.cache_dtype),
    )


def _describe_conversion(source: PlannedSource, options: PlanOptions, costs: dict[str, Cost]) -> PlannedConversion:
    """Cost of the recommended conversion, calibrated on a file or on text that the model writes."""
    own, tokens = costs[options.method.name], options.calibration_tokens
    return PlannedConversion(
        method=options.method.name,
        settings=options.method.model_dump(mode="json"),
        calibration_tokens=tokens,
        weights_bytes=own.weights_bytes,
        peak_disk_bytes=own.disk_bytes,
        peak_memory_bytes={
            "file": own.memory_bytes,
            "self": max(own.memory_bytes, sampling_memory(source.shape, tokens)),
        },
        core_seconds={name: round(cost.core_seconds, 1) for name, cost in costs.items()},
        proof_core_seconds=round(proof_core_seconds(source.shape), 1),
        sampling_core_seconds=round(sampling_core_seconds(source.shape, tokens), 1),
    )


def _command(source: PlannedSource, chosen: Candidate, options: PlanOptions) -> str:
    asked = ConvertOptions(
        method=options.method,
        calibration=options.calibration,
        calibration_tokens=options.calibration_tokens,
        seed=options.seed,
        max_context=source.shape.window,
        revision=source.revision,
    )
    out = f"./{Path(source.name).resolve().name.removesuffix('.gguf')}-mla"
    return shlex.join(["vllm-mla", "convert", source.name, out, *chosen.options, *conversion_flags(asked)])
