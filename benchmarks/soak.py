"""Does the server withstand more requests than it can serve, if some of them are broken and some abandoned?

    python -m benchmarks.soak MODEL [--minutes 5] [--overload 1.5] [--latent-cache FORMAT]

Starts `vllm serve` on MODEL, a converted checkpoint, in float32, because there an answer does not depend on the other
requests of its batch. The cache is packed as the checkpoint says, or as `--latent-cache` says. The steps:

1. Ask each prompt of a fixed set alone.
2. Measure how many requests the server completes in a second.
3. Send `--overload` times as many: short and long ones, streams whose clients vanish in the middle, requests that are
   aborted, and invalid ones (context too long, broken JSON, impossible sampling parameters, a prompt of 10 MB).

At the end, every completed answer must equal the one that was given alone, every invalid request must have been refused
as the client's fault, the server must still answer, and its memory must not have grown by more than 5%.

The server runs with thresholds that make glibc give freed memory back. By default, glibc keeps much of it, and resident
memory grows even if nothing leaks. The server's log is `soak.log` in the system's folder for temporary files.
"""

import argparse
import asyncio
import collections
import contextlib
import json
import random
import re
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from rich.console import Console
from rich.progress import track

from benchmarks.common import plain_parser, write_result
from mla_converters.checkpoints.models import Model, read_config
from mla_converters.engines.server import serve
from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat
from vllm_mla_plugin.checkpoint.latent_cache import latent_cache_json

CONTEXT = 2048
OPTIONS = ("--dtype", "float32", "--max-model-len", str(CONTEXT), "--enforce-eager")
UNPACKED = "none"
VOCABULARY = 40000  # smaller token ids are ordinary words in the demo model's tokenizer
SHORT, LONG = (range(16, 200), range(16, 96)), (range(800, 1800), range(16, 64))  # tokens of prompt and answer
POOL = 16
CALIBRATION_SECONDS = 20
MEMORY_SLACK = 0.05
MEMORY_SECONDS = 30  # between measurements of the server's memory
CACHE_TOKENS = 46_000  # that the server's cache holds, whatever their format: the warm-up fills it
SERVING = {"HF_HUB_OFFLINE": "1"}
GIVE_BACK = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}
CROWD = 300  # requests at once: more than the server takes into a batch
TOGETHER = 4  # invalid requests of each kind that are sent at once in the warm-up
KINDS = {"short": 55, "long": 15, "vanishing": 12, "aborted": 8, "invalid": 10}  # of 100 requests


