"""The command line ``vllm-mla``. Each command has a file of its own beside this one, which joins them."""

import logging
import os
import sys
from typing import Any

import typer

from mla_converters.cli import bench, card, convert, heal, logits, plan, verify
from mla_converters.cli import eval as evaluation
from mla_converters.cli.common import is_main_process
from mla_converters.errors import ConversionError, StoppedError

# typer carries a click of its own, whose errors it shows only through this base of one of them.
USAGE_ERROR: Any = typer.BadParameter.__mro__[1]
SHOWN = 200  # characters of a name

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
app.command(epilog=logits.EPILOG)(logits.logits)
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
        code = app(standalone_mode=False)
    except ConversionError as error:
        _complain(str(error))
        code = 130 if isinstance(error, StoppedError) else 2
    except USAGE_ERROR as error:
        code = _usage(error)
    except typer.Abort:
        code = 130
    except BrokenPipeError:
        # Whoever read the output has closed it; what was to be written is written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        _complain(_system_error(error))
        code = 2
    sys.exit(code or 0)


def _system_error(error: OSError) -> str:
    """What the system refused. A name that is too long, such as a text in place of its file, is cut off."""
    reason, name = error.strerror or str(error), str(error.filename)
    if error.filename is None:
        return f"Reading or writing failed: {reason}."
    shown = name if len(name) <= SHOWN else f"{name[:SHOWN]}…"
    return f"{shown} cannot be read or written: {reason}."


def _complain(sentence: str) -> None:
    if is_main_process():
        print(f"vllm-mla: error: {' '.join(sentence.split())}", file=sys.stderr)


def _usage(error: Any) -> int:
    """A command line that cannot be read: the help where nothing was asked, else one sentence."""
    if not sys.argv[1:]:
        error.show()
        return int(error.exit_code)
    command = error.ctx.command_path if error.ctx else "vllm-mla"
    _complain(f"{error.format_message().rstrip('.')}: see {command} --help.")
    return 2
