"""Text that a model writes itself, to calibrate on."""

import inspect

import torch
from rich.progress import Progress
from transformers import AutoModelForCausalLM, Cache, DynamicLayer

from mla_converters.checkpoints.source import Source
from mla_converters.errors import ConversionError
from mla_converters.streaming.layers import native_bfloat16
from mla_converters.text.chat import ChatTemplate, Conversations

LENGTH = 512  # tokens of a text: many short ones say more than few long ones
TOKENS = 32 * LENGTH  # of the texts that are written at a time


def sampling_dtype() -> torch.dtype:
    """What the model samples in: whichever is faster, for text is text."""
    return torch.bfloat16 if native_bfloat16("cpu") else torch.float32


class ReservedLayer(DynamicLayer):
    """One layer's keys and values in memory for a whole text, where transformers' own layer copies all of them at
    every token.

    Args:
        length: tokens of the text.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length
        self._filled = 0
        self._reserved: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values ``[texts, g, tokens, d]``; all so far."""
        if not self._reserved:
            self.lazy_initialization(key_states, value_states)
            self._reserved = [x.new_empty(*x.shape[:2], self._length, x.shape[-1]) for x in (key_states, value_states)]
        first, self._filled = self._filled, self._filled + key_states.shape[2]
        for reserved, states in zip(self._reserved, (key_states, value_states), strict=True):
            reserved[:, :, first : self._filled] = states
        self.keys, self.values = (reserved[:, :, : self._filled] for reserved in self._reserved)
        return self.keys, self.values

    def get_seq_length(self, *args: object) -> int:
        """Tokens so far."""
        return self._filled


@torch.inference_mode()
def sampled_texts(
    source: Source,
    first: torch.Tensor,
    never: torch.Tensor,
    length: int,
    generator: torch.Generator,
    progress: Progress,
    template: ChatTemplate | None = None,
) -> torch.Tensor:
    """Texts of the model's own: from a first token on, sampled at temperature 1 (as LLM-QAT, arXiv 2305.17888,
    generates its training data).

    Args:
        source: the model.
        first: ``[texts]`` token ids to start from.
        never: token ids that are not sampled.
        length: tokens of each text.
        generator: for sampling.
        progress: for the bar.
        template: with one, the texts are conversations.

    Returns:
        ``[texts, length]`` int64.

    Raises:
        ConversionError: the model's logits are not numbers.
    """
    model = AutoModelForCausalLM.from_pretrained(source.model_folder, dtype=sampling_dtype())
    # transformers 5.24 renames the argument.
    argument = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    batches = first[:, None].split(max(1, TOKENS // length))
    task = progress.add_task("Sampling text", total=len(batches) * (length - 1))
    texts = []
    for ids in batches:
        cache = Cache(layers=[ReservedLayer(length) for _ in range(source.config.num_hidden_layers)])
        # In one piece: a small tensor that stayed of each step would take a bite out of the room that the step's logits
        # left on the heap, and the next step's would need new room.
        tokens = ids.repeat(1, length)
        conversations = Conversations(template, len(ids)) if template else None
        for position in range(1, length):
            last = tokens[:, position - 1 : position]
            logits = model(last, **{argument: cache}, use_cache=True).logits[:, -1].float()
            sums = logits.index_fill(1, never, float("-inf")).softmax(-1).double().cumsum(-1)
            if not sums[:, -1].isfinite().all():
                raise ConversionError(f"The model in {source.name} gives logits that are not numbers: it is broken.")
            sampled = drawn(sums, generator)
            tokens[:, position : position + 1] = conversations.follow(sampled) if conversations else sampled
            progress.advance(task)
        texts.append(tokens)
    return torch.cat(texts)


def drawn(sums: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A token id for each text, ``[texts, 1]``, from running sums of probabilities ``[texts, vocabulary]``.

    One random number finds it. ``torch.multinomial`` takes one for each token of the vocabulary, and as long as a
    seventh of a small model."""
    heights = torch.rand(len(sums), 1, dtype=sums.dtype, generator=generator) * sums[:, -1:]
    return torch.searchsorted(sums, heights, right=True)
