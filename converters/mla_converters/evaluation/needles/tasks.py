"""The YAML files of the task ``needles``: one for each length, and one for all."""

import json
import re
from pathlib import Path

from mla_converters.checkpoints.models import Model
from mla_converters.errors import OptionError

GROUP = "needles"
ONE_LENGTH = re.compile(rf"{GROUP}_(\d+)")
BASE = Path(__file__).with_name("needles.yaml")
TEXT = Path(__file__).with_name("text.txt")
SHORTEST = 512
"""Tokens of the shortest problems: shorter ones hold little but the hidden sentences."""
FIRST = 1024
"""Tokens of the shortest problems of the group; those that follow are twice as long each."""
DEFAULT_CONTEXT = 32768
"""The longest problems for models without a limit."""


def write_tasks(folder: Path, names: tuple[str, ...], models: list[Model], text: Path | None) -> None:
    """Write the tasks that ``names`` ask for, for lm-evaluation-harness to find.

    Args:
        folder: for the YAML files.
        names: of all tasks; those of other tasks are left out.
        models: all models, which get the same problems. The first one's tokenizer counts.
        text: to hide facts in; None for the text that comes with the package.

    Raises:
        OptionError: a length does not fit.
    """
    longest = min(model.context or DEFAULT_CONTEXT for model in models)
    asked = [int(match[1]) for name in names if (match := ONE_LENGTH.fullmatch(name))]
    for length in asked:
        if not SHORTEST <= length <= longest:
            raise OptionError(
                f"--tasks has needles_{length}, but needles need at least {SHORTEST} tokens, and the models' contexts "
                f"have {longest}."
            )
    if GROUP in names:
        if longest < SHORTEST:
            raise OptionError(f"--tasks needles needs contexts of at least {SHORTEST} tokens, but they have {longest}.")
        lengths = lengths_up_to(longest)
        _write(folder / f"{GROUP}.yaml", {"group": GROUP, "task": [f"{GROUP}_{length}" for length in lengths]})
        asked += lengths
    local = Path(models[0].path)
    for length in asked:
        _write(
            folder / f"{GROUP}_{length}.yaml",
            {
                "include": str(BASE),
                "task": f"{GROUP}_{length}",
                "dataset_kwargs": {
                    "length": length,
                    "text": str((text or TEXT).resolve()),
                    "tokenizer": str(local.resolve()) if local.exists() else models[0].path,
                    "trusted": models[0].trust_remote_code,  # the harness removes the usual name
                },
            },
        )


def lengths_up_to(longest: int) -> list[int]:
    """Powers of two from :data:`FIRST` on, and the longest length."""
    lengths, length = [], FIRST
    while length < longest:
        lengths.append(length)
        length *= 2
    return [*lengths, longest]


def _write(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content))  # JSON is YAML
