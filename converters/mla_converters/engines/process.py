"""A vLLM engine in a process of its own: starting it, sending it jobs, ending it."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from mla_converters.engines.group import NO_USAGE_STATS, describe_end, end_group, start_group
from mla_converters.engines.logs import last_words, with_cause
from mla_converters.errors import ConversionError

WORKER = "mla_converters.engines.worker"
# Only warnings and errors, so that the last words of an engine that died tell why.
ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "WARNING", **NO_USAGE_STATS}
SHUTDOWN_SECONDS = 60  # an engine may take so long to end when its work is done
HURRY_SECONDS = 5  # the same if something failed: an idle engine ends within it, a busy one would go on with its job


class Engine:
    """A context manager that starts an engine, sends it jobs, and ends its process in every case.

    Whether a job succeeded is judged by its answer alone, because an engine can crash in its shutdown when everything
    is computed.

    Args:
        task: what the engine is to do, for messages, as in ``serve ./model``.
        arguments: of ``vllm.LLM``.
        advice: what the user can do if the engine dies, as in ``give fewer --requests``.
        environment: variables for vLLM beside :data:`ENVIRONMENT`. Variables that are set already keep their values.

    Attributes:
        facts: versions, hardware and cache; see :func:`mla_converters.engines.worker.describe`.

    Raises:
        ConversionError: vLLM refuses a job or dies, here or in any method. The message has the last words of
            its stderr.
    """

    facts: dict[str, Any]

    def __init__(
        self,
        task: str,
        arguments: dict[str, Any],
        *,
        advice: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._task = task
        self._arguments = arguments
        self._advice = advice
        self._environment = {**ENVIRONMENT, **(environment or {}), **os.environ}

    def __enter__(self) -> "Engine":
        self._log = tempfile.TemporaryFile()
        self._process = start_group(
            [sys.executable, "-m", WORKER],
            self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        try:
            self.facts = self._ask("start", arguments=self._arguments)
        except BaseException:
            self._end(HURRY_SECONDS)
            raise
        return self

    def __exit__(self, error: type[BaseException] | None, *details: object) -> None:
        self._end(SHUTDOWN_SECONDS if error is None else HURRY_SECONDS)

    def measure(self, requests: int, input_len: int, output_len: int, seed: int) -> dict[str, Any]:
        """Serve random prompts; see :func:`mla_converters.engines.measuring.measure`."""
        return self._ask("measure", requests=requests, input_len=input_len, output_len=output_len, seed=seed)

    def score(self, windows: list[list[int]]) -> dict[str, Any]:
        """Score windows of tokens; see :func:`mla_converters.engines.scoring.score`."""
        return self._ask("score", windows=windows)

    def predict(self, windows: list[list[int]], top_k: int) -> Iterator[dict[str, Any]]:
        """The likeliest tokens of each window; see :func:`mla_converters.engines.predicting.predict`."""
        self._send("predict", windows=windows, top_k=top_k)
        for _ in windows:
            yield self._receive()

    def answer(self, requests: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Answer the requests of tasks; see :func:`mla_converters.engines.answering.answer`."""
        self._send("answer", requests=requests)
        for _ in requests:
            yield self._receive()

    def _ask(self, job: str, **arguments: Any) -> dict[str, Any]:
        self._send(job, **arguments)
        return self._receive()

    def _send(self, job: str, **arguments: Any) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # a worker that died gives no answer, which _receive handles
            self._process.stdin.write(json.dumps({"job": job, **arguments}) + "\n")
            self._process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            end = describe_end(self._process.wait())
            raise ConversionError(
                f"vLLM died with {end} when it had to {self._task}: it may have run out of memory; {self._advice}; "
                f"its last words were: {last_words(self._read_log())}"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise ConversionError(f"vLLM cannot {self._task}: {with_cause(answer['error'], self._read_log())}")
        return answer

    def _read_log(self) -> str:
        # Not read(): the processes that write the log share its position in the file.
        log = self._log.fileno()
        return os.pread(log, os.fstat(log).st_size, 0).decode(errors="replace")

    def _end(self, seconds: float) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        end_group(self._process)
        self._process.stdout.close()
        self._log.close()
