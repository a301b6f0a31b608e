"""Compares quality at each size of the cache, in bytes: conversions, and the source's own cache in fewer bits.

    python -m benchmarks.quality --valid wiki.valid.tokens --test wiki.test.raw

The source is SmolLM2-135M-Instruct. Every row says how many bytes a token's cache has, scales and padding included, as
a share of the source's in 16 bits. The rows:

- ``rival``: no conversion, but the source's own cache in fewer bits, simulated (``benchmarks/rivals.py``). ``--only
  '^(source|rival)'`` measures these in half an hour.
- ``packed``: conversions with a packed cache (``--cache-ratio``, bits chosen with the sizes).
- all others: conversions that cache numbers of 16 bits.

Calibration texts:

- WikiText-2's validation split (tokenised form, marks undone): 32 windows of 2,048 tokens for ``attention-aware`` with
  refit, 8 such windows without, and 32 windows of 512 tokens for ``transmla`` and ``mha2mla``,
- ``self``: text that the model writes.

Healed rows are trained on 65,536 tokens of the same text after the conversion. Of these, 1/32 is held out. Windows have
256 to 1,024 tokens and are seen once or twice, depending on how much the conversion lost. The rows differ in the
conversion, and have variants with other texts:

- ``healed``: converted by the map alone, without a refit or least squares; also on ``self``, or half on each,
- ``closed-form healed``: converted with least squares; also on 32,768 tokens of ``self``,
- ``refit healed``: converted with a refit; also on 65,536 tokens of ``self`` in addition to those of the text,
- ``self healed``: converted with a refit on 16,384 tokens of ``self``, healed on ``self``.

Scores are perplexities in float32: of the first 8 windows of 1,024 tokens of WikiText-2's raw test split, of its first
2 windows of 4,096 tokens, and of 8 windows of 1,024 tokens of another domain, which is the source code of Python's
``argparse``. Some rows are also scored through vLLM.

Rows that are in the result file already are kept: remove it to measure them again, or choose rows with ``--only``.
"""

import re
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import CODE, RESULTS, convert, cost, evaluate, heal, plain_text, result, row_parser, write_result
from benchmarks.quality_jobs import Job, jobs
from benchmarks.quality_plot import draw
from benchmarks.rivals import RIVALS, Rival, perplexity
from mla_converters.checkpoints.models import Model, read_config
from scripts.demo_model import demo_folder

COMMAND = "python -m benchmarks.quality --valid wiki.valid.tokens --test wiki.test.raw"
OLDER = "older_rows"
"""Rows that were measured before ``--cache-ratio`` counted bytes; the result file says how they compare."""
LONG, OTHER = "perplexity_at_4096", "perplexity_of_code"
SCORES = {"perplexity": (8, 1024), LONG: (2, 4096), OTHER: (8, 1024)}
"""For each score the number of windows, and the tokens in each."""


def main() -> None:
    """Measure the rows that are missing; write the result file after every row, and the plot at the end."""
    arguments = row_parser(__doc__).parse_args()
    before = result("quality")
    rows = before.get("rows", {})
    older = before.get(OLDER, {"rows": {}})
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch, "calibration.txt")
        text.write_text(plain_text(arguments.valid))
        wanted = partial(_is_wanted, rows, arguments.only)
        for name, row in _measure(text, arguments.test, wanted):
            rows[name] = row
            print(name, row, flush=True)
            write_result("quality", COMMAND, {"rows": rows, OLDER: older})
    draw({**older["rows"], **rows}, RESULTS / "quality.png")


def _is_wanted(rows: dict[str, Any], only: str, name: str) -> bool:
    return name not in rows and re.search(only, name) is not None


def _measure(text: Path, test: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The wanted rows by name, as they are measured.

    Args:
        text: for calibration and healing.
        test: text to score.
        wanted: whether a row is, by name.
    """
    source = demo_folder()
    if wanted("source"):
        link = text.with_name("source")
        link.symlink_to(source)
        yield "source", {"bytes": 1.0, "cached": 384, **_scores(link, test)}
    for name, rival in RIVALS.items():
        if wanted(f"rival {name}"):
            yield f"rival {name}", _rival_row(source, rival, test)
    converted = None
    out = text.with_name("model")
    for name, job in jobs(text).items():
        if wanted(name):
            if converted is None or converted[0] != job.options:
                converted = job.options, convert(source, out, *job.options)
            yield name, _row(job, converted[1], out, text, test)


def _rival_row(source: Path, rival: Rival, test: Path) -> dict[str, float]:
    config = read_config(source, trust_remote_code=False)
    scores = {
        name: round(perplexity(source, rival, CODE if name == OTHER else test, *windows), 3)
        for name, windows in SCORES.items()
    }
    return {
        "bytes": round(rival.share(config, 1024), 4),
        "bytes_at_4096": round(rival.share(config, 4096), 4),
        **scores,
    }


def _row(job: Job, report: dict[str, Any], converted: Path, text: Path, test: Path) -> dict[str, Any]:
    """Heal a converted model, if that is the job, and score it."""
    model, healing = converted, {}
    if job.healing is not None:
        model = text.with_name("healed")
        of_healing = heal(converted, model, *job.healing)
        kl = of_healing["healing"]["kl_held_out"]
        healing = {"healing": {"options": _shown(job.healing, text), "kl": kl, **cost(of_healing)}}
    checkpoint = Model(model.name, str(model), read_config(model, trust_remote_code=False))
    row = {
        "bytes": round(checkpoint.cached_bytes / (2 * report["cached_per_token_and_layer"]["source"]), 4),
        "cached": checkpoint.cached_numbers,
        "split": f"{report['kv_lora_rank']}+{report['qk_rope_head_dim']}",
        **({"latent_cache": checkpoint.cache_format} if checkpoint.cache_format else {}),
        **{name: value for name, value in report["settings"].items() if name == "freqfold"},
        "options": _shown(job.options, text),
        **_scores(model, test, job.long_windows),
        **cost(report),
        **healing,
    }
    if job.in_vllm:
        row["perplexity_in_vllm"] = round(evaluate(model, test, "--engine", "vllm")["perplexity"], 3)
    return row


def _scores(model: Path, test: Path, long_windows: bool = True) -> dict[str, float]:
    """Perplexities of a model on the test text, on the other text and, if asked for, in longer windows."""
    scores = {}
    for name, (windows, length) in SCORES.items():
        if name != LONG or long_windows:
            how = ("--windows", str(windows), "--length", str(length))
            scores[name] = round(evaluate(model, CODE if name == OTHER else test, *how)["perplexity"], 3)
    return scores


def _shown(options: list[str], text: Path) -> str:
    """Options as they stand in the result file, without the text's path."""
    return " ".join(options).replace(str(text), "FILE")


if __name__ == "__main__":
    main()
