"""Measuring how fast a vLLM engine serves. Only the engine's own process runs :func:`measure`."""

import random
import time
from itertools import pairwise
from statistics import mean, median, quantiles
from typing import Any, NamedTuple


def measure(llm: Any, requests: int, input_len: int, output_len: int, seed: int) -> dict[str, Any]:
    """Serve prompts of random tokens, all sent at once.

    Args:
        llm: a ``vllm.LLM`` that keeps the times of its requests.
        requests: number of prompts.
        input_len: tokens of each prompt.
        output_len: tokens of each answer.
        seed: of the prompts.

    Returns:
        Seconds and rates (tokens per second), times (seconds), the most requests that ran at one time, and how often
        the engine put a request back. A figure that such requests do not have is None.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    vocabulary = engine.model_config.get_vocab_size()
    generator = random.Random(seed)
    sampling = SamplingParams(
        temperature=0,
        max_tokens=output_len,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    preempted_before = preemptions(llm)
    started = time.perf_counter()
    for i in range(requests):
        prompt = [generator.randrange(vocabulary) for _ in range(input_len)]
        engine.add_request(f"{seed}-{i}", {"prompt_token_ids": prompt}, sampling)
    steps, finished = [], []
    while engine.has_unfinished_requests():
        outputs = engine.step()
        steps.append(Step(time.perf_counter() - started, [output.request_id for output in outputs]))
        finished += [output.metrics for output in outputs if output.finished]
    assert sum(times.num_generation_tokens for times in finished) == requests * output_len
    return {
        "seconds": steps[-1].time,
        "output_tokens_per_second": requests * output_len / steps[-1].time,
        "total_tokens_per_second": requests * (input_len + output_len) / steps[-1].time,
        "decode_tokens_per_second": decode_rate(steps, requests),
        "time_to_first_token": spread([times.first_token_latency for times in finished]),
        "time_per_output_token": spread(
            [(times.last_token_ts - times.first_token_ts) / (output_len - 1) for times in finished]
        )
        if output_len > 1
        else None,
        "peak_concurrency": peak_concurrency([(times.scheduled_ts, times.last_token_ts) for times in finished]),
        "preemptions": preemptions(llm) - preempted_before,
    }


def preemptions(llm: Any) -> int:
    """How often the engine has put a request back, since it started."""
    # Not from the requests' own times, which do not count it in vLLM 0.29.
    return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")


class Step(NamedTuple):
    """One step of the engine.

    Attributes:
        time: when it was done, in seconds since the requests were sent.
        requests: ids of those that got tokens from it.
    """

    time: float
    requests: list[str]


def decode_rate(steps: list[Step], requests: int) -> float | None:
    """Tokens per second of the median step among those that decoded for all requests and did nothing else.

    None if there is no such step.
    """
    rates, begun = [], set()
    for before, step in pairwise(steps):
        begun.update(before.requests)
        if len(begun) == requests and len(step.requests) == requests:
            rates.append(requests / (step.time - before.time))
    return median(rates) if rates else None


def spread(values: list[float]) -> dict[str, float]:
    """Mean, median and 99th percentile."""
    last = quantiles(values, n=100, method="inclusive")[-1] if len(values) > 1 else values[0]
    return {"mean": mean(values), "median": median(values), "p99": last}


def peak_concurrency(intervals: list[tuple[float, float]]) -> int:
    """The largest number of intervals ``(begin, end)`` that share a point in time."""
    # At equal times, ends sort before begins: a request that starts when another ends does not run beside it.
    events = sorted([(end, -1) for _, end in intervals] + [(begin, 1) for begin, _ in intervals])
    running = most = 0
    for _, change in events:
        running += change
        most = max(most, running)
    return most
