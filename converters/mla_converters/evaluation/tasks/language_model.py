"""A language model as lm-evaluation-harness sees it, whose requests vLLM answers."""

from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase

from mla_converters.engines.process import Engine

MOST_NEW_TOKENS = 256
"""The most tokens of an answer, if the task does not say; as in the harness's own models."""
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What a task may say of the choice of tokens, by the names that it shares with vLLM."""


class EngineModel(TemplateLM):
    """Answers the harness's requests with an engine.

    Args:
        tokenizer: of the model.
        context: longest sequence in tokens.
        engine: has a tokenizer, and room for ``context + 1`` tokens.
        progress: shows how many requests are answered.
        name: of the model, for the progress.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, context: int, engine: Engine, progress: Progress, name: str
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = context
        self._engine = engine
        self._progress = progress
        self._name = name

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else first

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.tokenizer.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids. Special tokens are added as the tokenizer does it, unless the text begins with them already."""
        if add_special_tokens is None:
            first = self.tokenizer.bos_token
            add_special_tokens = not (first and string.startswith(first))  # chat templates write the first token
        return self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of whole texts, which may be longer than the context."""
        texts = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,  # a window is scored after one token more
                context_len=1,
            )
            texts.append([make_disjoint_window(window) for window in windows])
        scores = iter(self._loglikelihood_tokens([(("", ""), *window) for text in texts for window in text]))
        return [sum(next(scores)[0] for _ in text) for text in texts]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        asked = []
        for _, context, continuation in requests:
            prompt = (context + continuation)[-self.max_length :]
            # A first token has no probability, because nothing stands before it.
            asked.append({"prompt": prompt, "scored": min(len(continuation), len(prompt) - 1)})
        return [(answer["logprob"], answer["greedy"]) for answer in self._answers(asked)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        asked = []
        for number, request in enumerate(requests):
            context, wanted = request.args
            # Each request has a seed of its own, because some tasks draw several answers to one problem.
            sampling = _sampling(wanted) | {"seed": number}
            sampling["max_tokens"] = min(sampling["max_tokens"], self.max_length - 1)
            # Where both do not fit, the beginning of the prompt goes.
            prompt = self.tok_encode(context)[-(self.max_length - sampling["max_tokens"]) :]
            asked.append({"prompt": prompt, "sampling": sampling})
        return [answer["text"] for answer in self._answers(asked)]

    def _answers(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The engine's answers, in the order of the requests."""
        task = self._progress.add_task(f"Requests to {self._name}", total=len(requests))
        answers: list[dict[str, Any]] = [{}] * len(requests)
        for answer in self._engine.answer(requests):
            answers[answer["index"]] = answer
            self._progress.advance(task)
        return answers


def _sampling(wanted: dict[str, Any]) -> dict[str, Any]:
    """A task's ``generation_kwargs`` as arguments of ``vllm.SamplingParams``."""
    until = wanted.get("until") or []
    sampling = {name: wanted[name] for name in SAMPLING if name in wanted}
    if not wanted.get("do_sample", sampling.get("temperature", 0) > 0):
        sampling["temperature"] = 0.0
    return {
        **sampling,
        "max_tokens": wanted.get("max_gen_toks", MOST_NEW_TOKENS),
        "stop": [until] if isinstance(until, str) else [text for text in until if text],
    }
