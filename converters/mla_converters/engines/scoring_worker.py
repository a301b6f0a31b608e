"""One run of the vLLM engine: job as JSON on stdin, result as JSON into the file named by the argument.

Run as ``python -m mla_converters.engines.scoring_worker RESULT``; nothing else imports it. Job: ``model``,
``dtype``, ``windows`` (token ids, all of one length). Result: ``losses`` (nats) and ``top1`` (token ids) of each
window's tokens but the first; or ``error``, what the engine refused or failed at.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Run the job."""
    try:
        result = score(json.load(sys.stdin))
    except Exception as error:  # the parent process tells the user; nobody reads this one's output
        result = {"error": f"{type(error).__name__}: {error}".strip().split("\n")[0]}
    Path(sys.argv[1]).write_text(json.dumps(result))


def score(job: dict[str, Any]) -> dict[str, Any]:
    """Losses and likeliest tokens of all windows."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        job["model"],
        dtype=job["dtype"],
        max_model_len=len(job["windows"][0]) + 1,  # the engine always generates one token
        max_num_seqs=1,
        enforce_eager=True,  # compiling takes longer than it saves in so short a run
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    losses, top1 = [], []
    for ids in job["windows"]:
        (output,) = llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
        steps = output.prompt_logprobs[1:]
        losses.append([-step[token].logprob for step, token in zip(steps, ids[1:], strict=True)])
        top1.append([min(step, key=lambda token: step[token].rank) for step in steps])
    return {"losses": losses, "top1": top1}


if __name__ == "__main__":
    main()
