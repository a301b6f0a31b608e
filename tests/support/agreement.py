"""vLLM's predictions against transformers'."""

from pathlib import Path

import torch
from support.files import TEXT
from transformers import AutoTokenizer

MAX_LOGPROB_ERROR = 1e-3
MOVED = 0.05  # by another code of a cached number


def text_prompts(folder: Path, count: int, longest: int = 48) -> list[list[int]]:
    """Prompts of different lengths from the test text."""
    ids = AutoTokenizer.from_pretrained(folder)(TEXT).input_ids
    return [ids[37 * i : 37 * i + 3 + (11 * i) % longest] for i in range(count)]


@torch.inference_mode()
def hf_logprobs(model: torch.nn.Module, ids: list[int]) -> list[float]:
    """Log-probability that transformers gives each token but the first."""
    logits = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
    return logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


def differences(result: dict, model: torch.nn.Module, prompts: list[list[int]]) -> list[float]:
    """By how much vLLM's log-probabilities of prompts and of decoded tokens differ from transformers'."""
    found = []
    for i, prompt in enumerate(prompts):
        expected = hf_logprobs(model, prompt + result["tokens"][i])
        got = result["prompt_logprobs"][i] + result["logprobs"][i]
        found += [abs(a - b) for a, b in zip(got, expected, strict=True)]
    return found


def assert_agrees(result: dict, model: torch.nn.Module, prompts: list[list[int]]) -> None:
    """vLLM's log-probabilities of prompts and of decoded tokens equal transformers'."""
    worst = max(differences(result, model, prompts))
    assert worst < MAX_LOGPROB_ERROR, f"log-probabilities differ by up to {worst:.2e}"


def assert_mostly_agrees(result: dict, model: torch.nn.Module, prompts: list[list[int]]) -> None:
    """The same for a cache of few bits: a number that differs in its last bit may be rounded to another code, and moves
    a few predictions. What is wrong in the computation moves most of them, and further."""
    found = sorted(differences(result, model, prompts))
    half, worst = found[len(found) // 2], found[-1]
    assert half < MAX_LOGPROB_ERROR and worst < MOVED, f"log-probabilities differ by {half:.2e}, and up to {worst:.2e}"
