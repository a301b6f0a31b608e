"""The vocabulary of a GGUF model, and the roles of its tokens."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from gguf.constants import TokenType

from mla_converters.checkpoints.gguf.keys import shown
from mla_converters.checkpoints.gguf.parts import Gguf
from mla_converters.checkpoints.gguf.splits import CUTTINGS, Cutting
from mla_converters.errors import ConversionError

PREFIX = "tokenizer.ggml."
NONE = ("none", "no_vocab")  # kinds of files that come without a tokenizer
BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
ROLES = ("bos", "eos", "eot", "eom", "unknown", "padding")
READ = (
    "model",
    "pre",
    "tokens",
    "token_type",
    "scores",
    "merges",
    "add_bos_token",
    "add_eos_token",
    "add_space_prefix",
)
WITHOUT_EFFECT = (
    *("seperator_token_id", "mask_token_id", "cls_token_id", "add_sep_token"),  # of models that complete no text
    *("prefix_token_id", "suffix_token_id", "middle_token_id"),  # older names of the next ones
    *(f"fim_{part}_token_id" for part in ("pre", "suf", "mid", "pad", "rep", "sep")),  # for whoever fills gaps in text
    "remove_extra_whitespaces",  # refused where it is true
    "token_type_count",
)
NO_IDS = (-1, 2**32 - 1)  # the second is -1 in 32 bits without sign
SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}  # where a file names none, as llama.cpp takes them
WHOLE_TYPES = (TokenType.CONTROL, TokenType.USER_DEFINED)  # of tokens that are found in text before it is cut
ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<EOT>",
)
"""Tokens that end a turn or a text in whichever model has them; llama.cpp stops at them too."""


@dataclass(frozen=True)
class Vocabulary:
    """Tokens and their roles.

    Attributes:
        cutting: how a byte-level tokenizer cuts text; None for SentencePiece's.
        tokens: texts, by id.
        types: their types, as llama.cpp has them.
        scores: of SentencePiece's tokens; a token with a higher score is merged first.
        merges: of a byte-level tokenizer, in order, each ``"left right"``.
        ids: of the special tokens that the file names: ``bos``, ``eos``, ``eot``, ``eom``, ``unknown``, ``padding``.
        adds_bos, adds_eos: whether these tokens are put around a text.
        adds_space: whether SentencePiece puts a space before a text.
    """

    cutting: Cutting | None
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    ids: dict[str, int]
    adds_bos: bool
    adds_eos: bool
    adds_space: bool

    def ends(self) -> list[int]:
        """All ids at which a text ends, ascending."""
        marked = zip(self.tokens, self.types, strict=True)
        known = {i for i, (text, kind) in enumerate(marked) if text in ENDS and kind in WHOLE_TYPES}
        return sorted(known.union(self.ids[role] for role in ("eos", "eot", "eom") if role in self.ids))


def read_vocabulary(gguf: Gguf) -> Vocabulary | None:
    """The vocabulary; None where the file comes without a tokenizer.

    Raises:
        ConversionError: it is of a kind that is not supported, or is damaged.
    """
    kind = _key(gguf, "model", str, "missing" if f"{PREFIX}tokens" in gguf.keys else NONE[0])
    if kind in NONE:
        return None
    if kind not in (BYTE_LEVEL, SENTENCEPIECE):
        raise _unsupported(gguf, "model", kind, (BYTE_LEVEL, SENTENCEPIECE))
    cutting = None if kind == SENTENCEPIECE else _cutting(gguf)
    tokens = _list(gguf, "tokens", str)
    vocabulary = Vocabulary(
        cutting=cutting,
        tokens=tokens,
        types=_list(gguf, "token_type", int, len(tokens), TokenType.NORMAL),
        scores=_list(gguf, "scores", float, len(tokens)) if cutting is None else [],
        merges=[] if cutting is None else _list(gguf, "merges", str),
        ids=_ids(gguf, len(tokens), {} if cutting else SENTENCEPIECE_IDS),
        adds_bos=_key(gguf, "add_bos_token", bool, cutting is None or cutting.begins),
        adds_eos=_key(gguf, "add_eos_token", bool, False),
        adds_space=_key(gguf, "add_space_prefix", bool, cutting is None),
    )
    _check(gguf, vocabulary)
    return vocabulary


def unknown_keys(gguf: Gguf) -> list[str]:
    """Keys of the tokenizer that were not understood, by their full names."""
    known = {*READ, *(f"{role}_token_id" for role in ROLES), *WITHOUT_EFFECT}
    return sorted(name for name in gguf.keys if name.startswith(PREFIX) and name.removeprefix(PREFIX) not in known)


def _cutting(gguf: Gguf) -> Cutting:
    name = _key(gguf, "pre", str, "missing")
    if name not in CUTTINGS:
        raise _unsupported(gguf, "pre", name, tuple(CUTTINGS))
    return CUTTINGS[name]


def _ids(gguf: Gguf, count: int, default: dict[str, int]) -> dict[str, int]:
    found = dict(default)
    for role in ROLES:
        name = f"{role}_token_id"
        value = found[role] = _key(gguf, name, int, found.get(role, -1))
        if value in NO_IDS:
            del found[role]
        elif not 0 <= value < count:
            raise ConversionError(f"{gguf.path} has {PREFIX}{name} {value}, and its tokenizer has {count:,} tokens.")
    return found


def _check(gguf: Gguf, vocabulary: Vocabulary) -> None:
    """Refuse a vocabulary that would give other ids here than in llama.cpp."""
    for text, count in Counter(filter(None, vocabulary.tokens)).most_common(1):
        if count > 1:
            raise ConversionError(f"{gguf.path} has the token {text!r} {count} times in {PREFIX}tokens.")
    if _key(gguf, "remove_extra_whitespaces", bool, False) or (vocabulary.cutting and vocabulary.adds_space):
        name = "add_space_prefix" if vocabulary.cutting else "remove_extra_whitespaces"
        raise _unsupported(gguf, name, True, (False,))
    for role, added in (("bos", vocabulary.adds_bos), ("eos", vocabulary.adds_eos)):
        if added and role not in vocabulary.ids:
            raise ConversionError(f"{gguf.path} puts {role} around a text, and lacks {PREFIX}{role}_token_id.")


def _list(gguf: Gguf, name: str, kind: type, count: int | None = None, default: Any = None) -> list[Any]:
    values = gguf.keys.get(PREFIX + name)
    if values is None and default is not None:
        return [default] * (count or 0)
    if not isinstance(values, list) or not all(type(value) is kind for value in values) or not values:
        raise ConversionError(
            f"{gguf.path} lacks {PREFIX}{name}, or has something else there than {kind.__name__} values."
        )
    if count is not None and len(values) != count:
        raise ConversionError(f"{gguf.path} has {len(values):,} values in {PREFIX}{name}, and {count:,} tokens.")
    return values


def _key(gguf: Gguf, name: str, kind: type, default: Any) -> Any:
    value = gguf.keys.get(PREFIX + name, default)
    if type(value) is not kind:
        raise ConversionError(f"{gguf.path} has {PREFIX}{name} {shown(value)}, where {kind.__name__} was expected.")
    return value


def _unsupported(gguf: Gguf, name: str, value: Any, known: tuple[Any, ...]) -> ConversionError:
    return ConversionError(
        f"{gguf.path} has {PREFIX}{name} {value!r}, a tokenizer that is not supported; supported are: "
        f"{', '.join(map(str, known))}."
    )
