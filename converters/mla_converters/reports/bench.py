"""The report of a benchmark."""

from typing import Any, Literal

from mla_converters.reports.base import Part, Report


class Spread(Part):
    """A time in seconds, summarised over all requests."""

    mean: float
    median: float
    p99: float


class Figures(Part):
    """The figures of one run, or their medians over the rounds.

    Attributes:
        seconds: time of the run.
        output_tokens_per_second, total_tokens_per_second: rates over the whole run.
        decode_tokens_per_second: rate in the steps in which all requests only decoded; None without such steps.
        time_to_first_token, time_per_output_token: times of the requests; the second is None for answers of one token.
        peak_concurrency: the largest number of requests that were served at one time.
        preemptions: how often a request had to wait because the cache was full.
    """

    seconds: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    decode_tokens_per_second: float | None = None
    time_to_first_token: Spread
    time_per_output_token: Spread | None = None
    peak_concurrency: float
    preemptions: float


class BenchRow(Figures):
    """One engine and one workload: medians over the rounds.

    Attributes:
        name: name of the model and, if its cache is not as its configuration says, of the cache.
        cached_per_token_and_layer: cached numbers; None for a model without attention.
        cache_format: dtype of the cached numbers, or the packed format (one for each layer where layers differ).
        bytes_per_token_and_layer: what vLLM allocates, scales and padding included; the mean where layers differ. None
            for a model without attention, and for formats that vLLM packs itself.
        bits_per_cached_number: the bytes over the numbers, in bits.
        requests, input_len, output_len: the workload.
        kv_capacity_tokens: number of tokens that fit into the engine's cache.
        ratios: for each figure, how many times as good as the first model; None if a figure is missing.
        ratios_to_best: the same, compared with the best cache of the first model for each figure, its own among them.
            None for the first model, and where only its own cache was measured.
        runs: the figures of every round.
    """

    name: str
    cached_per_token_and_layer: int | float | None = None
    cache_format: str | list[str]
    bytes_per_token_and_layer: int | float | None = None
    bits_per_cached_number: float | None = None
    requests: int | Literal["most"]
    input_len: int
    output_len: int
    kv_capacity_tokens: int
    ratios: dict[str, float | None]
    ratios_to_best: dict[str, float | None] | None = None
    runs: list[Figures]


class BenchReport(Report):
    """How fast vLLM serves models, side by side.

    Attributes:
        models: a row for each engine and workload.
        engines: facts on each engine.
        notes: sentences about caches that were not measured.
        rounds, load_format, engine_arguments: the options of the benchmark.
        hardware, versions: the hardware, and the versions of the packages.
        seconds: time of the whole benchmark.
        command: the command that was run; None from the Python API.
    """

    models: list[BenchRow]
    engines: dict[str, dict[str, Any]]
    notes: list[str]
    rounds: int
    load_format: str
    engine_arguments: dict[str, Any]
    hardware: dict[str, Any]
    versions: dict[str, str]
    seconds: float
    command: str | None = None
