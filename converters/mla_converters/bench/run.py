"""The benchmark from start to end. :func:`bench` is the Python API behind ``vllm-mla bench``."""

import os
import platform
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.metadata import version
from statistics import median
from typing import Any

import psutil
import torch

from mla_converters.bench.contenders import Contender, contenders, is_mla
from mla_converters.checkpoints.models import Model, find_models
from mla_converters.engines.process import Engine
from mla_converters.errors import ConversionError
from mla_converters.options import MOST, BenchOptions, Workload
from mla_converters.reports.bench import BenchReport, BenchRow, Figures
from mla_converters.support.progress import progress_bars

DEFAULT_LENGTHS = (1024, 2048, 4096, 8192, 16384)
"""Input and output lengths of TransMLA's speed measurements (Meng et al. 2025)."""
RATES = ("output_tokens_per_second", "decode_tokens_per_second")
TIMES = ("time_to_first_token", "time_per_output_token")
Runs = dict[tuple[str, Workload], list[dict[str, Any]]]
"""By an engine's name and a workload, what each round measured."""
CPU_CACHE_BYTES = 4 * 2**30
"""On a CPU, vLLM would take most of the memory for one engine's cache; here several engines run side by side."""


def bench(names: list[str], options: BenchOptions, *, quiet: bool = False) -> BenchReport:
    """Measure how fast vLLM serves several models.

    A conversion is also compared with the other caches that vLLM can keep of the first model, see
    :func:`mla_converters.bench.contenders.contenders`.

    On a CPU all engines run from the start and take turns at every workload, so that other work of the machine slows
    all of them down equally. On a GPU each engine needs the memory for itself: in every round, the engines of the
    models run one after the other.

    Args:
        names: folders or hub ids; the others are compared with the first.
        options: workloads and engine.
        quiet: no progress bar.

    Returns:
        The report: hardware, versions and, for each engine and workload, a row with medians over the rounds, ratios to
        the first model, and all rounds.

    Raises:
        ConversionError: an option does not fit the models, or vLLM cannot serve one of them.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        models = find_models(names, stack)
        workloads = _workloads(models, options)
        entered, notes = contenders(models, options)
        progress = stack.enter_context(progress_bars(quiet))
        task = progress.add_task("Measuring", total=len(entered) * options.rounds * len(workloads))
        facts: dict[str, dict[str, Any]] = {}
        runs: Runs = {}
        for name, workload, run in _measure(entered, workloads, options, facts, notes):
            runs.setdefault((name, workload), []).append(run)
            progress.advance(task)
    measured = [each for each in entered if each.name in facts]
    rows = [_row(each, workload, runs, facts, measured) for workload in workloads for each in measured]
    first = facts[models[0].name]
    return BenchReport(
        models=rows,
        engines=facts,
        notes=notes,
        rounds=options.rounds,
        load_format=options.load_format,
        engine_arguments=options.engine,
        hardware=hardware(first["device"]),
        versions={
            **first["versions"],
            "vllm-mla-plugin": version("vllm-mla-plugin"),
            "python": platform.python_version(),
        },
        seconds=time.monotonic() - started,
    )


def hardware(device: str) -> dict[str, Any]:
    """The machine on which the numbers were measured."""
    return {
        "device": device,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def _workloads(models: list[Model], options: BenchOptions) -> list[Workload]:
    if options.workloads:
        return list(options.workloads)
    contexts = {model.name: model.context for model in models if model.context is not None}
    shortest = min(contexts, key=lambda name: contexts[name], default=None)
    limit = contexts[shortest] if shortest is not None else None
    lengths = options.lengths
    if lengths is None:
        lengths = tuple((length, length) for length in DEFAULT_LENGTHS if limit is None or 2 * length <= limit)
        if not lengths:
            raise ConversionError(f"The context of {shortest} is {limit} tokens: give --lengths that fit.")
    for input_len, output_len in lengths:
        if min(input_len, output_len) < 1:
            raise ConversionError("--lengths must be at least 1.")
        if limit is not None and input_len + output_len > limit:
            raise ConversionError(
                f"--lengths {input_len}:{output_len} are longer than the context of {shortest} ({limit} tokens)."
            )
    return [Workload(requests, *pair) for requests in options.requests for pair in lengths]


def _measure(
    entered: list[Contender],
    workloads: list[Workload],
    options: BenchOptions,
    facts: dict[str, dict[str, Any]],
    notes: list[str],
) -> Iterator[tuple[str, Workload, dict[str, Any]]]:
    """Yield the runs of all engines, in turns, and put the facts of each engine into ``facts``.

    Where vLLM does not start an engine with another cache than a model's own, its sentence goes into ``notes``.
    """

    def start(stack: ExitStack, contender: Contender) -> Engine | None:
        try:
            engine = stack.enter_context(_engine(contender, workloads, options))
        except ConversionError as refusal:
            if contender.cache is None:
                raise
            notes.append(str(refusal))
            return None
        facts[contender.name] = engine.facts
        return engine

    if torch.cuda.is_available():
        for seed in range(options.rounds):
            for contender in [each for each in entered if seed == 0 or each.name in facts]:
                with ExitStack() as stack:
                    if (engine := start(stack, contender)) is not None:
                        for workload in workloads:
                            yield contender.name, workload, _serve(engine, workload, seed)
        return
    _check_memory(len(entered), options.engine.get("kv_cache_memory_bytes", options.cache or CPU_CACHE_BYTES))
    with ExitStack() as stack:
        engines = {contender.name: start(stack, contender) for contender in entered}
        for seed in range(options.rounds):
            for workload in workloads:
                for name, engine in engines.items():
                    if engine is not None:
                        yield name, workload, _serve(engine, workload, seed)


def _check_memory(engines: int, cache: int) -> None:
    """Refuse engines whose caches (bytes) do not fit together, before the system ends one of its processes."""
    available = psutil.virtual_memory().available
    if engines * cache > available:
        raise ConversionError(
            f"{engines} x {cache / 2**30:.3g} GiB of cache do not fit into the {available / 2**30:.3g} GiB of memory "
            "that are free, because all engines run side by side: give a smaller --cache, or fewer models or --rivals."
        )


def _serve(engine: Engine, workload: Workload, seed: int) -> dict[str, Any]:
    """Measure one workload with one engine."""
    input_len, output_len = workload.input_len, workload.output_len
    return engine.measure(_request_count(workload, engine.facts), input_len, output_len, seed)


def _request_count(workload: Workload, facts: dict[str, Any]) -> int:
    """How many requests the engine with these facts gets."""
    if workload.requests != MOST:
        return workload.requests
    block_size = facts["kv_block_size"]
    blocks = facts["kv_capacity_tokens"] // block_size - 1  # vLLM keeps one block empty
    return max(1, blocks // -(-(workload.input_len + workload.output_len) // block_size))


@contextmanager
def _engine(contender: Contender, workloads: list[Workload], options: BenchOptions) -> Iterator[Engine]:
    """A contender's engine, warmed up."""
    longest = max(workload.input_len + workload.output_len for workload in workloads)
    arguments: dict[str, Any] = {
        "model": contender.model.path,
        "dtype": options.dtype,
        "load_format": options.load_format,
        "max_model_len": longest,
        # Prompts do not repeat, neither within a round nor between rounds.
        "enable_prefix_caching": False,
    }
    if MOST not in (counts := [workload.requests for workload in workloads]):
        arguments["max_num_seqs"] = max(counts)  # otherwise vLLM's own limit holds
    cache = options.cache or (None if torch.cuda.is_available() else CPU_CACHE_BYTES)
    if cache is not None:
        arguments["kv_cache_memory_bytes"] = cache
    advice = "give fewer --requests, shorter --lengths or a smaller --cache"
    own = contender.arguments
    if "hf_overrides" in own and "hf_overrides" in options.engine:
        own = own | {"hf_overrides": options.engine["hf_overrides"] | own["hf_overrides"]}
    with Engine(f"serve {contender.name}", arguments | options.engine | own, advice=advice) as engine:
        # The first requests take longer, because some things are compiled or allocated once.
        engine.measure(requests=2, input_len=min(64, longest - 4), output_len=4, seed=-1)
        yield engine


