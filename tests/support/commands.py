"""``vllm-mla`` as users run it: in this process, or in one of its own."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from support.files import CALIBRATION

from mla_converters.cli.main import app

BIN = Path(sys.executable).parent
CommandLine = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]
SPLIT = ("--kv-lora-rank", 128, "--qk-rope-head-dim", 64)  # half of what SmolLM2 caches
UNPACKED = ("--cache-ratio", 0.5, "--latent-bits", 16)  # half of the source's numbers, of 16 bits each
HALF = ("--calibration", CALIBRATION, "--calibration-tokens", 1024, "--refit-steps", 2, *SPLIT)


def vllm_mla(*args: object, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does."""
    command = [str(BIN / "vllm-mla"), *map(str, args)]
    variables = {**os.environ, **(environment or {})}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=variables)


def convert(source: Path, out: Path, *options: object) -> Path:
    """Convert with the command line, in this process."""
    app(["convert", str(source), str(out), *map(str, options)], standalone_mode=False)
    return out


def heal(model: Path, out: Path, *options: object) -> Path:
    """Heal with the command line, in this process."""
    app(["heal", str(model), str(out), *map(str, options)], standalone_mode=False)
    return out


def convert_alone(source: Path, out: Path, *options: object) -> Path:
    """Convert with the command line as a user does, in a process of its own."""
    return alone("convert", source, out, *options)


def alone(command: str, source: Path, out: Path, *options: object) -> Path:
    """Make ``out`` with a command of ``vllm-mla``, in a process of its own."""
    result = vllm_mla(command, source, out, *options)
    assert result.returncode == 0, result.stderr
    return out


def once(command: str, source: Path, out: Path, *options: object) -> Path:
    """Make ``out`` with a command of ``vllm-mla``; if another worker makes it or has made it, wait and take that."""
    with FileLock(out.with_suffix(".lock")):
        return out if out.exists() else alone(command, source, out, *options)


def without_progress(told: str) -> str:
    """A command's stderr without the lines that say how far it is, which it prints where there is no terminal."""
    return re.sub(r"^[^\n:]+: [\d,]+ of [\d,]+(, [\d.]+ (s|min|h) left)?\n", "", told, flags=re.MULTILINE)


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def hear_interrupts() -> None:
    """Let Ctrl-C interrupt again: a shell starts background jobs, which these tests may be, with it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def running(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """``vllm-mla`` in a process of its own, which is killed at the end."""
    command = [str(BIN / "vllm-mla"), *map(str, arguments)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear_interrupts
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(process: subprocess.Popen[str], seen: Callable[[], object]) -> None:
    """Wait until ``seen()`` is true; the process must still be running then."""
    while process.poll() is None and not seen():
        time.sleep(0.01)
    assert process.returncode is None, process.communicate()
