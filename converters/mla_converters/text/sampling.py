"""Calibration text that the model writes itself."""

import inspect

import torch
from rich.progress import Progress
from transformers import Cache, DynamicLayer

from mla_converters.checkpoints.loadable import from_pretrained
from mla_converters.checkpoints.source import Source
from mla_converters.errors import ConversionError
from mla_converters.support.devices import native_bfloat16
from mla_converters.text.chat import ChatTemplate, Conversations

LENGTH = 512  # tokens of a text; short, because many short texts say more than a few long ones
TOKENS = 36 * LENGTH  # tokens of the texts that are sampled together: by default all, with those to be held out


def sampling_dtype(device: str) -> torch.dtype:
    """The dtype in which the model samples: the faster one, because the precision of sampled text does not matter."""
    return torch.bfloat16 if native_bfloat16(device) else torch.float32


class ReservedLayer(DynamicLayer):
    """A cache layer that reserves memory for the keys and values of a whole text.

    It replaces transformers' own layer, because that one copies all keys and values at every token.

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
        """Append keys and values ``[texts, g, tokens, d]``, and return all of them so far."""
        if not self._reserved:
            self.lazy_initialization(key_states, value_states)
            self._reserved = [x.new_empty(*x.shape[:2], self._length, x.shape[-1]) for x in (key_states, value_states)]
        first, self._filled = self._filled, self._filled + key_states.shape[2]
        for reserved, states in zip(self._reserved, (key_states, value_states), strict=True):
            reserved[:, :, first : self._filled] = states
        self.keys, self.values = (reserved[:, :, : self._filled] for reserved in self._reserved)
        return self.keys, self.values

    def get_seq_length(self, *args: object) -> int:
        """How many tokens the layer holds."""
        return self._filled


@torch.inference_mode()
def sampled_texts(
    source: Source,
    first: torch.Tensor,
    never: torch.Tensor,
    length: int,
    generator: torch.Generator,
    progress: Progress,
    device: str,
    template: ChatTemplate | None = None,
) -> torch.Tensor:
    """Texts that the model writes after a first token, sampled at temperature 1.

    LLM-QAT (arXiv 2305.17888) generates its training data in this way.

    Args:
        source: the model.
        first: ``[texts]``, the first token id of each text.
        never: token ids that are never sampled.
        length: tokens of each text.
        generator: draws the tokens.
        progress: shows the progress.
        device: where the model runs.
        template: if given, the texts are conversations in this template.

    Returns:
        ``[texts, length]`` int64.

    Raises:
        ConversionError: the model's logits are not numbers.
    """
    model = from_pretrained(source.model_folder, source.config, dtype=sampling_dtype(device))
    # transformers 5.24 renames the argument.
    argument = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    model.to(device)
    batches = first[:, None].split(max(1, TOKENS // length))
    task = progress.add_task("Sampling text", total=len(batches) * (length - 1))
    texts = []
    for ids in batches:
        cache = Cache(layers=[ReservedLayer(length) for _ in range(source.config.num_hidden_layers)])
        # All tokens are reserved at once. A small tensor that stayed after each step would occupy a part of the memory
        # that the step's logits had freed, and the logits of the next step would need new memory.
        tokens = ids.repeat(1, length)
        conversations = Conversations(template, len(ids)) if template else None
        for position in range(1, length):
            last = tokens[:, position - 1 : position]
            logits = model(last.to(device), **{argument: cache}, use_cache=True).logits[:, -1].float()
            sums = logits.index_fill(1, never.to(device), float("-inf")).softmax(-1).double().cumsum(-1)
            if not sums[:, -1].isfinite().all():
                raise ConversionError(f"The model in {source.name} gives logits that are not numbers: it is broken.")
            sampled = drawn(sums, generator)
            tokens[:, position : position + 1] = conversations.follow(sampled) if conversations else sampled
            progress.advance(task)
        texts.append(tokens)
    return torch.cat(texts)


def drawn(sums: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw a token id for each text, ``[texts, 1]``, from running sums of probabilities ``[texts, vocabulary]``.

    This takes one random number per text. ``torch.multinomial`` takes one for each token of the vocabulary, which needs
    a seventh of the time of a small model.
    """
    # Random numbers come from the CPU's generator, so that a seed means the same on every device.
    heights = torch.rand(len(sums), 1, dtype=sums.dtype, generator=generator).to(sums.device) * sums[:, -1:]
    return torch.searchsorted(sums, heights, right=True).cpu()