@dataclass
class Soak:
    """The state of a run.

    Attributes:
        session: connection to the server.
        model: the name by which the server knows the model.
        random: source of all random choices.
        pool: requests, each with the answer that it got alone.
        counts: number of requests by how they ended.
        problems: sentences, each about something that must not happen.
    """

    session: aiohttp.ClientSession
    model: str
    random: random.Random
    pool: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    problems: list[str] = field(default_factory=list)

    def request(self, prompt_tokens: range, answer_tokens: range) -> dict[str, Any]:
        """A greedy request with random tokens; its lengths come from these ranges."""
        length = self.random.choice(prompt_tokens)
        return {
            "model": self.model,
            "prompt": [self.random.randrange(300, VOCABULARY) for _ in range(length)],
            "max_tokens": self.random.choice(answer_tokens),
            "temperature": 0,
            "ignore_eos": True,
        }

    async def complete(self, body: dict[str, Any]) -> str:
        """Send a request and return the text of the answer.

        Raises:
            aiohttp.ClientResponseError: the server refuses the request.
        """
        async with self.session.post("/v1/completions", json=body) as response:
            response.raise_for_status()
            return (await response.json())["choices"][0]["text"]

    async def valid(self) -> None:
        """Send a request of the pool and compare the answer with the one given alone."""
        body, alone = self.random.choice(self.pool)
        if await self.complete(body) == alone:
            self.counts["completed"] += 1
        else:
            self.counts["wrong"] += 1

    async def vanishing(self) -> None:
        """Start a stream and close the connection in the middle of it."""
        body = self.request(*SHORT) | {"stream": True, "max_tokens": 1000}
        async with self.session.post("/v1/completions", json=body) as response:
            response.raise_for_status()
            for _ in range(self.random.randrange(1, 12)):
                await response.content.readline()
            response.close()
        self.counts["vanished"] += 1

    async def aborted(self) -> None:
        """Send a request and give up before the answer comes."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.random.uniform(0.05, 3)):
                await self.complete(self.request(*LONG) | {"max_tokens": 200})
        self.counts["aborted"] += 1

    def invalid_bodies(self) -> list[str]:
        """One request of every kind that must be refused; the one of 10 MB comes last."""
        body = self.request(*SHORT)
        return [
            json.dumps(body | {"prompt": [500] * (CONTEXT + 1)}),
            json.dumps(body)[:-9],
            json.dumps(body | {"temperature": -1}),
            json.dumps(body | {"top_p": 7}),
            json.dumps(body | {"max_tokens": -5}),
            json.dumps(body | {"prompt": "word " * 2_000_000}),
        ]

    async def invalid(self) -> None:
        """Send a request that must be refused as the client's fault."""
        (data,) = self.random.choices(self.invalid_bodies(), weights=[3, 3, 3, 3, 3, 1])
        await self.send_invalid(data)

    async def send_invalid(self, data: str) -> None:
        """Send an invalid request as it is, because not all of them are JSON."""
        headers = {"Content-Type": "application/json"}
        async with self.session.post("/v1/completions", data=data, headers=headers) as response:
            if 400 <= response.status < 500:
                self.counts["refused"] += 1
            else:
                self.problems.append(f"status {response.status} for an invalid request: {data[-80:]}")

    async def send(self, kind: str) -> None:
        """Send one request of a kind; note what goes wrong and go on."""
        self.counts["sent"] += 1
        try:
            await (self.valid() if kind in ("short", "long") else getattr(self, kind)())
        except (aiohttp.ClientError, OSError) as error:
            self.problems.append(f"{kind}: {type(error).__name__}: {error}")

    async def ask_alone(self) -> None:
        """Fill the pool with requests and their answers, one request at a time."""
        shares = {SHORT: KINDS["short"], LONG: KINDS["long"]}
        sizes = self.random.choices(list(shares), weights=list(shares.values()), k=POOL)
        for size in track(sizes, "Asking alone", console=Console(stderr=True)):
            body = self.request(*size)
            self.pool.append((body, await self.complete(body)))

    async def warm_up(self) -> None:
        """Make the server take all memory that it keeps from then on.

        This is every page of its cache, the largest batch, and the memory of several huge prompts at once.
        """
        async with self.session.get("/metrics") as response:
            info = re.search(r"vllm:cache_config_info{(.*)}", await response.text())
        assert info is not None
        sizes = dict(re.findall(r'(\w+)="(\d+)"', info[1]))
        prompts = int(sizes["num_gpu_blocks"]) * int(sizes["block_size"]) // (CONTEXT - 8) + 1
        bodies = [self.request(range(CONTEXT - 8, CONTEXT - 7), range(1, 2)) for _ in range(prompts)]
        await asyncio.gather(*map(self.complete, bodies))
        await asyncio.gather(*(self.complete(self.request(*SHORT)) for _ in range(CROWD)))
        for data in self.invalid_bodies():
            await asyncio.gather(*(self.send_invalid(data) for _ in range(TOGETHER)))

    async def capacity(self) -> float:
        """Requests per second that the server completes when it always has more to do."""
        end, done = time.monotonic() + CALIBRATION_SECONDS, 0

        async def client() -> None:
            nonlocal done
            while time.monotonic() < end:
                await self.complete(self.random.choice(self.pool)[0])
                done += 1

        started = time.monotonic()
        await asyncio.gather(*(client() for _ in range(32)))
        return done / (time.monotonic() - started)

    async def overload(self, rate: float, seconds: float) -> None:
        """Send requests at this rate (per second) without waiting for answers; then wait for the last answer."""
        end, tasks = time.monotonic() + seconds, []
        while time.monotonic() < end:
            (kind,) = self.random.choices(list(KINDS), weights=list(KINDS.values()))
            tasks.append(asyncio.create_task(self.send(kind)))
            await asyncio.sleep(self.random.expovariate(rate))
        await asyncio.gather(*tasks)


def server_memory(url: str) -> dict[str, int]:
    """Resident megabytes of the server that listens at ``url`` and of each of its children, by process name."""
    port = int(url.rsplit(":", 1)[1])
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(c.laddr.port == port and c.status == psutil.CONN_LISTEN for c in process.net_connections()):
                family = [process, *process.children(recursive=True)]
                return {
                    f"{Path(p.cmdline()[0]).name} {i}": round(p.memory_info().rss / 1e6) for i, p in enumerate(family)
                }
    raise SystemExit(f"No process listens on port {port}.")


