"""Measures throughput and KV capacity on a GPU: MLA against MHA and GQA, each with the caches that vLLM can keep of it.

    python -m benchmarks.gpu [--only NAME] [--engines ENGINE ...] [--cache 16.5] [--rounds 1]

Only the shapes are real: weights are random, and nothing is downloaded. Serves configurations through vLLM, each engine
with the same memory for its cache: the source with 16 bits, fp8, int4_per_token_head and turboquant_4bit_nc, and its
conversion with 16 bits, fp8 and packed rows. A GPU that does not serve one of them says so, and the others go on. After
each engine it writes benchmarks/results/gpu.json, with the ratios of conversions to the source in 16 bits and to its
other caches, and whether they reach their targets. Rows that are in the file already are kept: remove them to measure
again.

`most` requests are as many as a model's cache holds at full length, so that both models are measured with a full cache.
`--try` runs one layer on short prompts, which shows whether everything works.
"""

import itertools
import json
import shlex
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks.common import RESULTS, plain_parser, write_result
from mla_converters.bench.run import bench
from mla_converters.errors import ConversionError
from mla_converters.latent.packed_sizes import uniform_format
from mla_converters.options import MOST, BenchOptions, Workload
from vllm_mla_plugin.checkpoint.config import CONFIG_CLASSES
from vllm_mla_plugin.checkpoint.latent_cache import latent_cache_json

LLAMA_2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_3_8B = LLAMA_2_7B | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
RATE, DECODE, CAPACITY = "output_tokens_per_second", "decode_tokens_per_second", "kv_capacity_tokens"

ENGINES: dict[str, tuple[str, dict[str, str]]] = {
    "source": ("source", {}),
    "source fp8": ("source", {"kv_cache_dtype": "fp8"}),
    "source int4": ("source", {"kv_cache_dtype": "int4_per_token_head"}),
    "source turboquant": ("source", {"kv_cache_dtype": "turboquant_4bit_nc"}),
    "mla": ("mla", {}),
    "mla fp8": ("mla", {"kv_cache_dtype": "fp8"}),
    "mla packed": ("packed", {}),
}
"""What is measured: the folder of a configuration, and the arguments of its engine."""
PACKED_BITS = 4

Targets = dict[Workload, dict[str, float]]
"""Workloads to measure and, of each, the smallest ratios to the source that are expected."""


@dataclass(frozen=True)
class Case:
    """A source and its conversion.

    Attributes:
        shape: fields of the source's configuration; the head size is 128.
        targets: of the conversion in 16 bits, compared with the source in 16 bits; see :data:`Targets`.
        fp8_targets: the same, compared with the source's fp8 cache.
        latent: ``kv_lora_rank`` of the conversion; or one for each layer, in turn.
        rope: its ``qk_rope_head_dim``, or the same.
    """

    shape: dict[str, int]
    targets: Targets
    latent: int | tuple[int, ...] = 512
    rope: int | tuple[int, ...] = 64
    fp8_targets: Targets = field(default_factory=dict)


