"""The command line: ``vllm-mla``. One file per command below ``commands/``; this one joins them."""

import logging
import os
import sys

import typer

from mla_converters.cli import bench, card, convert, heal, plan, verify
from mla_converters.cli import eval as evaluation
from mla_converters.errors import ConversionError, StoppedError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Serve any GQA or MHA model with Multi-head Latent Attention in vLLM.",
    epilog="Start with: `vllm-mla convert MODEL ./model-mla`, then `vllm serve ./model-mla`.",
)


app.command(epilog=plan.EPILOG)(plan.plan)
app.command(epilog=convert.EPILOG)(convert.convert)
app.command(epilog=heal.EPILOG)(heal.heal)
app.command(epilog=verify.EPILOG)(verify.verify)
app.command("eval", epilog=evaluation.EPILOG)(evaluation.evaluate)
app.command(epilog=card.EPILOG)(card.card)
app.command(epilog=bench.EPILOG)(bench.bench)


def main() -> None:
    """Entry point of the console script: bad input ends in one sentence and exit code 2."""
    # vLLM's and transformers' notices are about serving and training, not about converting.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except ConversionError as error:
        message = " ".join(str(error).split())
        print(f"vllm-mla: error: {message}", file=sys.stderr)
        sys.exit(130 if isinstance(error, StoppedError) else 2)