async def watch_memory(url: str, trace: list[int]) -> None:
    """Append the server's resident megabytes to ``trace`` every :data:`MEMORY_SECONDS`, until cancelled."""
    while True:
        trace.append(sum(server_memory(url).values()))
        await asyncio.sleep(MEMORY_SECONDS)


async def soak(model: Path, url: str, minutes: float, overload: float) -> dict[str, Any]:
    """Run all steps and return the figures."""
    # Each request gets a connection of its own, because the server may close an idle one just when a client uses it.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(url, connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
        run = Soak(session, str(model), random.Random(0))
        await run.ask_alone()
        await run.warm_up()
        capacity = await run.capacity()
        run.counts.clear()
        before = server_memory(url)
        trace: list[int] = []
        watch = asyncio.create_task(watch_memory(url, trace))
        started = time.monotonic()
        await run.overload(overload * capacity, 60 * minutes)
        watch.cancel()
        drained = time.monotonic() - started
        await run.send("short")
    after = server_memory(url)
    growth = sum(after.values()) / sum(before.values()) - 1
    if growth > MEMORY_SLACK:
        run.problems.append(f"memory grew by {growth:.1%}")
    return {
        "minutes": minutes,
        "capacity_requests_per_second": round(capacity, 2),
        "sent_per_second": round(overload * capacity, 2),
        "seconds_until_last_answer": round(drained),
        **{key: run.counts[key] for key in ("sent", "completed", "wrong", "refused", "vanished", "aborted")},
        "memory_growth": round(growth, 4),
        "memory_before_mb": before,
        "memory_after_mb": after,
        f"memory_every_{MEMORY_SECONDS}_seconds_mb": trace,
        "problems": run.problems,
    }


def format_name(text: str) -> str:
    """The value of an option that names a cache format, or :data:`UNPACKED`."""
    try:
        return text if text == UNPACKED else CacheFormat.parse(text).spec
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def as_served(folder: Path, asked: str | None) -> tuple[Model, list[str]]:
    """The model with the cache format that is asked for, and the options of ``vllm serve`` for it."""
    config, options = read_config(folder, trust_remote_code=False), list(OPTIONS)
    if asked is not None:
        config.latent_cache = None if asked == UNPACKED else latent_cache_json([CacheFormat.parse(asked)])
        options += ["--hf-overrides", json.dumps({"latent_cache": config.latent_cache})]
    model = Model(folder.name, str(folder), config)
    # A number has 4 bytes, because the server computes in float32.
    row = 4 * model.cached_numbers if model.cache_format is None else model.cached_bytes
    size = round(CACHE_TOKENS * config.num_hidden_layers * row)
    return model, [*options, "--kv-cache-memory-bytes", str(size)]


def main() -> None:
    """Measure, print, and write the result file; end with exit code 1 if anything went wrong."""
    parser = plain_parser(__doc__)
    parser.add_argument("model", type=Path, help="converted checkpoint with the demo model's tokenizer")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--overload", type=float, default=1.5, help="requests sent for each that the server completes")
    parser.add_argument(
        "--latent-cache",
        metavar="FORMAT",
        type=format_name,
        help=f"how to pack the cache, such as 144x4g48/48x8g48, or {UNPACKED} for numbers; default: as MODEL says",
    )
    arguments = parser.parse_args()
    asked = arguments.latent_cache
    model, options = as_served(arguments.model, asked)
    log = Path(tempfile.gettempdir(), "soak.log")
    with serve(arguments.model, log, *options, environment=SERVING | GIVE_BACK) as url:
        figures = asyncio.run(soak(arguments.model, url, arguments.minutes, arguments.overload))
    print(json.dumps(figures, indent=2))
    figures |= {"model": model.name, "latent_cache": model.cache_format}
    command = f"python -m benchmarks.soak {model.name} --minutes {arguments.minutes:g}"
    command += f" --overload {arguments.overload:g}" + (f" --latent-cache {asked}" if asked else "")
    write_result("soak" if model.cache_format is None else "soak_packed", command, figures)
    sys.exit(1 if figures["wrong"] or figures["problems"] else 0)


if __name__ == "__main__":
    main()
