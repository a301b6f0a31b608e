"""The likeliest tokens at every position, from a vLLM engine. Only the engine's own process runs this."""

from collections.abc import Iterator
from typing import Any


def predict(llm: Any, windows: list[list[int]], top_k: int) -> Iterator[dict[str, Any]]:
    """What a model predicts after every token of every window.

    Args:
        llm: a ``vllm.LLM`` that gives at least ``top_k`` log-probabilities.
        windows: token ids.
        top_k: how many of the likeliest tokens.

    Yields:
        For each window in turn ``ids`` and ``logprobs`` (nats), each ``top_k`` numbers for every token, the likeliest
        first.
    """
    from vllm import SamplingParams

    # What follows the last token is predicted by the one token that is generated.
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=top_k, logprobs=top_k, detokenize=False)
    for ids in windows:
        (output,) = llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
        steps = [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]
        # The token that follows is given too, though it may not be among the likeliest.
        best = [sorted(step.items(), key=lambda item: item[1].rank)[:top_k] for step in steps]
        yield {
            "ids": [[token for token, _ in step] for step in best],
            "logprobs": [[chosen.logprob for _, chosen in step] for step in best],
        }
