"""Engines to measure, each in a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from mla_converters.errors import ConversionError

WORKER = "mla_converters.engines.worker"


class Engine:
    """A running engine; a context manager, for its process must end.

    Args:
        name: of the model, for messages.
        arguments: of ``vllm.LLM``.

    Attributes:
        facts: what the engine says of itself; see :func:`mla_converters.engines.worker.describe`.

    Raises:
        ConversionError: vLLM cannot serve the model.
    """

    def __init__(self, name: str, arguments: dict[str, Any]) -> None:
        self._name = name
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", **os.environ},
        )
        try:
            self.facts = self._ask(arguments)
        except BaseException:
            self._end()
            raise

    def measure(self, requests: int, input_len: int, output_len: int, seed: int) -> dict[str, Any]:
        """Serve one workload; see :func:`mla_converters.engines.worker.measure`."""
        return self._ask({"requests": requests, "input_len": input_len, "output_len": output_len, "seed": seed})

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the empty answer below says it
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise ConversionError(
                f"vLLM died of signal or exit code {code} while it served {self._name}: it may have run out of memory; "
                f"its last words were: {self._last_words()}"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise ConversionError(f"vLLM cannot serve {self._name}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().splitlines() if line.strip()]
        return lines[-1] if lines else "none"

    def _end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: object) -> None:
        self._end()
