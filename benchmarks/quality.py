"""Compares the quality of all methods at each cache size: converts, scores with ``vllm-mla eval``, tabulates, plots.

    python -m benchmarks.quality --valid wiki.valid.tokens --test wiki.test.raw

The source is SmolLM2-135M-Instruct. Calibration texts:

- WikiText-2's validation split (tokenised form, marks undone): 32 windows of 2,048 tokens for ``attention-aware`` with
  refit, 8 such windows without, and 32 windows of 512 tokens for ``transmla`` and ``mha2mla``,
- ``self``: text that the model writes.

Healed rows are trained on 65,536 tokens of the same text after the conversion. Of these, 1/32 is held out. Windows have
256 to 1,024 tokens and are seen once or twice, depending on how much the conversion lost. The rows differ in the
conversion, and have variants with other texts:

- ``healed``: converted by the map alone, without a refit or least squares; also on ``self``, or half on each,
- ``closed-form healed``: converted with least squares; also on 32,768 tokens of ``self``,
- ``refit healed``: converted with a refit; also on 65,536 tokens of ``self`` in addition to those of the text.

Scores are perplexities in float32: of the first 8 windows of 1,024 tokens of WikiText-2's raw test split, of its first
2 windows of 4,096 tokens, and of 8 windows of 1,024 tokens of another domain, which is the source code of Python's
``argparse``. Some rows are also scored through vLLM.

Rows that are in the result file already are kept: remove it to measure them again, or choose rows with ``--only``.
"""

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import (
    CODE,
    RESULTS,
    convert,
    cost,
    evaluate,
    heal,
    measured_rows,
    plain_text,
    row_parser,
    write_result,
)
from mla_converters.options import Ingredient
from mla_converters.support.plots import png
from scripts.demo_model import demo_folder

COMMAND = "python -m benchmarks.quality --valid wiki.valid.tokens --test wiki.test.raw"
# Cached numbers per token and layer (the source has 384), split as in TransMLA's paper and code.
SPLITS = {192: (128, 64), 128: (96, 32), 96: (64, 32), 48: (32, 16)}
# Perplexity of checkpoints that TransMLA's own code wrote, with the same calibration text and the same scoring.
TRANSMLA_OWN_CODE = {192: 55.72, 128: 96.4, 96: 155.2, 48: 436.5}
# Rows that are converted by the map alone and not on the file alone: their texts, for conversion and healing.
OTHER_TEXTS = {"healed self": ("self",), "healed text and self": ("FILE", "self")}
MAP_ALONE = ["--without", Ingredient.LEAST_SQUARES]
# The ingredients of a layer's map.
OF_THE_MAP = [
    ingredient
    for ingredient in Ingredient
    if ingredient not in (Ingredient.LEAST_SQUARES, Ingredient.CONVERTED_INPUTS, Ingredient.MLP)
]
SIZES = {"": [], " per layer": ["--layer-sizes", "measured"]}
# The rows that the plot shows.
LABELS = {
    "transmla": "TransMLA (ours)",
    "mha2mla": "MHA2MLA (ours)",
    "closed-form": "attention-aware, closed form",
    "attention-aware": "attention-aware",
    "refit healed": "attention-aware, healed",
    "refit healed text and self": "attention-aware, healed on text and self",
    "refit healed per layer": "attention-aware, sizes per layer, healed",
    "self": "attention-aware, self-calibrated",
    "closed-form healed self": "closed form, self-calibrated, healed on self",
}


@dataclass(frozen=True)
class Job:
    """The model that a row measures.

    Attributes:
        width: numbers cached per token and layer.
        options: of ``vllm-mla convert``.
        healing: options of ``vllm-mla heal``; None for a model that is not healed.
    """

    width: int
    options: list[str]
    healing: list[str] | None = None


def jobs(text: Path) -> dict[str, Job]:
    """Every row by its name. Rows with the same conversion follow each other, so that it runs once."""
    plain = ["--calibration", str(text)]
    both = [*each("--text", [str(text), "self"]), "--tokens", "131072"]
    rows = {"exact": Job(384, ["--method", "exact"])}
    for width, (rank, rope) in SPLITS.items():
        split = ["--kv-lora-rank", str(rank), "--qk-rope-head-dim", str(rope)]
        ratio = ["--cache-ratio", str(width / 384)]
        rows[f"transmla {width}"] = Job(width, ["--method", "transmla", *split, *plain])
        rows[f"mha2mla {width}"] = Job(width, ["--method", "mha2mla", *split, *plain])
        for sizes, option in SIZES.items():
            closed_form = [*ratio, *plain, "--refit-steps", "0", *option]
            refitted = [*ratio, *plain, "--calibration-tokens", "65536", *option]
            rows[f"closed-form{sizes} {width}"] = Job(width, closed_form)
            rows[f"closed-form healed{sizes} {width}"] = Job(width, closed_form, ["--text", str(text)])
            rows[f"map{sizes} {width}"] = Job(width, [*closed_form, *MAP_ALONE])
            rows[f"healed{sizes} {width}"] = Job(width, [*closed_form, *MAP_ALONE], ["--text", str(text)])
            rows[f"attention-aware{sizes} {width}"] = Job(width, refitted)
            rows[f"refit healed{sizes} {width}"] = Job(width, refitted, ["--text", str(text)])
            rows[f"refit healed text and self{sizes} {width}"] = Job(width, refitted, both)
        rows[f"self {width}"] = Job(width, ratio)
        healing = ["--text", "self", "--tokens", "32768"]
        rows[f"closed-form healed self {width}"] = Job(width, [*ratio, "--refit-steps", "0"], healing)
        for kind, origins in OTHER_TEXTS.items():
            texts = [str(text) if origin == "FILE" else origin for origin in origins]
            mapped = [*ratio, *each("--calibration", texts), "--refit-steps", "0", *MAP_ALONE]
            rows[f"{kind} {width}"] = Job(width, mapped, each("--text", texts))
    closed_form = ["--kv-lora-rank", "128", "--qk-rope-head-dim", "64", *plain, "--refit-steps", "0"]
    refitted = rows["attention-aware 192"].options
    rows["without none"] = Job(192, closed_form)
    rows["without mlp"] = Job(192, [*refitted, "--without", Ingredient.MLP])
    for ingredient in (Ingredient.LEAST_SQUARES, Ingredient.CONVERTED_INPUTS, Ingredient.RANDOM_TOKENS):
        rows[f"without {ingredient}"] = Job(192, [*closed_form, "--without", ingredient])
    for ingredient in OF_THE_MAP:  # without least squares, which repair a part of the loss
        rows[f"without least-squares, {ingredient}"] = Job(192, [*closed_form, *MAP_ALONE, "--without", ingredient])
    return rows


