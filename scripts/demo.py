"""Shows everything on a real model, without a hub or a GPU: convert, serve, ask, compare.

    python -m scripts.demo

Prints one table for the source, for all of its cached numbers in 4 bits, and for a quarter and an eighth of the cache's
bytes: bytes and capacity of the cache as vLLM reports it, perplexity through vLLM on a fixed text, and an answer.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mla_converters.engines.server import serve
from mla_converters.errors import ConversionError
from scripts.demo_model import ROOT, demo_folder, demo_gguf
from vllm_mla_plugin.checkpoint.latent_cache import parse_latent_cache

DEMO = ROOT / ".demo"
VLLM_MLA = Path(sys.executable).with_name("vllm-mla")
QUESTION = "What is the capital of France? Answer in one sentence."
TEXT = (ROOT / "scripts" / "demo_text.txt").read_text()
# Neither refit nor trained, on half of the usual text, because a demo must be quick.
QUICKLY = ("--refit-steps", "0", "--calibration-tokens", "8192")
CONVERSIONS = {
    "exact": ("--method", "exact", "--latent-bits", "4"),
    "quarter": ("--cache-ratio", "0.25", *QUICKLY),
    "eighth": ("--cache-ratio", "0.125", *QUICKLY),
}
# Two at a time, each on half of the cores, are sooner done than one after the other on all.
AT_ONCE = 2
SHARED = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // AT_ONCE)),
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
CACHE = {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB
OPTIONS = ("--dtype", "bfloat16", "--max-model-len", "2048", "--enforce-eager")
console = Console()


def main() -> None:
    """Convert, serve, measure, print."""
    started = time.monotonic()
    shutil.rmtree(DEMO, ignore_errors=True)
    DEMO.mkdir()
    models = {"source": demo_folder()} | {name: DEMO / name for name in CONVERSIONS}
    table = Table(title="SmolLM2-135M-Instruct, bfloat16, 1 GiB of KV cache", caption=f"Q: {QUESTION}")
    for column in ("", "KV bytes/token", "KV capacity (tokens)", "perplexity", "A"):
        table.add_column(column, justify="left" if column in ("", "A") else "right")
    try:
        with ProcessPoolExecutor(AT_ONCE) as pool:
            list(pool.map(convert, CONVERSIONS))
            rows = list(pool.map(measure, models, models.values()))
    except ConversionError as error:
        sys.exit(str(error))
    for name, row in zip(models, rows, strict=True):
        table.add_row(name, *row)
    console.print(table)
    console.print(f"Took {time.monotonic() - started:.0f} s. Serve it yourself: vllm serve .demo/quarter")


def show(*command: object) -> None:
    """Print a command as a user types it."""
    console.print("$", *command, highlight=False, soft_wrap=True)


def convert(name: str) -> None:
    """Run the command that users run. Its lines come out with the name in front."""
    command = ["convert", str(demo_gguf()), str(DEMO / name), *CONVERSIONS[name], "--dtype", "bfloat16"]
    show("vllm-mla", *command)
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([VLLM_MLA, *command], env={**os.environ, **SHARED}, **pipe) as process:
        for line in process.stdout:
            console.print(f"{name}:", line.rstrip(), highlight=False, markup=False, soft_wrap=True)
    if process.returncode:
        raise ConversionError(f"vllm-mla convert ended with exit code {process.returncode}.")


def measure(name: str, model: Path) -> tuple[str, ...]:
    """Serve a model and return its row of the table."""
    log = DEMO / f"{name}.log"
    show("vllm", "serve", model, *OPTIONS)
    with serve(model, log, *OPTIONS, environment=SHARED | CACHE) as url:
        found = re.search(r"KV cache size: ([\d,]+) tokens", log.read_text())
        assert found is not None
        return f"{kv_bytes(model):,}", found[1], f"{perplexity(url, model):.2f}", chat(url, model)


def post(url: str, body: dict) -> dict:
    """Send JSON and return the JSON answer."""
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
    """``exp`` of the mean next-token loss on the fixed text, from the completions API."""
    body = {"model": str(model), "prompt": TEXT, "max_tokens": 1, "echo": True, "logprobs": 0}
    logprobs = post(f"{url}/v1/completions", body)["choices"][0]["logprobs"]["token_logprobs"][1:-1]
    return 2.718281828459045 ** (-sum(logprobs) / len(logprobs))


def kv_bytes(model: Path) -> int:
    """Bytes of KV cache per token over all layers: of bfloat16 numbers, or of packed rows."""
    config = json.loads((model / "config.json").read_text())
    layers = config["num_hidden_layers"]
    if "latent_cache" not in config:
        return layers * 2 * 2 * config["num_key_value_heads"] * config["head_dim"]
    sizes = [(config["kv_lora_rank"], config["qk_rope_head_dim"])] * layers
    return sum(format.bytes_per_token for format in parse_latent_cache(config["latent_cache"], sizes))


if __name__ == "__main__":
    main()
