"""Environment of all tests, their shared fixtures, and the marks that come with a fixture."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")  # otherwise TRL sets it to ERROR, and servers tell no capacity
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Each of two workers gets one core, because most of the time goes into imports, which use one.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(int(worker.removeprefix("gw")) % (os.cpu_count() or 1))

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.commands import HALF, CommandLine, Refused, once, without_progress
from support.disk import mounted
from support.files import CALIBRATION

from mla_converters.cli.main import main
from scripts.demo_model import demo_folder, demo_gguf

# A test that asks for one of these fixtures gets the mark.
FIXTURE_MARKS = {"exact": "slow", "half": "slow", "healed": "slow", "small_disk": "root", "read_only": "root"}


@pytest.hookimpl(tryfirst=True)  # before -m selects by mark
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name in FIXTURE_MARKS.keys() & getattr(item, "fixturenames", ()):
            item.add_marker(FIXTURE_MARKS[name])


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> CommandLine:
    """Runs ``vllm-mla`` in this process; returns exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vllm-mla", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main()
        captured = capfd.readouterr()
        return exit_info.value.code, captured.out, without_progress(captured.err)

    return run


@pytest.fixture
def refusal(command_line: CommandLine) -> Refused:
    """Runs a command that must be refused; returns its one sentence."""

    def run(*arguments: object) -> str:
        code, _, complaint = command_line(*arguments)
        assert code == 2
        (line,) = complaint.strip().splitlines()
        assert line.startswith("vllm-mla: error: ")
        return line

    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of three megabytes."""
    with mounted(tmp_path / "disk", "size=3m") as disk:
        yield disk


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder into which nobody can write, root neither."""
    with mounted(tmp_path / "read-only", "size=1m,ro") as disk:
        yield disk


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, float32."""
    return demo_folder()


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The same model as the GGUF file that it comes from."""
    return demo_gguf()


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if worker else base


@pytest.fixture(scope="session")
def exact(smollm2: Path, shared: Path) -> Path:
    """SmolLM2 as MLA, exactly."""
    return once("convert", smollm2, shared / "exact", "--method", "exact")


@pytest.fixture(scope="session")
def half(smollm2: Path, shared: Path) -> Path:
    """SmolLM2 with half the cache, calibrated on few tokens."""
    return once("convert", smollm2, shared / "half", *HALF)


@pytest.fixture(scope="session")
def healed(half: Path, shared: Path) -> Path:
    """The same, healed on few tokens."""
    few = ("--text", CALIBRATION, "--tokens", 2048, "--batch-size", 1, "--steps", 3, "--learning-rate", 1e-4)
    return once("heal", half, shared / "healed", *few)
