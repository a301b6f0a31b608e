"""Shared fixtures: a real pretrained model and its conversions, and small random models."""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Workers beside each other get a core each: most of the time goes into imports, which use one.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(int(worker.removeprefix("gw")) % (os.cpu_count() or 1))

import pytest
import torch
from filelock import FileLock
from support.engine import generate
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

import vllm_mla_plugin.hf  # noqa: F401 - registers the MLA models with transformers
from mla_converters.checkpoints.source import Source
from mla_converters.cli.main import app, main
from mla_converters.methods.base import LayerConversion
from mla_converters.streaming.layers import source_layers

ROOT = Path(__file__).resolve().parent.parent

from scripts.demo_model import demo_folder, demo_gguf

BIN = Path(sys.executable).parent
TEXT = (ROOT / "scripts" / "demo_text.txt").read_text()
CALIBRATION = ROOT / "LICENSE"  # some English that is no test text
CommandLine = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]
SPLIT = ("--kv-lora-rank", 128, "--qk-rope-head-dim", 64)  # half of what SmolLM2 caches
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


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def hear_interrupts() -> None:
    """A shell makes its background jobs, which these tests may be, deaf to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def running(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """``vllm-mla`` in a process of its own."""
    command = [str(BIN / "vllm-mla"), *map(str, arguments)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear_interrupts
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(process: subprocess.Popen[str], seen: Callable[[], object]) -> None:
    while process.poll() is None and not seen():
        time.sleep(0.01)
    assert process.returncode is None, process.communicate()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of three megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", disk], capture_output=True, check=False)
    if mount.returncode:
        pytest.skip("mounting a file system takes root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def fill(disk: Path, process: subprocess.Popen[str]) -> None:
    """Take all space on a disk, while a process is running."""
    block = bytes(1024)
    with (disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while process.poll() is None:
            filler.write(block)


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> CommandLine:
    """Runs ``vllm-mla`` in this process; returns exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vllm-mla", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main()
        captured = capfd.readouterr()
        return exit_info.value.code, captured.out, captured.err

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


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, float32."""
    return demo_folder()


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    return demo_gguf()


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run's for all workers beside each other."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if worker else base


def once(command: str, source: Path, out: Path, *options: object) -> Path:
    """Make ``out`` with a command of ``vllm-mla``, unless another worker has, or wait until it has."""
    with FileLock(out.with_suffix(".lock")):
        return out if out.exists() else alone(command, source, out, *options)


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


def converted_layers(source: Source, conversion: LayerConversion) -> Iterator[dict[str, torch.Tensor]]:
    """Each layer's converted projections."""
    streams = conversion.start()
    for layer in source_layers(source, "cpu"):
        yield conversion.convert(layer, streams).weights


def load(folder: Path, dtype: torch.dtype = torch.float32, **kwargs: Any) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **kwargs).eval()


YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
QWEN3_EXPERTS = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "mlp_only_layers": [0],
}
MIXTRAL_EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}


@dataclass
class RandomModel:
    """A small random model; the defaults are an ordinary GQA Llama."""

    family: str = "llama"
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    hidden: int = 64
    layers: int = 2
    bias: bool = False
    tied: bool = False
    rope: dict = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    window: int | None = None
    experts: dict[str, Any] = field(default_factory=dict)
    vocab: int = 199
    std: float = 0.2  # of weights
    dtype: torch.dtype = torch.float32

    def save(self, folder: Path) -> Path:
        """Write the model; biases and norms get random values, which initialisation leaves at 0 and 1."""
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            self.family,
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=48,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            tie_word_embeddings=self.tied,
            rope_parameters=dict(self.rope),
            max_position_embeddings=256,
            initializer_range=self.std,
            dtype=self.dtype,
            **({"attention_bias": True} if self.bias else {}),
            **({"mlp_bias": True} if self.bias and self.family == "llama" else {}),
            **({"sliding_window": self.window} if self.family in ("mistral", "mixtral") else {}),
            **self.experts,
        )
        model = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
        for name, parameter in model.named_parameters():
            if "bias" in name or "norm" in name:
                parameter.data += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        # One token per ASCII character, so that text can calibrate the model.
        vocabulary = {chr(i): i for i in range(128)} | {"<unk>": 128}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer.save(str(folder / "tokenizer.json"))
        return folder


# Engines run in processes of their own, which start as copies of one that has imported vLLM: imports are half of a
# short run's time.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["vllm.entrypoints.llm"])


def run_engine(model: Path, prompts: list[list[int]], timeout: int = 600, **job: Any) -> dict[str, Any]:
    """Generate with the real vLLM engine, in a process of its own; see :func:`support.engine.generate`."""
    job |= {"model": str(model), "prompts": prompts}
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1"} | job.pop("environment", {})
    # One rank needs no processes beside this one, each of which would import vLLM again. (The server has them.)
    if {"tensor_parallel_size", "pipeline_parallel_size"}.isdisjoint(job.get("engine", {})):
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        answer, output = Path(folder) / "answer.json", Path(folder) / "output.txt"
        process = PROCESSES.Process(target=generate, args=(job, environment, answer, output))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
        assert process.exitcode == 0, output.read_text()[-6000:]
        return json.loads(answer.read_text())
