"""Process groups: a process of vLLM starts others, and all of them must end with it."""

import os
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

NO_USAGE_STATS = {"VLLM_NO_USAGE_STATS": "1"}
"""Keeps vLLM from reporting to its makers what it is used for; the users of a converter did not ask for that."""
PATIENCE_SECONDS = 20


def start_group(command: list[str], environment: Mapping[str, str], **streams: Any) -> subprocess.Popen[str]:
    """Start a process that leads a group of its own.

    Args:
        command: program and arguments.
        environment: all variables that the process sees.
        streams: ``stdin``, ``stdout`` and ``stderr`` of :class:`subprocess.Popen`.
    """
    return subprocess.Popen(command, env=environment, text=True, start_new_session=True, **streams)


def end_group(leader: subprocess.Popen[str]) -> None:
    """End a process and the others of its group, if necessary by force."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(leader.pid, number)
            leader.wait(PATIENCE_SECONDS)


def describe_end(code: int) -> str:
    """How a process ended, from its ``returncode``: ``exit code 1``, or ``signal 9 (SIGKILL)``."""
    return f"exit code {code}" if code >= 0 else f"signal {-code} ({signal.Signals(-code).name})"