def _row(
    contender: Contender,
    workload: Workload,
    runs: Runs,
    facts: dict[str, dict[str, Any]],
    measured: list[Contender],
) -> BenchRow:
    model, first = contender.model, measured[0].model
    own = runs[contender.name, workload]

    def ratios(base: str) -> dict[str, float | None]:
        others = runs[base, workload]
        return {
            "kv_capacity": facts[contender.name]["kv_capacity_tokens"] / facts[base]["kv_capacity_tokens"],
            **{key: _ratio(own, others, key) for key in RATES},
            **{key: _ratio(others, own, key) for key in TIMES},
        }

    rivals = [each.name for each in measured if each.model is first]
    compared = model is not first and not is_mla(first) and len(rivals) > 1
    return BenchRow(
        name=contender.name,
        cached_per_token_and_layer=model.cached_numbers,
        **_cache(model, facts[contender.name]),
        **asdict(workload),
        kv_capacity_tokens=facts[contender.name]["kv_capacity_tokens"],
        **medians(own),
        ratios=ratios(first.name),
        ratios_to_best=_least([ratios(rival) for rival in rivals]) if compared else None,
        runs=[Figures(**run) for run in own],
    )


def _least(ratios: list[dict[str, float | None]]) -> dict[str, float | None]:
    """The smallest of each ratio, which is that to the best; None where a figure is missing."""
    known = {key: [each[key] for each in ratios] for key in ratios[0]}
    return {key: None if None in values else min(values) for key, values in known.items()}  # type: ignore[type-var]


def _cache(model: Model, facts: dict[str, Any]) -> dict[str, Any]:
    """How an engine with these facts keeps a token: the fields of a row about it."""
    numbers = model.cached_numbers
    if facts["kv_packed"]:
        format, size = model.cache_format, model.cached_bytes
    else:
        format, each = facts["kv_dtype"], facts["kv_number_bytes"]
        size = None if numbers is None or each is None else numbers * each
    bits = None if numbers is None or size is None else 8 * size / numbers
    return {"cache_format": format, "bytes_per_token_and_layer": size, "bits_per_cached_number": bits}


def _ratio(above: list[dict[str, Any]], below: list[dict[str, Any]], key: str) -> float | None:
    """Median over the rounds of a figure's ratio; None if the figure is missing.

    Ratios are taken within a round, because its runs were close in time.
    """
    pairs = [(_figure(a[key]), _figure(b[key])) for a, b in zip(above, below, strict=True)]
    known = [a / b for a, b in pairs if a is not None and b is not None]
    return median(known) if known else None


def _figure(value: Any) -> float | None:
    """A rate as it is; of a time, the median over requests."""
    return value["median"] if isinstance(value, dict) else value


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure over the rounds; None where no round has the figure."""
    result: dict[str, Any] = {}
    for key, value in runs[0].items():
        values = [run[key] for run in runs if run[key] is not None]
        if not values:
            result[key] = None
        else:
            result[key] = medians(values) if isinstance(value, dict) else median(values)
    return result
