"""Measures throughput and KV capacity on a GPU: MLA against MHA and GQA.

    python -m benchmarks.gpu [--only NAME] [--cache 16.5] [--rounds 1]

Only the shapes are real: weights are random, and nothing is downloaded. Serves pairs of configurations through vLLM,
each engine with the same memory for its cache. After each model it writes benchmarks/results/gpu.json, with the ratios
of pairs and whether they reach their targets. Rows that are in the file already are kept: remove them to measure again.

`most` requests are as many as a model's cache holds at full length, so that both models are measured with a full cache.
`--try` runs one layer on short prompts, which shows whether everything works.
"""

import itertools
import json
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks.common import RESULTS, plain_parser, write_result
from mla_converters.bench.run import bench
from mla_converters.options import MOST, BenchOptions, Workload
from vllm_mla_plugin.checkpoint.config import CONFIG_CLASSES

LLAMA_2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_3_8B = LLAMA_2_7B | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
RATE, DECODE, CAPACITY = "output_tokens_per_second", "decode_tokens_per_second", "kv_capacity_tokens"

Targets = dict[Workload, dict[str, float]]
"""Workloads to measure and, of each, the smallest ratios to the source that are expected."""


@dataclass(frozen=True)
class Case:
    """A source and its conversion.

    Attributes:
        shape: fields of the source's configuration; the head size is 128.
        targets: see :data:`Targets`.
        latent: ``kv_lora_rank`` of the conversion; or one for each layer, in turn.
        rope: its ``qk_rope_head_dim``, or the same.
    """

    shape: dict[str, int]
    targets: Targets
    latent: int | tuple[int, ...] = 512
    rope: int | tuple[int, ...] = 64


CASES = {
    "llama-2-7b": Case(LLAMA_2_7B, {Workload(MOST, 8192, 8192): {RATE: 10.6}}),
    "llama-3-8b": Case(
        LLAMA_3_8B,
        {
            Workload(MOST, 8192, 8192): {RATE: 2.5, CAPACITY: 3.55},
            Workload(MOST, 32768, 512): {DECODE: 2.5},
            # Small caches leave little to gain here, but nothing may be lost either.
            Workload(64, 128, 256): {RATE: 0.95},
            Workload(1, 1024, 256): {RATE: 0.95},
            Workload(1, 8192, 256): {RATE: 0.95},
        },
    ),
    # Half of the cache; this plugin's own kernel decodes it.
    "llama-3-8b-half": Case(LLAMA_3_8B, {Workload(MOST, 8192, 1024): {CAPACITY: 1.99}}, latent=960),
    # As many numbers as 512 + 64 in all layers, in four sizes.
    "llama-3-8b-per-layer": Case(
        LLAMA_3_8B,
        {
            Workload(MOST, 8192, 8192): {RATE: 2.4, CAPACITY: 3.55},
            Workload(1, 1024, 256): {RATE: 0.95},
            Workload(1, 8192, 256): {RATE: 0.95},
        },
        latent=(256, 384, 640, 768),
        rope=(32, 48, 80, 96),
    ),
}


def by_layer(size: int | tuple[int, ...], name: str, layers: int) -> dict[str, Any]:
    """The field of a configuration for a size, or for one size a layer."""
    return {name: size} if isinstance(size, int) else {f"{name}s": [size[n % len(size)] for n in range(layers)]}


def write_configs(case: Case, layers: int | None, folder: Path) -> None:
    """Write ``config.json`` of the source and of its conversion, and nothing else, into ``source`` and ``mla``."""
    shape: dict[str, Any] = case.shape | {"max_position_embeddings": 65536, "dtype": "bfloat16"}
    if layers is not None:
        shape["num_hidden_layers"] = layers
    count = shape["num_hidden_layers"]
    mla = by_layer(case.latent, "kv_lora_rank", count) | by_layer(case.rope, "qk_rope_head_dim", count)
    mla |= {"qk_nope_head_dim": 128, "v_head_dim": 128}
    LlamaConfig(**shape, architectures=["LlamaForCausalLM"]).save_pretrained(folder / "source")
    CONFIG_CLASSES["llama_mla"](**shape, **mla, architectures=["LlamaMLAForCausalLM"]).save_pretrained(folder / "mla")


def workload(row: dict[str, Any]) -> Workload:
    """The workload that a row is about."""
    return Workload(row["requests"], row["input_len"], row["output_len"])


def measure(
    name: str, model: str, workloads: tuple[Workload, ...], cache: float, rounds: int, trial: bool
) -> list[dict[str, Any]]:
    """Measure one model and return its rows, one for each workload."""
    case = CASES[name]
    options = BenchOptions(
        workloads=(Workload(2, 32, 8),) if trial else workloads,
        rounds=rounds,
        load_format="dummy",
        cache=round(cache * 2**30),
    )
    with tempfile.TemporaryDirectory(prefix="vllm-mla-gpu-") as folder:
        write_configs(case, 1 if trial else None, Path(folder))
        report = bench([str(Path(folder, model))], options, quiet=True).as_json()
    rows = report["models"]
    for row in rows:
        del row["ratios"]  # of the model to itself
        row |= {"case": name, "name": model, "cache_gib": cache}
        row |= {"hardware": report["hardware"], "versions": report["versions"]}
        shown = ("requests", "input_len", "output_len", RATE, DECODE, "kv_capacity_tokens", "peak_concurrency")
        print(name, model, {key: row[key] for key in shown}, flush=True)
    return rows


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All rows; those of conversions get their ratios to the source's row, if there is one, and their targets."""
    sources = {(row["case"], workload(row)): row for row in rows if row["name"] == "source"}
    result = []
    for row in rows:
        source = sources.get((row["case"], workload(row)))
        if row["name"] == "mla" and source is not None:
            ratios = {key: row[key] / source[key] for key in (RATE, DECODE, CAPACITY) if row[key] and source[key]}
            targets = CASES[row["case"]].targets[workload(row)]
            reached = {key: ratios.get(key, 0) >= least for key, least in targets.items()}
            row = row | {"ratios": ratios, "targets": targets, "reached": reached}
            print(row["case"], row["requests"], f"{row['input_len']}:{row['output_len']}", ratios, reached, flush=True)
        result.append(row)
    return result


def main() -> None:
    """Measure, print, and write the result file."""
    parser = plain_parser(__doc__)
    parser.add_argument("--only", choices=CASES, help="one pair instead of all")
    # Two requests of 8K + 8K fill 16.5 GiB for Llama-2-7B, and eight for Llama-3-8B; a little is left.
    parser.add_argument("--cache", type=float, default=16.5, help="memory of each engine's cache in GiB")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--try", dest="trial", action="store_true", help="one layer, short prompts, no result file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a GPU")
    result = RESULTS / "gpu.json"
    rows: list[dict[str, Any]] = json.loads(result.read_text())["rows"] if result.exists() else []
    command = shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]])
    for name, model in itertools.product([arguments.only] if arguments.only else CASES, ("source", "mla")):
        known = [workload(row) for row in rows if (row["case"], row["name"]) == (name, model)]
        missing = tuple(each for each in CASES[name].targets if each not in known)
        if not missing and not arguments.trial:
            continue
        new = measure(name, model, missing, arguments.cache, arguments.rounds, arguments.trial)
        if not arguments.trial:
            rows = compared(rows + [row | {"command": command} for row in new])
            write_result("gpu", command, {"rows": rows})


if __name__ == "__main__":
    main()