CASES = {
    "llama-2-7b": Case(LLAMA_2_7B, {Workload(MOST, 8192, 8192): {RATE: 10.6}}),
    "llama-3-8b": Case(
        LLAMA_3_8B,
        {
            Workload(MOST, 8192, 8192): {RATE: 2.6, CAPACITY: 3.55},
            Workload(MOST, 32768, 512): {DECODE: 2.5},
            # Small caches leave little to gain here, but nothing may be lost either.
            Workload(64, 128, 256): {RATE: 0.95},
            Workload(1, 1024, 256): {RATE: 1.0},
            Workload(1, 8192, 256): {RATE: 1.0},
        },
        fp8_targets={Workload(MOST, 8192, 8192): {RATE: 1.3}},
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


def by_layer(size: int | tuple[int, ...], layers: int) -> list[int]:
    """The size of each layer."""
    sizes = (size,) if isinstance(size, int) else size
    return [sizes[layer % len(sizes)] for layer in range(layers)]


def write_configs(case: Case, layers: int | None, folder: Path) -> None:
    """Write ``config.json`` of the source and of its conversions into the folders of :data:`ENGINES`."""
    shape: dict[str, Any] = case.shape | {"max_position_embeddings": 65536, "dtype": "bfloat16"}
    if layers is not None:
        shape["num_hidden_layers"] = layers
    latents, ropes = (by_layer(size, shape["num_hidden_layers"]) for size in (case.latent, case.rope))
    mla: dict[str, Any] = {
        "kv_lora_ranks": latents,
        "qk_rope_head_dims": ropes,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "rotary_query_map": True,  # as ``convert`` writes these shapes
    }
    LlamaConfig(**shape, architectures=["LlamaForCausalLM"]).save_pretrained(folder / "source")
    formats = [uniform_format(*sizes, PACKED_BITS) for sizes in zip(latents, ropes, strict=True)]
    packed = {"latent_cache": latent_cache_json(formats)}
    for name, cache in (("mla", {}), ("packed", packed)):
        config = CONFIG_CLASSES["llama_mla"](**shape, **mla, **cache, architectures=["LlamaMLAForCausalLM"])
        config.save_pretrained(folder / name)


def workload(row: dict[str, Any]) -> Workload:
    """The workload that a row is about."""
    return Workload(row["requests"], row["input_len"], row["output_len"])


def measure(
    name: str, engine: str, workloads: tuple[Workload, ...], cache: float, rounds: int, trial: bool
) -> list[dict[str, Any]]:
    """Measure one engine and return its rows, one for each workload."""
    case = CASES[name]
    model, arguments = ENGINES[engine]
    options = BenchOptions(
        workloads=(Workload(2, 32, 8),) if trial else workloads,
        rounds=rounds,
        load_format="dummy",
        cache=round(cache * 2**30),
        engine=arguments,
    )
    with tempfile.TemporaryDirectory(prefix="vllm-mla-gpu-") as folder:
        write_configs(case, 1 if trial else None, Path(folder))
        report = bench([str(Path(folder, model))], options, quiet=True).as_json()
    rows = report["models"]
    for row in rows:
        del row["ratios"]  # of the model to itself
        row |= {"case": name, "name": engine, "cache_gib": cache}
        row |= {"hardware": report["hardware"], "versions": report["versions"]}
        shown = ("requests", "input_len", "output_len", RATE, DECODE, "kv_capacity_tokens", "peak_concurrency")
        print(name, engine, {key: row[key] for key in shown}, flush=True)
    return rows


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All rows; those of conversions get their ratios to each cache of the source, and their targets.

    ``ratios`` are those to the source in 16 bits, ``rival_ratios`` those to its other caches by the engine's name, and
    ``ratios_to_best`` the smallest of all.
    """
    sources: dict[tuple[str, Workload], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["name"].startswith("source"):
            sources.setdefault((row["case"], workload(row)), {})[row["name"]] = row
    result = []
    for row in rows:
        others = {} if row["name"].startswith("source") else sources.get((row["case"], workload(row)), {})
        found = {name: ratios(row, other) for name, other in others.items()}
        if "source" in found:
            shared = set.intersection(*map(set, found.values()))
            best = {key: min(each[key] for each in found.values()) for key in sorted(shared)}
            own, fp8 = found.pop("source"), found.get("source fp8")
            row = row | {"ratios": own, "rival_ratios": found, "ratios_to_best": best}
            if row["name"] == "mla":
                case = CASES[row["case"]]
                row |= {"targets": case.targets[workload(row)], "fp8_targets": case.fp8_targets.get(workload(row), {})}
                row["reached"] = reached(row["targets"], own)
                row["fp8_reached"] = {} if fp8 is None else reached(row["fp8_targets"], fp8)
            size = f"{row['requests']} x {row['input_len']}:{row['output_len']}"
            print(row["case"], row["name"], size, own, found, row.get("reached"), row.get("fp8_reached"), flush=True)
        result.append(row)
    return result


def ratios(row: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """How many times as good a row's figures are as another row's, as far as both have them."""
    return {key: row[key] / other[key] for key in (RATE, DECODE, CAPACITY) if row[key] and other[key]}


def reached(targets: dict[str, float], ratios: dict[str, float]) -> dict[str, bool]:
    """Whether the ratios reach their targets."""
    return {key: ratios.get(key, 0) >= least for key, least in targets.items()}


def main() -> None:
    """Measure, print, and write the result file."""
    parser = plain_parser(__doc__)
    parser.add_argument("--only", choices=CASES, help="one case instead of all")
    parser.add_argument("--engines", choices=ENGINES, nargs="+", default=list(ENGINES), help="some engines, not all")
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
    for name, engine in itertools.product([arguments.only] if arguments.only else CASES, arguments.engines):
        known = [workload(row) for row in rows if (row["case"], row["name"]) == (name, engine)]
        missing = tuple(each for each in CASES[name].targets if each not in known)
        if not missing and not arguments.trial:
            continue
        try:
            new = measure(name, engine, missing, arguments.cache, arguments.rounds, arguments.trial)
        except ConversionError as refusal:
            if engine in ("source", "mla"):
                raise
            print(name, engine, f"not measured: {refusal}", flush=True)
            continue
        if not arguments.trial:
            rows = compared(rows + [row | {"command": command} for row in new])
            write_result("gpu", command, {"rows": rows})


if __name__ == "__main__":
    main()
