"""The whole way on a real model, without hub or GPU: convert, serve, ask, compare.

Prints one table for the source, its exact conversion and one with half the KV cache: bytes and
capacity of the cache as vLLM reports them, and perplexity through vLLM on a fixed text.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from scripts.demo_model import ROOT, demo_folder, demo_gguf

DEMO = ROOT / ".demo"
BIN = Path(sys.executable).parent
QUESTION = "What is the capital of France? Answer in one sentence."
TEXT = (ROOT / "scripts" / "demo_text.txt").read_text()
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
START_SECONDS = 180
console = Console()


def main() -> None:
    """Convert, serve, measure, print."""
    started = time.monotonic()
    shutil.rmtree(DEMO, ignore_errors=True)
    gguf, source = demo_gguf(), demo_folder()
    dtype = ["--dtype", "bfloat16"]
    convert(gguf, DEMO / "exact", "--method", "exact", *dtype)
    convert(gguf, DEMO / "half", "--cache-ratio", "0.5", "--refit-steps", "0", *dtype)

    table = Table(title="SmolLM2-135M-Instruct, bfloat16, 1 GiB of KV cache")
    for column in ("", "KV bytes/token", "KV capacity (tokens)", "perplexity"):
        table.add_column(column, justify="left" if not column else "right")
    for name, model in (("source", source), ("exact", DEMO / "exact"), ("half", DEMO / "half")):
        with server(model) as (url, log):
            if name == "half":
                console.print(f"\n[bold]Q[/] {QUESTION}\n[bold]A[/] {chat(url, model)}\n")
            capacity = int(re.search(r"KV cache size: ([\d,]+) tokens", log.read_text())[1].replace(",", ""))
            table.add_row(name, f"{kv_bytes(model):,}", f"{capacity:,}", f"{perplexity(url, model):.2f}")
    console.print(table)
    console.print(f"Took {time.monotonic() - started:.0f} s. Serve it yourself: vllm serve .demo/half")


def convert(source: Path, out: Path, *options: str) -> None:
    """Run the command that users run."""
    command = [str(BIN / "vllm-mla"), "convert", str(source), str(out), *options]
    console.print("$", " ".join(["vllm-mla", *command[1:]]), highlight=False, soft_wrap=True)
    subprocess.run(command, check=True, env=ENVIRONMENT)


@contextmanager
def server(
    model: Path, dtype: str = "bfloat16", environment: Mapping[str, str] = ENVIRONMENT
) -> Iterator[tuple[str, Path]]:
    """``vllm serve`` on a free port; ended, with its workers, whatever happens in the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = DEMO / f"{model.name}.log"
    log.parent.mkdir(exist_ok=True)
    command = [str(BIN / "vllm"), "serve", str(model), "--port", str(port), "--host", "127.0.0.1"]
    command += ["--dtype", dtype, "--max-model-len", "2048", "--enforce-eager"]
    console.print("$", " ".join(["vllm", *command[1:]]), highlight=False, soft_wrap=True)
    with log.open("w") as sink:
        process = subprocess.Popen(
            command, env=environment, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(process, url, log)
        yield url, log
    finally:
        for sig in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, sig)
                process.wait(timeout=20)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def wait_until_ready(process: subprocess.Popen, url: str, log: Path) -> None:
    """Poll ``/health``; exit with the end of the log if the server does not come up."""
    for _ in range(START_SECONDS):
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            if process.poll() is not None:
                break
            time.sleep(1)
    sys.exit(f"The server did not start; the end of {log}:\n" + "\n".join(log.read_text().splitlines()[-20:]))


def post(url: str, body: dict) -> dict:
    """POST JSON, return the JSON answer."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def chat(url: str, model: Path) -> str:
    """Ask the question through the OpenAI chat API."""
    body = {
        "model": str(model),
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": 40,
    }
    return post(f"{url}/v1/chat/completions", body)["choices"][0]["message"]["content"].strip()


def perplexity(url: str, model: Path) -> float:
    """exp of the mean next-token loss on the fixed text, from the completions API."""
    body = {"model": str(model), "prompt": TEXT, "max_tokens": 1, "echo": True, "logprobs": 0}
    logprobs = post(f"{url}/v1/completions", body)["choices"][0]["logprobs"]["token_logprobs"][1:-1]
    return 2.718281828459045 ** (-sum(logprobs) / len(logprobs))


def kv_bytes(model: Path) -> int:
    """Bytes of bfloat16 KV cache per token over all layers."""
    config = json.loads((model / "config.json").read_text())
    if "kv_lora_rank" in config:
        width = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    else:
        width = 2 * config["num_key_value_heads"] * config["head_dim"]
    return 2 * width * config["num_hidden_layers"]


if __name__ == "__main__":
    main()
