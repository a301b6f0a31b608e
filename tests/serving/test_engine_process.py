"""vLLM in a separate process: how the process ends, and the message if it dies."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.models import RandomModel

from mla_converters.engines.logs import last_words, with_cause
from mla_converters.engines.process import WORKER, Engine
from mla_converters.engines.server import serve
from mla_converters.errors import ConversionError

SECONDS = 60  # limit on the time in which an engine must end


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Arguments of an engine for a small random model with heads of 32, which vLLM's CPU attention accepts."""
    model = RandomModel(head_dim=32).save(tmp_path_factory.mktemp("random") / "source")
    cache = {"kv_cache_memory_bytes": 2**26, "max_model_len": 64, "max_num_seqs": 2}
    return {"model": str(model), "dtype": "float32", "enforce_eager": True, **cache}


def test_engine_that_is_killed(arguments: dict[str, Any]) -> None:
    """The message has the job, the signal, an advice and the engine's last words. No process keeps running."""
    ours = psutil.Process()
    with pytest.raises(ConversionError) as caught, Engine("measure it", arguments, advice="wait") as engine:
        assert engine.measure(2, 4, 4, 0)["peak_concurrency"] == 2
        (worker,) = [child for child in ours.children() if WORKER in child.cmdline()]
        family = [worker, *worker.children(recursive=True)]
        assert len(family) > 1, "vLLM's own processes"
        worker.kill()
        engine.measure(2, 4, 4, 1)
    message = str(caught.value)
    assert message.startswith("vLLM died with signal 9 (SIGKILL) when it had to measure it:")
    assert "; wait; its last words were: " in message and "\n" not in message
    assert "Tokenizer not available" not in message, "a warning that vLLM logs at every start"
    assert gone(family)


def test_worker_whose_parent_closes_the_pipe(arguments: dict[str, Any]) -> None:
    """If the parent dies, its pipe closes. The worker then ends by itself, together with vLLM's processes."""
    command = [sys.executable, "-m", WORKER]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as worker:
        worker.stdin.write(json.dumps({"job": "start", "arguments": arguments}) + "\n")
        worker.stdin.flush()
        assert json.loads(worker.stdout.readline())["dtype"] == "float32"
        family = [psutil.Process(worker.pid), *psutil.Process(worker.pid).children(recursive=True)]
        assert len(family) > 1, "vLLM's own processes"
        worker.stdin.close()
        worker.wait(SECONDS)
    assert gone(family)


def test_engine_whose_own_processes_fail(arguments: dict[str, Any]) -> None:
    """vLLM's exception only says that the reason was logged. The message has the reason from the log."""
    with (
        pytest.raises(ConversionError) as caught,
        Engine("serve it", arguments | {"kv_cache_memory_bytes": 1000}, advice="wait"),
    ):
        raise AssertionError("it started")
    assert "vLLM cannot serve it: ValueError: No available memory for the cache blocks." in str(caught.value)


def test_server_that_does_not_start(tmp_path: Path) -> None:
    """The message has the exit code, the server's last words, and the path of its log."""
    RandomModel().save(tmp_path / "model")
    log = tmp_path / "log"
    options = ("--max-model-len", "1000", "--enforce-eager")
    with pytest.raises(ConversionError) as caught, serve(tmp_path / "model", log, *options):
        raise AssertionError("it started")
    message = str(caught.value)
    assert "ended with exit code 1: Value error, User-specified max_model_len (1000) is greater than" in message
    assert str(log) in message and log.stat().st_size > 0


def test_last_words() -> None:
    log = "(Worker) ERROR [core.py:1] ValueError: no memory\n(Core) ERROR RuntimeError: See root cause above.\n"
    assert last_words(log + "(Main) WARNING [x.py:2] KeyError: harmless\n  warnings.warn('leaked')\n") == (
        "ValueError: no memory"
    )
    nothing = "(Main) ERROR [x.py:2] ValueError: Tokenizer not available when `skip_tokenizer_init=True`\n"
    assert last_words(log + nothing) == "ValueError: no memory", "vLLM 0.30 logs it at every start"
    assert last_words("loading\nSegmentation fault\n\n") == "Segmentation fault"
    assert last_words("\n") == "none"
    assert with_cause("RuntimeError: See root cause above.", log).startswith("ValueError: no memory (RuntimeError")
    assert with_cause("KeyError: 'x'", log) == "KeyError: 'x'"


def test_nothing_but_the_worker_imports_vllm() -> None:
    """The modules that start engines, and those of their jobs, can be imported without vLLM."""
    modules = ["bench.run", "evaluation.run", "engines.measuring", "engines.scoring", "engines.server"]
    code = "import sys; " + "".join(f"import mla_converters.{name}; " for name in modules)
    code += "print({'vllm', 'mla_converters.engines.worker'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def gone(family: list[psutil.Process]) -> bool:
    """Whether all processes end in time. A zombie counts as ended."""
    _, alive = psutil.wait_procs(family, SECONDS)
    return all(process.status() == psutil.STATUS_ZOMBIE for process in alive)
