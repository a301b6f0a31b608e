"""The plan, put together. :func:`plan` is the Python API behind ``vllm-mla plan``."""

from dataclasses import asdict

from mla_converters.checkpoints.families import window_refusal
from mla_converters.checkpoints.locate import check_revision
from mla_converters.checkpoints.shape import PlannedSource, read_source
from mla_converters.checkpoints.vllm_caches import VllmCache, vllm_caches
from mla_converters.methods.base import Cost
from mla_converters.methods.registry import METHODS, method_of
from mla_converters.options import CacheSizes, ConvertOptions, ExactOptions, MethodOptions, PlanOptions, command_line
from mla_converters.planning.layouts import Candidate, candidates
from mla_converters.planning.many_gpus import plan_gpus
from mla_converters.planning.proof import proof_core_seconds
from mla_converters.planning.recommendation import advice, recommend
from mla_converters.planning.sampling import sampling_core_seconds, sampling_memory
from mla_converters.planning.training import planned_training
from mla_converters.reports.plan import (
    CacheSize,
    Layout,
    Plan,
    PlannedConversion,
    PlannedGpus,
    PlannedModel,
    Recommendation,
    VllmCacheSize,
)


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
    check_revision(name, options.revision)
    source, memory = read_source(name, options.revision, options.dtype), options.memory_bytes
    shape = source.shape
    chosen, reason = recommend(source, options.method)
    costs = _costs(source, chosen, options)
    command = _command(source, options.method, chosen.sizes, options)
    exact_command = _command(source, ExactOptions(), CacheSizes(latent_bits=4), options)
    return Plan(
        source=_describe_source(source, memory),
        memory_bytes=memory,
        vllm_caches=[_describe_vllm_cache(source, cache, memory) for cache in vllm_caches(shape)],
        layouts=[_describe_layout(source, candidate, memory) for candidate in candidates(shape, options.method)],
        conversion=_describe_conversion(source, options, costs),
        training=planned_training(source, chosen, options) if options.heal else None,
        gpus=_plan_gpus(source, chosen, options) if options.tensor_parallel > 1 else None,
        advice=advice(source, command, exact_command),
        recommended=Recommendation(
            options=list(chosen.options), cache_ratio=round(chosen.ratio(shape), 6), reason=reason
        ),
        warnings=[
            *([] if shape.window is None else [window_refusal(shape.window)]),
            *costs[options.method.name].warnings,
        ],
        command=command,
    )


def _costs(source: PlannedSource, chosen: Candidate, options: PlanOptions) -> dict[str, Cost]:
    """What each method takes for the recommended cache; all but the chosen one with their defaults."""
    costs = {}
    for name, entry in METHODS.items():
        method = method_of(options.method if name == options.method.name else entry.options())
        costs[name] = method.cost(source.shape, chosen.cache, options.calibration_tokens)
    return costs


def _plan_gpus(source: PlannedSource, chosen: Candidate, options: PlanOptions) -> PlannedGpus:
    """What several GPUs cache of the recommended conversion, and of the largest with kernels of vLLM's own."""
    shape, method = source.shape, method_of(options.method)
    others = [candidate for candidate in candidates(shape, options.method) if candidate.is_vllms]
    weights = {
        each: method.cost(shape, each.cache, options.calibration_tokens).weights_bytes for each in (chosen, *others[:1])
    }
    return plan_gpus(source, weights, options.tensor_parallel, options.memory_bytes)


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
        cached_per_token_and_layer=shape.cached,
        **_cache(shape.cached * shape.layers * source.cache_bytes, memory_bytes).model_dump(),
    )


def _cache(per_token: int, memory_bytes: int) -> CacheSize:
    return CacheSize(kv_bytes_per_token=per_token, tokens_in_memory=memory_bytes // per_token)


def _describe_vllm_cache(source: PlannedSource, cache: VllmCache, memory_bytes: int) -> VllmCacheSize:
    shape, per_token = source.shape, cache.token_bytes(source.shape)
    return VllmCacheSize(
        kv_cache_dtype=cache.name,
        **_cache(per_token, memory_bytes).model_dump(),
        cache_ratio=round(per_token / (2 * shape.cached * shape.layers), 6),
        served_on=list(cache.served_on(shape.head_dim)),
    )


def _describe_layout(source: PlannedSource, candidate: Candidate, memory_bytes: int) -> Layout:
    shape, cache = source.shape, candidate.cache
    row = source.cache_bytes * cache.budget.width if cache.format is None else cache.row_bytes
    return Layout(
        typical=cache.searched_bytes is not None,
        **asdict(cache.budget),
        bits_per_number=8 * source.cache_bytes if cache.format is None else cache.format.latent[0].bits,
        bytes_per_token_and_layer=row,
        **_cache(row * shape.layers, memory_bytes).model_dump(),
        cache_ratio=round(candidate.ratio(shape), 6),
        options=list(candidate.options),
        backends=candidate.backends(source.cache_dtype),
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


def _command(source: PlannedSource, method: MethodOptions, sizes: CacheSizes, options: PlanOptions) -> str:
    """The command that converts the source; a method without text is not told which."""
    text = {"calibration": options.calibration, "calibration_tokens": options.calibration_tokens}
    asked = ConvertOptions(
        method=method,
        **sizes.model_dump(),
        **(text if method_of(method).window else {}),
        seed=options.seed,
        max_context=source.shape.window,
        revision=source.revision,
    )
    return command_line(source.name, asked)
