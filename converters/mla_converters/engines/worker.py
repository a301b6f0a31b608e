"""One vLLM engine that measures on request: jobs as JSON lines on stdin, one JSON line of result for each on stdout.

Run as ``python -m mla_converters.engines.worker``; nothing else imports it. The first job holds the arguments of
``vllm.LLM`` and is answered by what the engine has made of them; each later one is a workload (``requests``,
``input_len``, ``output_len``, ``seed``). A job that fails is answered by ``error``.
"""

import json
import os
import random
import sys
import time
from itertools import pairwise
from statistics import mean, median, quantiles
from typing import Any, NamedTuple


def main() -> None:
    """Answer jobs until there are no more."""
    # What vLLM prints must not mix with the results.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    llm = None
    for line in sys.stdin:
        job = json.loads(line)
        try:
            if llm is None:
                llm = start(job)
                answer = describe(llm)
            else:
                answer = measure(llm, **job)
        except Exception as error:  # the parent process tells the user; nobody reads this one's output
            answer = {"error": f"{type(error).__name__}: {error}".strip().split("\n")[0]}
        print(json.dumps(answer), file=results, flush=True)
    if llm is not None:
        llm.llm_engine.engine_core.shutdown()


def start(arguments: dict[str, Any]) -> Any:
    """An engine that keeps the times of its requests."""
    from vllm import LLM

    return LLM(**arguments, disable_log_stats=False, skip_tokenizer_init=True)


def describe(llm: Any) -> dict[str, Any]:
    """The engine's versions, hardware, and how many tokens its cache holds."""
    import torch
    import vllm
    from vllm.platforms import current_platform

    config = llm.llm_engine.vllm_config
    blocks, block_size = config.cache_config.num_gpu_blocks or 0, config.cache_config.block_size
    return {
        "kv_capacity_tokens": blocks * block_size,
        "kv_block_size": block_size,
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "chunked_prefill": config.scheduler_config.enable_chunked_prefill,
        "prefix_caching": config.cache_config.enable_prefix_caching,
        "max_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "device": current_platform.get_device_name(),
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
    }


def measure(llm: Any, requests: int, input_len: int, output_len: int, seed: int) -> dict[str, Any]:
    """Serve ``requests`` prompts of random tokens, all sent at once."""
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
        "preemptions": sum(times.num_preemptions for times in finished),
    }


class Step(NamedTuple):
    """One step of the engine: when it was done, and which requests it gave tokens."""

    time: float
    requests: list[str]


def decode_rate(steps: list[Step], requests: int) -> float | None:
    """Tokens per second of the steps that did nothing but decode all requests, the median step's; None without any."""
    rates, begun = [], set()
    for before, step in pairwise(steps):
        begun.update(before.requests)
        if len(begun) == requests and len(step.requests) == requests:
            rates.append(requests / (step.time - before.time))
    return median(rates) if rates else None


def spread(values: list[float]) -> dict[str, float]:
    """Mean, median and 99th percentile, seconds."""
    last = quantiles(values, n=100, method="inclusive")[-1] if len(values) > 1 else values[0]
    return {"mean": mean(values), "median": median(values), "p99": last}


def peak_concurrency(intervals: list[tuple[float, float]]) -> int:
    """The most intervals that hold at one time."""
    # Ends before starts: who begins when another ends does not run beside it.
    events = sorted([(end, -1) for _, end in intervals] + [(begin, 1) for begin, _ in intervals])
    running = most = 0
    for _, change in events:
        running += change
        most = max(most, running)
    return most


if __name__ == "__main__":
    main()
