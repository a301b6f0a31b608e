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
SMALLER = {"quarter": "0.25", "eighth": "0.125"}
QUICKLY = ("--refit-steps", "0", "--calibration-tokens", "8192")
OFFLINE = {"HF_HUB_OFFLINE": "1"}
CACHE = {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB
OPTIONS = ("--dtype", "bfloat16", "--max-model-len", "2048", "--enforce-eager")
console = Console()


def main() -> None:
    """Convert, serve, measure, print."""
    started = time.monotonic()
    shutil.rmtree(DEMO, ignore_errors=True)
    DEMO.mkdir()
    gguf, source = demo_gguf(), demo_folder()
    dtype = ["--dtype", "bfloat16"]
    convert(gguf, DEMO / "exact", "--method", "exact", "--latent-bits", "4", *dtype)
    for name, ratio in SMALLER.items():
        convert(gguf, DEMO / name, "--cache-ratio", ratio, *QUICKLY, *dtype)

    table = Table(title="SmolLM2-135M-Instruct, bfloat16, 1 GiB of KV cache", caption=f"Q: {QUESTION}")
    for column in ("", "KV bytes/token", "KV capacity (tokens)", "perplexity", "A"):
        table.add_column(column, justify="left" if column in ("", "A") else "right")
    models = {"source": source} | {name: DEMO / name for name in ("exact", *SMALLER)}
    for name, model in models.items():
        try:
            table.add_row(name, *measure(name, model))
        except ConversionError as error:
            sys.exit(str(error))
    console.print(table)
    console.print(f"Took {time.monotonic() - started:.0f} s. Serve it yourself: vllm serve .demo/quarter")


def show(*command: object) -> None:
    """Print a command as a user types it."""
    console.print("$", *command, highlight=False, soft_wrap=True)


def convert(source: Path, out: Path, *options: str) -> None:
    """Run the command that users run."""
    command = ["convert", str(source), str(out), *options]
    show("vllm-mla", *command)
    subprocess.run([VLLM_MLA, *command], check=True, env={**os.environ, **OFFLINE})


def measure(name: str, model: Path) -> tuple[str, ...]:
    """Serve a model and return its row of the table."""
    log = DEMO / f"{name}.log"
    show("vllm", "serve", model, *OPTIONS)
    with serve(model, log, *OPTIONS, environment=OFFLINE | CACHE) as url:
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
