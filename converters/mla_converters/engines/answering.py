"""Answering the requests of tasks with a vLLM engine. Only the engine's own process runs this."""

from collections.abc import Iterator
from typing import Any


def answer(llm: Any, requests: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Serve all requests at once, and give each answer as soon as it is there.

    Args:
        llm: a ``vllm.LLM`` with a tokenizer.
        requests: each has its ``prompt`` (token ids), and either ``scored``, the number of tokens at the prompt's end
            to score, or ``sampling``, the arguments of ``vllm.SamplingParams`` to generate with.

    Yields:
        For each request its ``index`` in the list, and either ``logprob`` (nats, summed over the scored tokens) and
        ``greedy`` (whether each of them is the likeliest), or ``text``.
    """
    engine = llm.llm_engine
    for index, request in enumerate(requests):
        engine.add_request(str(index), {"prompt_token_ids": request["prompt"]}, _sampling(request))
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                index = int(output.request_id)
                yield {"index": index, **_result(output, requests[index])}


def _sampling(request: dict[str, Any]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    # vLLM always generates a token, even where only the prompt is scored.
    scoring = {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}
    return SamplingParams(**request.get("sampling", scoring), output_kind=RequestOutputKind.FINAL_ONLY)


def _result(output: Any, request: dict[str, Any]) -> dict[str, Any]:
    if "sampling" in request:
        return {"text": output.outputs[0].text}
    start = len(request["prompt"]) - request["scored"]
    steps = zip(output.prompt_logprobs[start:], request["prompt"][start:], strict=True)
    chosen = [step[token] for step, token in steps]
    return {"logprob": sum(token.logprob for token in chosen), "greedy": all(token.rank == 1 for token in chosen)}
