"""The models that ``benchmarks.tasks`` measures, and the groups of tasks that it asks them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import each

SHARES = (0.25, 0.1875, 0.125)
"""Of the source's 16-bit bytes, for packed conversions."""
IN_16_BITS = ["--cache-ratio", "0.5", "--latent-bits", "16"]
CLOSED_FORM = ["--refit-steps", "0"]
OTHER_TEXTS = ("self", "chat")
"""Texts that the model writes, in place of files."""


@dataclass(frozen=True)
class Job:
    """How a row's model is made.

    Attributes:
        options: of ``vllm-mla convert``; None for the source.
        healing: options of ``vllm-mla heal``; None for a model that is not healed.
    """

    options: list[str] | None
    healing: list[str] | None = None


@dataclass(frozen=True)
class Group:
    """Tasks that are asked together.

    Attributes:
        tasks: their names.
        limit: the most problems of each; None for all.
        options: further options of ``vllm-mla eval``.
    """

    tasks: tuple[str, ...]
    limit: int | None = None
    options: tuple[str, ...] = ()


GROUPS = {
    "code": Group(("bench_humaneval",), None, ("--chat", "--allow-code-execution")),
    "choice": Group(
        ("bench_arc_easy", "bench_arc_challenge", "bench_openbookqa", "bench_piqa", "bench_winogrande"), 500
    ),
    "math": Group(("bench_gsm8k",), 200, ("--chat",)),
    "needles": Group(("needles_4096",)),
}


def jobs(texts: Sequence[Path]) -> dict[str, Job]:
    """Every row by its name.

    Args:
        texts: for calibration and healing.
    """
    calibration, text = each("--calibration", texts), each("--text", texts)
    rows = {"source": Job(None), "exact 4 bits": Job(["--method", "exact", "--latent-bits", "4"])}
    sizes = {f"{share}": ["--cache-ratio", str(share)] for share in SHARES} | {"0.5 in 16 bits": IN_16_BITS}
    for size, ratio in sizes.items():
        for kind, steps in {"closed form": CLOSED_FORM, "default": []}.items():
            options = [*ratio, *calibration, *steps]
            rows[f"{kind} {size}"] = Job(options)
            rows[f"{kind} {size}, healed"] = Job(options, text)
        for origin in OTHER_TEXTS:
            options = [*ratio, "--calibration", origin, *CLOSED_FORM]
            rows[f"{origin} {size}"] = Job(options)
            rows[f"{origin} {size}, healed"] = Job(options, ["--text", origin])
    return rows
