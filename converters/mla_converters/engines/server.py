"""``vllm serve`` in a process of its own."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mla_converters.engines.group import NO_USAGE_STATS, describe_end, end_group, start_group
from mla_converters.engines.logs import last_words
from mla_converters.errors import ConversionError

VLLM = Path(sys.executable).with_name("vllm")
START_SECONDS = 180


@contextmanager
def serve(model: Path, log: Path, *options: str, environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """Serve a model on a free port of this machine, as long as the block runs.

    Args:
        model: folder of the model.
        log: file for everything that the server prints; its folder exists.
        options: of ``vllm serve``.
        environment: variables to set for the server.

    Yields:
        The server's URL, when it takes requests. However the block ends, the server ends with it, and so do the
        processes that it started.

    Raises:
        ConversionError: the server ends, or takes no requests within :data:`START_SECONDS`. The message has the
            last words of its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(VLLM), "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *options]
    with log.open("w") as sink:
        variables = {**NO_USAGE_STATS, **os.environ, **(environment or {})}
        process = start_group(command, variables, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(process, url, model, log)
        yield url
    finally:
        end_group(process)


def _wait_until_ready(process: subprocess.Popen[str], url: str, model: Path, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            if process.poll() is not None:
                break
            time.sleep(1)
    code = process.returncode
    what = f"took no requests in {START_SECONDS} seconds" if code is None else f"ended with {describe_end(code)}"
    raise ConversionError(
        f"vllm serve {model} {what}: {last_words(log.read_text(errors='replace'))} (its whole log is {log})"
    )
