"""Throughput and KV capacity on a GPU: MLA against MHA and GQA, by shape alone (random weights, no downloads).

    python benchmarks/gpu.py [--only NAME] [--requests 64] [--rounds 2]

Runs `vllm-mla bench --load-format dummy` on pairs of configurations and writes benchmarks/results/gpu.json after each,
with the ratios and whether they reach their targets; pairs already in it stay unless they are measured again. `--try`
runs one layer on short prompts, to see that everything works. Not run on a GPU yet.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import RESULTS, VLLM_MLA, write_result
from transformers import LlamaConfig

from vllm_mla_plugin.config import LlamaMLAConfig

LLAMA_2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_3_8B = LLAMA_2_7B | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}


@dataclass(frozen=True)
class Case:
    """A source shape, the cache of its conversion, and what is expected of the pair.

    Attributes:
        name: for ``--only``.
        shape: fields of the source's configuration; head size 128.
        latent: ``kv_lora_rank`` of the conversion.
        rope: its ``qk_rope_head_dim``.
        lengths: input and output lengths, as ``vllm-mla bench`` takes them.
        requests: how many at once; None for as many as the command line says, enough to fill the cache.
        targets: least ratio to the source, by name in the report.
    """

    name: str
    shape: dict[str, int]
    lengths: str
    latent: int = 512
    rope: int = 64
    requests: int | None = None
    targets: dict[str, float] = field(default_factory=dict)


CASES = (
    Case("llama-2-7b-8k", LLAMA_2_7B, "8192", targets={"output_tokens_per_second": 10.6}),
    Case(
        "llama-3-8b-8k",
        LLAMA_3_8B,
        "8192:1024",
        requests=256,
        targets={"output_tokens_per_second": 2.5, "kv_capacity": 3.55},
    ),
    Case("llama-3-8b-32k", LLAMA_3_8B, "32768:1024", targets={"output_tokens_per_second": 2.5, "kv_capacity": 3.55}),
    # Little to gain: it must not cost anything either.
    Case("llama-3-8b-one", LLAMA_3_8B, "1024,8192", requests=1, targets={"output_tokens_per_second": 0.95}),
    Case("llama-3-8b-short", LLAMA_3_8B, "128:256", targets={"output_tokens_per_second": 0.95}),
    # Half the cache, which vLLM's Triton kernel decodes through this plugin.
    Case("llama-3-8b-half", LLAMA_3_8B, "8192:1024", latent=960, requests=256, targets={"kv_capacity": 1.99}),
)


def write_configs(case: Case, layers: int | None, folder: Path) -> tuple[Path, Path]:
    """``config.json`` of the source and of its conversion, and nothing else; their folders."""
    shape: dict[str, Any] = case.shape | {"max_position_embeddings": 65536, "dtype": "bfloat16"}
    if layers is not None:
        shape["num_hidden_layers"] = layers
    mla = {"kv_lora_rank": case.latent, "qk_rope_head_dim": case.rope, "qk_nope_head_dim": 128, "v_head_dim": 128}
    source, model = folder / "source", folder / "mla"
    LlamaConfig(**shape, architectures=["LlamaForCausalLM"]).save_pretrained(source)
    LlamaMLAConfig(**shape, **mla, architectures=["LlamaMLAForCausalLM"]).save_pretrained(model)
    return source, model


def run(case: Case, requests: int, rounds: int, trial: bool) -> list[dict[str, Any]]:
    """Measure a pair; the rows of the conversion, with its targets."""
    with tempfile.TemporaryDirectory(prefix="vllm-mla-gpu-") as name:
        source, model = write_configs(case, 1 if trial else None, Path(name))
        file = Path(name, "bench.json")
        command = [str(VLLM_MLA), "bench", str(source), str(model), "--load-format", "dummy", "--json", str(file)]
        command += ["--lengths", "32:8" if trial else case.lengths, "--rounds", str(rounds)]
        command += ["--requests", str(2 if trial else case.requests or requests)]
        subprocess.run(command, check=True)
        report = json.loads(file.read_text())
    rows = report["models"]
    for row in rows:
        row |= {"case": case.name, "hardware": report["hardware"], "vllm": report["versions"]["vllm"]}
        row["name"] = Path(row["name"]).name
        if row["name"] == "mla":
            reached = {key: row["ratios"][key] >= least for key, least in case.targets.items()}
            row |= {"targets": case.targets, "reached": reached}
            print(case.name, f"{row['input_len']}:{row['output_len']}", row["ratios"], reached, flush=True)
    return rows


def main() -> None:
    """Measure, print, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[case.name for case in CASES], help="one pair instead of all")
    parser.add_argument("--requests", type=int, default=64, help="at once, where the cache is to be filled")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--try", dest="trial", action="store_true", help="one layer, short prompts, no result file")
    arguments = parser.parse_args()
    result = RESULTS / "gpu.json"
    rows: list[dict[str, Any]] = json.loads(result.read_text())["rows"] if result.exists() else []
    for case in CASES:
        if arguments.only not in (None, case.name):
            continue
        new = run(case, arguments.requests, arguments.rounds, arguments.trial)
        if arguments.trial:
            continue
        command = f"python {shlex.join(sys.argv)}"
        rows = [row for row in rows if row["case"] != case.name] + [row | {"command": command} for row in new]
        write_result("gpu", command, {"hardware": new[0]["hardware"], "rows": rows})


if __name__ == "__main__":
    main()
