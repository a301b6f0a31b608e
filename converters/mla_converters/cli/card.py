"""``vllm-mla card``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mla_converters.errors import OptionError
from mla_converters.reports.evaluation import WRITER, EvaluationReport

EPILOG = """
**Examples**

With the perplexity that you measured:

`vllm-mla eval ./smol-mla --reference HuggingFaceTB/SmolLM2-135M-Instruct --text my.txt --json smol.json`

`vllm-mla card ./smol-mla --eval smol.json`
"""


def card(
    model: Annotated[Path, typer.Argument(help="Folder that `vllm-mla convert` wrote.")],
    evaluation: Annotated[
        Path | None, typer.Option("--eval", help="What `vllm-mla eval MODEL --json FILE` wrote.")
    ] = None,
) -> None:
    """Write MODEL's card again, from its conversion report: README.md and its picture."""
    # Imported here, not above: `--help` should not wait for torch.
    from mla_converters.cards.card import update_card
    from mla_converters.support.json_files import read_json_object

    if evaluation is not None and not evaluation.is_file():
        raise OptionError(f"--eval is {evaluation}, which is not a file.")
    measured = None
    if evaluation is not None:
        measured = EvaluationReport.parse(read_json_object(evaluation), str(evaluation), WRITER)
    written = update_card(model, evaluation=measured)
    Console().print(f"Wrote {', '.join(map(str, written))}", highlight=False, soft_wrap=True)
