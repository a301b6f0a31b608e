"""Scoring windows of tokens with a vLLM engine. Only the engine's own process runs this."""

from typing import Any


def score(llm: Any, windows: list[list[int]]) -> dict[str, Any]:
    """Score every token of every window but the first.

    Args:
        llm: a ``vllm.LLM``.
        windows: token ids.

    Returns:
        ``losses`` (nats) and ``top1`` (ids of the likeliest tokens), each a list of ``length - 1`` numbers a window.
    """
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    losses, top1 = [], []
    for ids in windows:
        (output,) = llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
        steps = output.prompt_logprobs[1:]
        losses.append([-step[token].logprob for step, token in zip(steps, ids[1:], strict=True)])
        top1.append([min(step, key=lambda token: step[token].rank) for step in steps])
    return {"losses": losses, "top1": top1}
