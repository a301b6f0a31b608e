"""The problems of the task ``needles``, and the score of an answer. lm-evaluation-harness loads this file by its path.

A problem is a long text with :data:`NEEDLES` sentences hidden in it, each with the access code of another city. The
question at its end asks for one of them, so that a model cannot answer with the only code that it saw.
"""

import random
import re
import textwrap
from pathlib import Path
from typing import Any

from datasets import Dataset

from mla_converters.checkpoints.tokenizer import load_tokenizer

PROBLEMS = 40
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where the sentence that is asked for stands: a share of the text before it. They take turns."""
NEEDLES = 4
NEEDLE = "The access code of {city} is {code}."
QUESTION = "\n\nQuestion: What is the access code of {city}?\nAnswer: The access code of {city} is"
ROOM = 64
"""Tokens that the text leaves for the answer and for a chat template."""
LONGEST = 400
"""Characters of a sentence."""
CITIES = ("Athens", "Berlin", "Cairo", "Dublin", "Lima", "London", "Madrid", "Oslo", "Paris", "Rome", "Tokyo", "Vienna")


def build(length: int, text: str, tokenizer: str, trusted: bool, **_: Any) -> dict[str, Dataset]:
    """The data set of one length.

    Args:
        length: tokens of a problem, with the room for its answer.
        text: file to hide the sentences in; it is repeated as often as necessary.
        tokenizer: folder or hub id of the tokenizer that counts.
        trusted: whether code that the tokenizer brings may run.

    Returns:
        ``test``: :data:`PROBLEMS` rows with ``prompt``, ``answer`` and ``depth``.
    """
    counter = load_tokenizer(tokenizer, trusted)

    def count(words: str) -> int:
        return len(counter(words, verbose=False)["input_ids"])

    sentences = _sentences(Path(text).read_text(encoding="utf-8"))
    sizes = [count(" " + sentence) for sentence in sentences]
    rows = []
    for number in range(PROBLEMS):
        draw = random.Random(f"{length} {number}")
        cities = draw.sample(CITIES, NEEDLES)
        codes = [str(code) for code in draw.sample(range(10_000, 100_000), NEEDLES)]
        depth = DEPTHS[number % len(DEPTHS)]
        depths = [depth, *(draw.random() for _ in cities[1:])]
        needles = [NEEDLE.format(city=city, code=code) for city, code in zip(cities, codes, strict=True)]
        question = QUESTION.format(city=cities[0])
        first, room = draw.randrange(len(sentences)), length - ROOM - count(" ".join(needles) + question)
        hay: list[str] = []
        while (size := sizes[(first + len(hay)) % len(sizes)]) <= room:
            hay.append(sentences[(first + len(hay)) % len(sentences)])
            room -= size
        rows.append({"prompt": _hide(needles, depths, hay) + question, "answer": codes[0], "depth": depth})
    return {"test": Dataset.from_list(rows)}


def _sentences(text: str) -> list[str]:
    """The sentences of a text; what is longer than any sentence is cut into lines."""
    return [line for sentence in re.split(r"(?<=[.!?])\s+", text) for line in textwrap.wrap(sentence, LONGEST)]


def _hide(needles: list[str], depths: list[float], hay: list[str]) -> str:
    # From the back, so that places in front stay as they are. The one that is asked for goes in last, so that at depth
    # 1 nothing comes after it, and at depth 0 nothing before.
    for needle, depth in sorted(zip(needles[1:], depths[1:], strict=True), key=lambda each: -each[1]):
        hay = [*hay[: round(depth * len(hay))], needle, *hay[round(depth * len(hay)) :]]
    place = round(depths[0] * len(hay))
    return " ".join([*hay[:place], needles[0], *hay[place:]])


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the answer has the code that was asked for, as its first number."""
    numbers = re.findall(r"\d+", results[0].replace(",", ""))
    return {"found": float(numbers[:1] == [doc["answer"]])}
