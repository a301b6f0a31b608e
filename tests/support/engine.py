"""One run of the vLLM engine, in a process of its own, because an engine never gives back everything it took."""

import json
import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version
from vllm import __version__

# Engines run in processes of their own, which start as copies of one that has imported vLLM: imports are half of a
# short run's time.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["vllm.entrypoints.llm"])

VLLM = Version(__version__).release[:2]
speculative = pytest.mark.skipif(VLLM == (0, 30), reason="without Triton, vLLM 0.30 fails when it speculates")


def run_engine(model: Path, prompts: list[list[int]], timeout: int = 600, **job: Any) -> dict[str, Any]:
    """Generate with the real vLLM engine, in a process of its own; see :func:`generate`."""
    job |= {"model": str(model), "prompts": prompts}
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1"} | job.pop("environment", {})
    # One rank needs no processes beside this one, each of which would import vLLM again. (The server has them.)
    if {"tensor_parallel_size", "pipeline_parallel_size"}.isdisjoint(job.get("engine", {})):
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        answer, output = Path(folder) / "answer.json", Path(folder) / "output.txt"
        process = PROCESSES.Process(target=generate, args=(job, environment, answer, output))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
        assert process.exitcode == 0, output.read_text()[-6000:]
        return json.loads(answer.read_text())


def generate(job: dict[str, Any], environment: dict[str, str], answer: Path, output: Path) -> None:
    """Run a job; for a process that has not used vLLM yet.

    Args:
        job: ``model``, ``prompts`` (token ids), ``max_tokens``, ``prompt_logprobs`` (bool), ``engine`` (arguments of
            ``vllm.LLM``), ``lora`` (folder of an adapter to use), ``modules`` (bool), ``reload`` (folder whose weights
            take the place of the model's before anything is generated).
        environment: variables to set.
        answer: file for the result, JSON: ``tokens`` and ``logprobs`` of what was generated, ``prompt_logprobs`` of
            each prompt token but the first, ``cached_tokens`` (of each prompt, found in the prefix cache),
            ``kv_tokens`` (capacity of the cache), ``cuda_graphs`` (their mode, and how many were captured, where the
            engine has no processes of its own), ``modules`` (their names, where asked for and the engine has none).
        output: file for what the engine prints.
    """
    os.environ.update(environment)
    with output.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)

    from vllm import LLM, SamplingParams
    from vllm.compilation.counter import compilation_counter
    from vllm.lora.request import LoRARequest

    arguments = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048}
    llm = LLM(job["model"], skip_tokenizer_init=job.get("no_tokenizer", False), **arguments | job.get("engine", {}))
    sampling = SamplingParams(
        temperature=0,
        max_tokens=job.get("max_tokens", 1),
        logprobs=0,
        prompt_logprobs=0 if job.get("prompt_logprobs") else None,
        ignore_eos=True,
        detokenize=False,
    )
    if "reload" in job:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": job["reload"]})
    adapter = LoRARequest("adapter", 1, job["lora"]) if "lora" in job else None
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    outputs = llm.generate(prompts, sampling, use_tqdm=False, lora_request=adapter)
    config = llm.llm_engine.vllm_config
    cache, mode = config.cache_config, config.compilation_config.cudagraph_mode
    result = {
        "tokens": [list(o.outputs[0].token_ids) for o in outputs],
        "logprobs": [
            [step[token].logprob for step, token in zip(o.outputs[0].logprobs, o.outputs[0].token_ids, strict=True)]
            for o in outputs
        ],
        "cached_tokens": [o.num_cached_tokens for o in outputs],
        "kv_tokens": (cache.num_gpu_blocks or 0) * cache.block_size,
        "cuda_graphs": {
            "mode": None if mode is None else mode.name,
            "captured": compilation_counter.num_cudagraph_captured,
        },
    }
    if job.get("modules"):
        (result["modules"],) = llm.apply_model(lambda model: [name for name, _ in model.named_modules()])
    if job.get("prompt_logprobs"):
        result["prompt_logprobs"] = [
            [step[token].logprob for step, token in zip(o.prompt_logprobs[1:], ids[1:], strict=True)]
            for o, ids in zip(outputs, job["prompts"], strict=True)
        ]
    answer.write_text(json.dumps(result))
    llm.llm_engine.engine_core.shutdown()
