"""Shared by the benchmarks: running the command line, reading texts, writing result files."""

import argparse
import json
import os
import platform
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

import vllm_mla_plugin

RESULTS = Path(__file__).parent / "results"
VLLM_MLA = Path(sys.executable).with_name("vllm-mla")
CODE = Path(sysconfig.get_paths()["stdlib"]) / "argparse.py"  # a text unlike WikiText
# These replacements turn the tokenised form of WikiText-2 back into text and drop its marks of unknown words.
UNDO_TOKENISATION = (
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    ("<unk>", ""),
    (" , ", ", "),
    (" . ", ". "),
)


def plain_text(tokenised: Path) -> str:
    """Read a file in WikiText-2's tokenised form as plain text."""
    content = tokenised.read_text()
    for mark, plain in UNDO_TOKENISATION:
        content = content.replace(mark, plain)
    return content


def plain_parser(description: str | None) -> argparse.ArgumentParser:
    """A command line without options, whose help says how benchmarks are run."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{Path(sys.argv[0]).stem}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def text_parser(description: str | None) -> argparse.ArgumentParser:
    """A command line with options for the files of WikiText-2."""
    parser = plain_parser(description)
    parser.add_argument("--valid", type=Path, required=True, help="wiki.valid.tokens")
    parser.add_argument("--test", type=Path, required=True, help="wiki.test.raw")
    return parser


def row_parser(description: str | None) -> argparse.ArgumentParser:
    """The same, with an option that chooses rows."""
    parser = text_parser(description)
    parser.add_argument("--only", default="", help="regular expression of row names")
    return parser


def each(option: str, values: Iterable[Path]) -> list[str]:
    """The option once for each value."""
    return [word for value in values for word in (option, str(value))]


def result(name: str) -> dict[str, Any]:
    """What ``results/name.json`` holds; nothing if there is no such file."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def measured_rows(name: str) -> dict[str, dict[str, Any]]:
    """The rows that ``results/name.json`` has already."""
    return result(name).get("rows", {})


def convert(source: Path, out: Path, *options: str) -> dict[str, Any]:
    """Convert in a process of its own, so that peak memory is the conversion's; return the report."""
    return _made("convert", source, out, *options)


def heal(model: Path, out: Path, *options: str) -> dict[str, Any]:
    """Heal a converted model in a process of its own; return the report."""
    return _made("heal", model, out, *options)


def _made(command: str, source: Path, out: Path, *options: str) -> dict[str, Any]:
    report = out.with_name(f"{out.name}.json")
    subprocess.run([VLLM_MLA, command, source, out, *options, "--force", "--json", report], check=True)
    return json.loads(report.read_text())


def evaluate(model: Path, text: Path, *options: str) -> dict[str, Any]:
    """Score a model with ``vllm-mla eval``; return its row of the report."""
    report = model.with_name(f"{model.name}.eval.json")
    subprocess.run([VLLM_MLA, "eval", model, "--text", text, *options, "--json", report], check=True)
    return json.loads(report.read_text())["models"][0]


def cost(report: dict[str, Any]) -> dict[str, Any]:
    """Seconds, threads and peak memory of a conversion, from its report."""
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    return {
        "seconds": report["seconds"],
        "threads": threads,
        "peak_rss_gb": round(report["peak_rss_bytes"] / 1e9, 2),
    }


def write_result(name: str, command: str, content: dict[str, Any]) -> None:
    """Write ``results/name.json``: the command, hardware and versions, and ``content``."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU only"
    described = {
        "command": command,
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {device}",
        "versions": {
            "vllm-mla-plugin": vllm_mla_plugin.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        **content,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(described, indent=2) + "\n")
