"""The models that ``benchmarks.quality`` measures: options of ``vllm-mla convert`` and ``vllm-mla heal`` by row."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mla_converters.options import Ingredient

SHARES = (0.3125, 0.25, 0.1875, 0.125, 0.0781, 0.0313)
"""Of the source's 16-bit bytes, for packed conversions."""
SPLITS = {192: (128, 64), 128: (96, 32), 96: (64, 32), 48: (32, 16)}
"""Numbers cached in 16 bits per token and layer (the source has 384), split as in TransMLA's paper and code."""
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
CLOSED_FORM = ["--refit-steps", "0"]
REFIT = ["--calibration-tokens", "65536"]


@dataclass(frozen=True)
class Job:
    """The model that a row measures.

    Attributes:
        options: of ``vllm-mla convert``.
        healing: options of ``vllm-mla heal``; None for a model that is not healed.
        in_vllm: whether it is scored through vLLM too.
        long_windows: whether it is scored in windows of 4,096 tokens.
    """

    options: list[str]
    healing: list[str] | None = None
    in_vllm: bool = False
    long_windows: bool = True


def jobs(text: Path) -> dict[str, Job]:
    """Every row by its name. Rows with the same conversion follow each other, so that it runs once."""
    rows = _packed(text)
    rows["exact"] = Job(["--method", "exact"])
    for width in SPLITS:
        rows |= _in_16_bits(text, width)
    return rows | _ablations(text, rows["attention-aware 192"].options)


def _packed(text: Path) -> dict[str, Job]:
    """Conversions whose bits are chosen together with their sizes."""
    rows = {}
    for share in SHARES:
        ratio = ["--cache-ratio", str(share)]
        closed_form = [*ratio, "--calibration", str(text), *CLOSED_FORM]
        refitted = [*ratio, "--calibration", str(text), *REFIT]
        rows[f"packed closed-form {share}"] = Job(closed_form, in_vllm=True)
        rows[f"packed closed-form healed {share}"] = Job(closed_form, ["--text", str(text)], in_vllm=True)
        rows[f"packed refit {share}"] = Job(refitted, in_vllm=True)
        rows[f"packed refit healed {share}"] = Job(refitted, ["--text", str(text)], in_vllm=True)
        rows[f"packed refit healed text and self {share}"] = Job(refitted, _text_and_self(text), in_vllm=True)
        rows[f"packed self {share}"] = Job([*ratio, *CLOSED_FORM], in_vllm=True)
        rows[f"packed self healed {share}"] = Job([*ratio, *CLOSED_FORM], ["--text", "self"], in_vllm=True)
    return rows


def _in_16_bits(text: Path, width: int) -> dict[str, Job]:
    """Conversions to so many numbers of 16 bits."""
    rank, rope = SPLITS[width]
    plain = ["--calibration", str(text)]
    split = ["--kv-lora-rank", str(rank), "--qk-rope-head-dim", str(rope)]
    ratio = ["--cache-ratio", str(width / 384), "--latent-bits", "16"]
    rows = {f"{method} {width}": Job(["--method", method, *split, *plain]) for method in ("transmla", "mha2mla")}
    for sizes, option in SIZES.items():
        closed_form = [*ratio, *plain, *CLOSED_FORM, *option]
        refitted = [*ratio, *plain, *REFIT, *option]
        rows[f"closed-form{sizes} {width}"] = Job(closed_form)
        rows[f"closed-form healed{sizes} {width}"] = Job(closed_form, ["--text", str(text)], in_vllm=True)
        rows[f"map{sizes} {width}"] = Job([*closed_form, *MAP_ALONE])
        rows[f"healed{sizes} {width}"] = Job([*closed_form, *MAP_ALONE], ["--text", str(text)], in_vllm=True)
        rows[f"attention-aware{sizes} {width}"] = Job(refitted, in_vllm=True)
        rows[f"refit healed{sizes} {width}"] = Job(refitted, ["--text", str(text)], in_vllm=True)
        rows[f"refit healed text and self{sizes} {width}"] = Job(refitted, _text_and_self(text), in_vllm=True)
    rows[f"self {width}"] = Job(ratio, in_vllm=True)
    few = ["--text", "self", "--tokens", "32768"]
    rows[f"closed-form healed self {width}"] = Job([*ratio, *CLOSED_FORM], few, in_vllm=True)
    for kind, origins in OTHER_TEXTS.items():
        texts = [str(text) if origin == "FILE" else origin for origin in origins]
        mapped = [*ratio, *_each("--calibration", texts), *CLOSED_FORM, *MAP_ALONE]
        rows[f"{kind} {width}"] = Job(mapped, _each("--text", texts), in_vllm=True)
    return rows


def _ablations(text: Path, refitted: list[str]) -> dict[str, Job]:
    """Conversions to half the cache that leave one ingredient out."""
    split = ["--kv-lora-rank", "128", "--qk-rope-head-dim", "64"]
    closed_form = [*split, "--calibration", str(text), *CLOSED_FORM]
    options = {"without none": closed_form, "without mlp": [*refitted, "--without", Ingredient.MLP]}
    for ingredient in (Ingredient.LEAST_SQUARES, Ingredient.CONVERTED_INPUTS, Ingredient.RANDOM_TOKENS):
        options[f"without {ingredient}"] = [*closed_form, "--without", ingredient]
    for ingredient in OF_THE_MAP:  # without least squares, which repair a part of the loss
        options[f"without least-squares, {ingredient}"] = [*closed_form, *MAP_ALONE, "--without", ingredient]
    return {name: Job(words, long_windows=False) for name, words in options.items()}


def _text_and_self(text: Path) -> list[str]:
    """Options that heal on twice the usual tokens, half of which the model writes."""
    return [*_each("--text", [str(text), "self"]), "--tokens", "131072"]


def _each(option: str, values: Sequence[str]) -> list[str]:
    """The option once for each value."""
    return [word for value in values for word in (option, value)]
