"""Whether two tokenizers give the same: ids, text, and what a chat template makes of a conversation."""

from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any

from transformers import PreTrainedTokenizerBase

PROBE = """\
The keeper wrote down the weather every morning; "26 years", he said, isn't long -- is it? THEY'LL SEE.
def area(radius: float) -> float:
\treturn 3.14159 * radius ** 2  # πr²

    if x != 0 and y[1:] >= -2.5e-3: print(f"{x:>10}", end='\\r\\n')
Größe, naïve façade, Ærøskøbing, Łódź, mañana; e\u0301 is \u00e9. Ελλάδα Россия שלום مرحبا नमस्ते สวัสดี
天気がいいから、散歩しましょう。 你好\uff0c世界\uff01 안녕하세요 1234567890 ２０２４年 ①½
🎉👩‍👩‍👧‍👦🇪🇺 ∑∫≠ <b>&amp;</b> https://example.org/a_b?c=d%20e  two   three    four


\tend  \u00a0\u200b\n"""
"""Text that tokenizers of different kinds cut differently."""
CONVERSATION = (
    {"role": "user", "content": "What is 12 * 12?  Show  it."},
    {"role": "assistant", "content": "12 * 12 = 144\n\n"},
    {"role": "user", "content": " Und auf Französisch? 🎉"},
)
YEAR = "2024"  # what templates are told that ask for the date, so that midnight makes no difference
SHOWN = 6  # ids or characters of a difference that are named


def tokenizer_difference(expected: PreTrainedTokenizerBase, got: PreTrainedTokenizerBase) -> str | None:
    """The first thing that ``got`` does otherwise than ``expected``, as a clause; None if both do the same."""
    for theirs, ours in zip_longest(_behaviour(expected), _behaviour(got)):
        if theirs != ours:
            what = (theirs or ours)[0]
            wanted, found = (pair[1] if pair else None for pair in (theirs, ours))
            start = _first_difference(found, wanted)
            place = "" if start is None else f" from position {start} on"
            return f"{what} gives {_shown(found, start)}{place}, where {_shown(wanted, start)} was expected"
    return None


def same_ids(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give the same ids for text; special tokens that only one of them has do not count."""
    ours, theirs = one.get_vocab(), other.get_vocab()
    probes = (tokenizer(PROBE, add_special_tokens=False, verbose=False).input_ids for tokenizer in (one, other))
    return len(set(map(tuple, probes))) == 1 and all(theirs[token] == ours[token] for token in ours.keys() & theirs)


def _behaviour(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, Any]]:
    """What a tokenizer does: descriptions and values."""

    def ids(text: str, special: bool = False) -> list[int]:
        return tokenizer(text, add_special_tokens=special, verbose=False).input_ids

    def chat(template: str | None) -> list[int]:
        turns = [dict(turn) for turn in CONVERSATION]
        arguments = {"tokenize": False, "add_generation_prompt": True, "strftime_now": lambda _: YEAR}
        return ids(tokenizer.apply_chat_template(turns, chat_template=template, **arguments))

    named = " ".join(("a", *sorted(_special_tokens(tokenizer)), "b"))
    yield "text", _tried(lambda: ids(PROBE))
    yield "text with special tokens around it", _tried(lambda: ids(PROBE, special=True))
    yield "no text", _tried(lambda: ids("", special=True))
    yield "text that names special tokens", _tried(lambda: ids(named))
    yield "decoding", _tried(lambda: tokenizer.decode(ids(PROBE)))
    yield "decoding without special tokens", _tried(lambda: tokenizer.decode(ids(named), skip_special_tokens=True))
    for name in ("bos_token_id", "eos_token_id", "padding_side", "truncation_side", "model_max_length"):
        yield name, getattr(tokenizer, name)
    templates = tokenizer.chat_template
    for template in sorted(templates) if isinstance(templates, dict) else [None] if templates else []:
        what = "the chat template" if template is None else f"the chat template {template}"
        yield what, _tried(lambda template=template: chat(template))  # type: ignore[misc]


def _tried(action: Callable[[], Any]) -> Any:
    """What an action returns, or how it fails: templates are programs, and some vocabularies lack characters."""
    try:
        return action()
    except Exception as error:
        return f"the error {error}"


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}


def _first_difference(one: Any, other: Any) -> int | None:
    """Where two sequences begin to differ; None for what are no sequences."""
    if not (isinstance(one, list | str) and isinstance(other, list | str)):
        return None
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def _shown(value: Any, start: int | None) -> str:
    return repr(value if start is None else value[start : start + SHOWN])
