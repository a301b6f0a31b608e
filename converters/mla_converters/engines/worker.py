"""One vLLM engine. Jobs come as JSON lines on stdin; each is answered by one JSON line on stdout.

Run as ``python -m mla_converters.engines.worker``; :class:`mla_converters.engines.process.Engine` does so, and nothing
imports this module. The jobs:

- ``{"job": "start", "arguments": {...}}`` comes first and makes the engine with these arguments of ``vllm.LLM``. The
  answer is that of :func:`describe`.
- ``{"job": "measure", ...}`` has the arguments of :func:`mla_converters.engines.measuring.measure`.
- ``{"job": "score", ...}`` has the arguments of :func:`mla_converters.engines.scoring.score`.
- ``{"job": "predict", ...}`` has the arguments of :func:`mla_converters.engines.predicting.predict`. It is answered by
  one line for each window.
- ``{"job": "answer", ...}`` has the arguments of :func:`mla_converters.engines.answering.answer`. It is answered by one
  line for each request.

A job that fails is answered by ``{"error": reason}``. When its stdin is closed, the worker ends its engine and itself.
This happens even if the process that started it was killed.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

from mla_converters.engines.answering import answer
from mla_converters.engines.measuring import measure
from mla_converters.engines.predicting import predict
from mla_converters.engines.scoring import score

NUMBERS = ("float32", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2")
"""Dtypes of a cache, as vLLM names them, that hold one number after the other and nothing else."""
JOBS: dict[str, Callable[..., Iterable[dict[str, Any]]]] = {
    "measure": lambda llm, **job: [measure(llm, **job)],
    "score": lambda llm, **job: [score(llm, **job)],
    "predict": predict,
    "answer": answer,
}
"""By name, what gives the answers of a job."""


def main() -> None:
    """Answer jobs until there are no more."""
    # What vLLM prints must not mix with the answers, so it goes where stderr goes.
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=lines, flush=True)

    llm: Any = None
    for sent in sys.stdin:
        job = json.loads(sent)
        kind = job.pop("job")
        try:
            if kind == "start":
                llm = start(**job)
                send(describe(llm))
            else:
                for line in JOBS[kind](llm, **job):
                    send(line)
        except Exception as error:  # the process that sent the job tells the user
            send({"error": reason(error)})
    if llm is not None:
        llm.llm_engine.engine_core.shutdown()


def reason(error: Exception) -> str:
    """One line that tells what an exception tells."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):  # from vLLM's configuration; the first line only counts the problems
        return " ".join("; ".join(problem["msg"] for problem in error.errors()).split())
    return f"{type(error).__name__}: {error}".strip().split("\n")[0]


def start(arguments: dict[str, Any]) -> Any:
    """Make an engine. It takes token ids and keeps the times of its requests. Unless asked for, it has no tokenizer."""
    from vllm import LLM

    return LLM(**{"disable_log_stats": False, "skip_tokenizer_init": True, **arguments})


def describe(llm: Any) -> dict[str, Any]:
    """The engine's versions and hardware, how many tokens its cache holds, and how it keeps them."""
    import torch
    import vllm
    from vllm.platforms import current_platform

    config = llm.llm_engine.vllm_config
    blocks, block_size = config.cache_config.num_gpu_blocks or 0, config.cache_config.block_size
    return {
        "kv_capacity_tokens": blocks * block_size,
        "kv_block_size": block_size,
        **describe_cache(config),
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "chunked_prefill": config.scheduler_config.enable_chunked_prefill,
        "prefix_caching": config.cache_config.enable_prefix_caching,
        "max_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "device": current_platform.get_device_name(),
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
    }


def describe_cache(config: Any) -> dict[str, Any]:
    """How a cache holds its numbers: whether in the packed rows of the checkpoint (``kv_packed``), or in which dtype
    (``kv_dtype``), and in how many bytes each (``kv_number_bytes``; None where vLLM's format packs them by itself)."""
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

    model, asked = config.model_config, config.cache_config.cache_dtype
    if asked == "auto" and getattr(model.hf_text_config, "latent_cache", None) is not None:
        return {"kv_packed": True, "kv_dtype": None, "kv_number_bytes": None}
    dtype = str(model.dtype).removeprefix("torch.") if asked == "auto" else asked
    size = STR_DTYPE_TO_TORCH_DTYPE[dtype].itemsize if dtype in NUMBERS else None
    return {"kv_packed": False, "kv_dtype": dtype, "kv_number_bytes": size}


if __name__ == "__main__":
    main()