def each(option: str, values: Sequence[str]) -> list[str]:
    """The option once for each value."""
    return [word for value in values for word in (option, value)]


def shown(options: list[str], text: Path) -> str:
    """Options as they stand in the result file, without the text's path."""
    return " ".join(options).replace(str(text), "FILE")


def scores(model: Path, test: Path, long_windows: bool = True) -> dict[str, float]:
    """Perplexities of a model on the test text, on the other text and, if asked for, in longer windows."""
    options = {
        "perplexity": (test,),
        "perplexity_at_4096": (test, "--length", "4096", "--windows", "2"),
        "perplexity_of_code": (CODE,),
    }
    if not long_windows:
        del options["perplexity_at_4096"]
    return {name: round(evaluate(model, *how)["perplexity"], 3) for name, how in options.items()}


def draw(rows: dict[str, dict], path: Path) -> None:
    """Draw perplexity against cache size, one line for each method."""
    with png(path) as figure:
        figure.set_size_inches(7, 7)
        axes = figure.add_subplot()
        axes.plot(*zip(*TRANSMLA_OWN_CODE.items(), strict=True), "x--", color="gray", label="TransMLA's own code")
        for kind, label in LABELS.items():
            points = [(width, rows[name]["perplexity"]) for width in SPLITS if (name := f"{kind} {width}") in rows]
            if points:  # joined by a line only if no size is missing, because lines are not straight
                axes.plot(*zip(*points, strict=True), "o-" if len(points) == len(SPLITS) else "o", label=label)
        axes.axhline(rows["source"]["perplexity"], color="black", linewidth=1, label="source (384)")
        axes.set_yscale("log")
        axes.set_xlabel("numbers cached per token and layer")
        axes.set_ylabel("WikiText-2 perplexity")
        figure.legend(loc="outside lower center", ncols=2, fontsize="x-small")
        axes.grid(alpha=0.3, which="both")


def main() -> None:
    """Measure the rows that are missing; write the result file after every row, and the plot at the end."""
    arguments = row_parser(__doc__).parse_args()

    rows = measured_rows("quality")
    with tempfile.TemporaryDirectory() as scratch:
        text, out, healed = (Path(scratch) / name for name in ("calibration.txt", "model", "healed"))
        text.write_text(plain_text(arguments.valid))
        if "source" not in rows:
            out.symlink_to(demo_folder())
            rows["source"] = {"cached": 384, **scores(out, arguments.test)}
            out.unlink()
        converted = None
        for name, job in jobs(text).items():
            if name in rows or not re.search(arguments.only, name):
                continue
            if job.options != converted:
                report = convert(demo_folder(), out, *job.options)
                converted = job.options
            model = out
            healing: dict[str, Any] = {}
            if job.healing is not None:
                of_healing = heal(out, healed, *job.healing)
                model = healed
                kl = of_healing["healing"]["kl_held_out"]
                healing = {"options": shown(job.healing, text), "kl": kl, **cost(of_healing)}
            rows[name] = {
                "cached": job.width,
                "split": f"{report['kv_lora_rank']}+{report['qk_rope_head_dim']}",
                **{name: value for name, value in report["settings"].items() if name == "freqfold"},
                "options": shown(job.options, text),
                **scores(model, arguments.test, long_windows=not name.startswith("without")),
                **cost(report),
                **({"healing": healing} if healing else {}),
            }
            if name.startswith(("attention-aware", "self")) or "healed" in name:
                rows[name]["perplexity_in_vllm"] = round(
                    evaluate(model, arguments.test, "--engine", "vllm")["perplexity"], 3
                )
            print(name, rows[name], flush=True)
            write_result("quality", COMMAND, {"transmla_own_code": TRANSMLA_OWN_CODE, "rows": rows})
    draw(rows, RESULTS / "quality.png")


if __name__ == "__main__":
    main()
