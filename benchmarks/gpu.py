"""Throughput and KV capacity on a GPU: MLA against MHA and GQA, by shape alone (random weights, no downloads).

    python benchmarks/gpu.py [--only NAME] [--cache 16.5] [--rounds 1]

Serves pairs of configurations through vLLM, each engine with the same memory for its cache, and writes
benchmarks/results/gpu.json after each pair, with the ratios and whether they reach their targets; pairs already in it
stay unless they are measured again. `most` requests are as many as a model's cache holds at full length, so that both
models are measured with a full one. `--try` runs one layer on short prompts, to see that everything works.
"""

import argparse
import json
import shlex
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write_result
from transformers import LlamaConfig

from mla_converters.bench.run import MOST, BenchOptions, Workload, bench
from vllm_mla_plugin.config import LlamaMLAConfig

LLAMA_2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_3_8B = LLAMA_2_7B | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
RATE, DECODE, CAPACITY = "output_tokens_per_second", "decode_tokens_per_second", "kv_capacity"

Targets = dict[Workload, dict[str, float]]
"""What is measured, and the least ratios to the source that are expected of it."""


@dataclass(frozen=True)
class Case:
    """A source shape, the cache of its conversion, and what is expected of the pair.

    Attributes:
        shape: fields of the source's configuration; head size 128.
        targets: by workload.
        latent: ``kv_lora_rank`` of the conversion.
        rope: its ``qk_rope_head_dim``.
    """

    shape: dict[str, int]
    targets: Targets
    latent: int = 512
    rope: int = 64


CASES = {
    "llama-2-7b": Case(LLAMA_2_7B, {Workload(MOST, 8192, 8192): {RATE: 10.6}}),
    "llama-3-8b": Case(
        LLAMA_3_8B,
        {
            Workload(MOST, 8192, 8192): {RATE: 2.5, CAPACITY: 3.55},
            Workload(MOST, 32768, 512): {DECODE: 2.5},
            # Little to gain: it must not cost anything either.
            Workload(64, 128, 256): {RATE: 0.95},
            Workload(1, 1024, 256): {RATE: 0.95},
            Workload(1, 8192, 256): {RATE: 0.95},
        },
    ),
    # Half the cache, which vLLM's Triton kernel decodes through this plugin.
    "llama-3-8b-half": Case(LLAMA_3_8B, {Workload(MOST, 8192, 1024): {CAPACITY: 1.99}}, latent=960),
}


def write_configs(case: Case, layers: int | None, folder: Path) -> list[str]:
    """``config.json`` of the source and of its conversion, and nothing else; their folders."""
    shape: dict[str, Any] = case.shape | {"max_position_embeddings": 65536, "dtype": "bfloat16"}
    if layers is not None:
        shape["num_hidden_layers"] = layers
    mla = {"kv_lora_rank": case.latent, "qk_rope_head_dim": case.rope, "qk_nope_head_dim": 128, "v_head_dim": 128}
    LlamaConfig(**shape, architectures=["LlamaForCausalLM"]).save_pretrained(folder / "source")
    LlamaMLAConfig(**shape, **mla, architectures=["LlamaMLAForCausalLM"]).save_pretrained(folder / "mla")
    return [str(folder / "source"), str(folder / "mla")]


def run(name: str, cache: float, rounds: int, trial: bool) -> list[dict[str, Any]]:
    """Measure a pair; the rows of the source and of the conversion, with its targets."""
    case = CASES[name]
    options = BenchOptions(
        workloads=tuple(case.targets),
        rounds=rounds,
        load_format="dummy",
        kv_cache_bytes=round(cache * 2**30),
    )
    if trial:
        options = replace(options, workloads=(Workload(2, 32, 8),))
    with tempfile.TemporaryDirectory(prefix="vllm-mla-gpu-") as folder:
        report = bench(write_configs(case, 1 if trial else None, Path(folder)), options, quiet=True)
    rows = []
    for row in report["models"]:
        targets = case.targets.get(Workload(row["requests"], row["input_len"], row["output_len"]), {})
        row |= {"case": name, "cache_gib": cache, "hardware": report["hardware"], "versions": report["versions"]}
        row["name"] = Path(row["name"]).name
        if row["name"] == "mla":
            reached = {key: row["ratios"][key] >= least for key, least in targets.items()}
            row |= {"targets": targets, "reached": reached}
        rows.append(row)
        shown = ("requests", "input_len", "output_len", RATE, DECODE, "kv_capacity_tokens", "peak_concurrency")
        print(name, row["name"], {key: row[key] for key in shown}, row["ratios"], row.get("reached"), flush=True)
    return rows


def main() -> None:
    """Measure, print, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES, help="one pair instead of all")
    # Two requests of 8K + 8K fill it for Llama-2-7B, eight for Llama-3-8B, and a little is left.
    parser.add_argument("--cache", type=float, default=16.5, help="of each engine, GiB")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--try", dest="trial", action="store_true", help="one layer, short prompts, no result file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a GPU")
    result = RESULTS / "gpu.json"
    rows: list[dict[str, Any]] = json.loads(result.read_text())["rows"] if result.exists() else []
    for name in [arguments.only] if arguments.only else CASES:
        new = run(name, arguments.cache, arguments.rounds, arguments.trial)
        if arguments.trial:
            continue
        command = shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]])
        rows = [row for row in rows if row["case"] != name] + [row | {"command": command} for row in new]
        write_result("gpu", command, {"hardware": new[0]["hardware"], "rows": rows})


if __name__ == "__main__":
    main()
