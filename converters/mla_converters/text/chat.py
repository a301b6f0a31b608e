"""Conversations: the tokens that a chat template puts around turns, and how a model writes both sides."""

from collections import deque
from dataclasses import dataclass
from datetime import date

import torch
from transformers import PreTrainedTokenizerBase

from mla_converters.errors import ConversionError

TURN = 256  # tokens after which a turn is ended, because a model may not know how to end a user's turn
TODAY = date(2024, 7, 26)  # the date that templates get; fixed, so that the same seed gives the same bytes on any day
USER, ANSWER, NEXT = "First question.", "An answer to it.", "Second question."


@dataclass(frozen=True)
class ChatTemplate:
    """The token ids that a chat template puts around turns.

    Attributes:
        opening: ids before the first turn of the user.
        joints: ids between the user's turn and the answer, and ids between the answer and the user's next turn.
        special: ids that end a turn, because no turn contains them.
    """

    opening: list[int]
    joints: tuple[list[int], list[int]]
    special: frozenset[int]


def chat_template(tokenizer: PreTrainedTokenizerBase, length: int) -> ChatTemplate:
    """Find the token ids that the tokenizer's chat template puts around turns.

    Args:
        tokenizer: the model's tokenizer.
        length: tokens of a conversation; the opening must be shorter.

    Raises:
        ConversionError: there is no template, it does not lay out turns one after another, or its opening is too long.
    """
    instead = "Leave chat out."
    if not tokenizer.chat_template:
        raise ConversionError(f"Text from chat needs a chat template, and the source has none. {instead}")
    turns = [{"role": role, "content": said} for role, said in (("user", USER), ("assistant", ANSWER), ("user", NEXT))]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, strftime_now=TODAY.strftime)
    except Exception as error:  # the template is a program, so it may fail in any way
        raise ConversionError(f"The source's chat template fails: {error}. {instead}") from error
    parts = []
    for turn in turns:
        before, _, text = text.partition(turn["content"])
        parts.append(tokenizer(before, add_special_tokens=False).input_ids)
    if not all(parts):
        raise ConversionError(f"The source's chat template changes turns, joins them or reorders them. {instead}")
    if len(parts[0]) >= length:
        raise ConversionError(
            f"The source's chat template begins with {len(parts[0])} tokens of its own, which leaves no room in "
            f"conversations of {length}. {instead}"
        )
    added = {token for token, content in tokenizer.added_tokens_decoder.items() if content.special}
    return ChatTemplate(parts[0], (parts[1], parts[2]), frozenset(added | set(tokenizer.all_special_ids)))


class Conversations:
    """Conversations that are sampled together. At the borders of turns, they replace sampled tokens by the template's.

    The model therefore writes the user's turns too, after the tokens that introduce them, as in Magpie (arXiv
    2406.08464).

    Args:
        template: the model's template.
        count: number of conversations; each already has the first token of the template's opening.
    """

    def __init__(self, template: ChatTemplate, count: int) -> None:
        self._template = template
        self._forced = [deque(template.opening[1:]) for _ in range(count)]
        self._turns = [0] * count  # turns that have ended, per conversation
        self._lengths = [0] * count  # tokens of the turn that has not ended, per conversation

    def follow(self, sampled: torch.Tensor) -> torch.Tensor:
        """The next tokens ``[conversations, 1]``: the sampled tokens, or the template's in their place."""
        return torch.tensor([[self._next(index, token)] for index, token in enumerate(sampled[:, 0].tolist())])

    def _next(self, index: int, token: int) -> int:
        forced = self._forced[index]
        if not forced:
            if token not in self._template.special and self._lengths[index] < TURN:
                self._lengths[index] += 1
                return token
            forced.extend(self._template.joints[self._turns[index] % 2])
            self._turns[index] += 1
            self._lengths[index] = 0
        return forced.popleft()
