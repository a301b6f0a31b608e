"""vLLM's predictions against transformers'."""

from pathlib import Path

import torch
from support.files import TEXT
from transformers import AutoTokenizer

MAX_LOGPROB_ERROR = 1e-3


def text_prompts(folder: Path, count: int, longest: int = 48) -> list[list[int]]:
    """Prompts of different lengths from the test text."""
    ids = AutoTokenizer.from_pretrained(folder)(TEXT).input_ids
    return [ids[37 * i : 37 * i + 3 + (11 * i) % longest] for i in range(count)]


@torch.inference_mode()
def hf_logprobs(model: torch.nn.Module, ids: list[int]) -> list[float]:
    """Log-probability that transformers gives each token but the first."""
    logits = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
    return logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


def assert_agrees(result: dict, model: torch.nn.Module, prompts: list[list[int]]) -> None:
    """vLLM's log-probabilities of prompts and of decoded tokens equal transformers'."""
    worst = 0.0
    for i, prompt in enumerate(prompts):
        expected = hf_logprobs(model, prompt + result["tokens"][i])
        got = result["prompt_logprobs"][i] + result["logprobs"][i]
        assert len(got) == len(expected)
        worst = max(worst, *(abs(a - b) for a, b in zip(got, expected, strict=True)))
    assert worst < MAX_LOGPROB_ERROR, f"log-probabilities differ by up to {worst:.2e}"
