"""Measures the conversion of a large model: time of each layer, peak memory and disk, compared with ``vllm-mla plan``.

    python -m benchmarks.large --folder /scratch [--layers 32] [--refit-steps 0] [OPTION...]

Writes a checkpoint of Llama-3-8B's shape (bfloat16, random weights, shards of 5 GB) into the folder, converts it to
512 + 64 with 4,096 calibration tokens in a process of its own, and watches that process and the disk. For 32 layers
the folder needs about 35 GB. Further options go to ``vllm-mla convert``.

Llama-3-70B's shape is not converted but projected: the estimate of ``plan`` for it, multiplied by measurement over
estimate of the model that was converted.
"""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.progress import track
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.common import VLLM_MLA, plain_parser, write_result
from mla_converters.checkpoints.writer import Shards
from mla_converters.options import AttentionAwareOptions
from scripts.demo_model import ROOT, demo_folder

TOKENS = 4096
SIZES = ("--kv-lora-rank", "512", "--qk-rope-head-dim", "64")
SCALE = 0.02  # standard deviation of the weights, the same as in Llama's initialisation
EVERY = 0.2  # seconds between two looks at the process
COMMON = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
}
SMALL = {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
LARGE = {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}


def write_source(folder: Path, config: LlamaConfig) -> None:
    """Write a random model, with one tensor in memory at a time."""
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tensors = skeleton.state_dict()
    shards = Shards(folder, tensors)
    shards.allocate()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in track(tensors.items(), "Writing the source"):
        filled = torch.ones(tensor.shape, dtype=torch.bfloat16)
        shards.write(name, filled if tensor.dim() == 1 else filled.normal_(0, SCALE, generator=generator))
    shards.finish()
    for path in demo_folder().glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)


def plan(source: Path, refit_steps: int) -> dict[str, Any]:
    """The estimates of ``vllm-mla plan`` for a conversion."""
    report = source.with_suffix(".plan.json")
    command = [VLLM_MLA, "plan", source, "--calibration-tokens", str(TOKENS), "--refit-steps", str(refit_steps)]
    command += ["--json", report]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    planned = json.loads(report.read_text())
    assert (planned["recommended"]["kv_lora_rank"], planned["recommended"]["qk_rope_head_dim"]) == (512, 64)
    return planned["conversion"]


@dataclass
class Stage:
    """A part of a conversion: one layer, or the time before or after all layers.

    Attributes:
        name: ``before``, ``layer`` and its number, or ``after``.
        seconds: how long it took.
        peak_rss_gb: largest resident memory that was seen.
        peak_anonymous_gb: largest resident memory that was seen without the pages of mapped files.
    """

    name: str
    seconds: float = 0.0
    peak_rss_gb: float = 0.0
    peak_anonymous_gb: float = 0.0

    def saw(self, process: psutil.Process, seconds: float) -> None:
        """Note the memory of the process at the end of these seconds."""
        memory = process.memory_info()
        self.seconds = round(self.seconds + seconds, 2)
        self.peak_rss_gb = max(self.peak_rss_gb, round(memory.rss / 1e9, 3))
        self.peak_anonymous_gb = max(self.peak_anonymous_gb, round((memory.rss - memory.shared) / 1e9, 3))


def stage_name(work: Path, layers: int) -> str:
    """The stage of the conversion that works in this folder, judged by what it has saved."""
    try:
        with safe_open(work / "layers.safetensors", framework="pt") as record:
            done = json.loads(record.metadata()["done"])
    except (OSError, SafetensorError):
        return "before"
    return f"layer {done}" if done < layers else "after"


def disk_bytes(*folders: Path) -> int:
    """Bytes of disk that folders take, while files in them come and go."""
    total = 0
    for folder in folders:
        for path in folder.rglob("*"):
            try:
                total += path.stat().st_blocks * 512
            except OSError:
                continue
    return total


def watched_conversion(source: Path, out: Path, layers: int, options: list[str]) -> dict[str, Any]:
    """Convert, and watch the process and the disk until it ends."""
    report, work = out.with_suffix(".json"), out.with_name(f"{out.name}.partial")
    command = [VLLM_MLA, "convert", source, out, *SIZES, "--calibration", ROOT / "LICENSE"]
    command += ["--calibration-tokens", str(TOKENS), *options, "--force", "--json", report]
    stages: dict[str, Stage] = {}
    peak_disk, last = 0, time.monotonic()
    with psutil.Popen(list(map(str, command))) as process:
        while process.poll() is None:
            time.sleep(EVERY)
            name, now = stage_name(work, layers), time.monotonic()
            try:
                stages.setdefault(name, Stage(name)).saw(process, now - last)
            except psutil.NoSuchProcess:
                break
            peak_disk, last = max(peak_disk, disk_bytes(work, out)), now
    if process.returncode:
        sys.exit(f"The conversion failed with exit code {process.returncode}.")
    written = json.loads(report.read_text())
    return {
        "method": written["method"],
        "seconds": written["seconds"],
        "peak_rss_gb": round(written["peak_rss_bytes"] / 1e9, 2),
        "peak_disk_gb": round(peak_disk / 1e9, 2),
        "output_gb": round(sum(path.stat().st_size for path in out.iterdir()) / 1e9, 2),
        "threads": torch.get_num_threads(),
        "stages": [asdict(stage) for stage in stages.values()],
    }


def planned_figures(planned: dict[str, Any], measured: dict[str, Any]) -> dict[str, float]:
    """The estimates of ``plan`` for the figures that were measured."""
    return {
        "core_seconds": planned["core_seconds"][measured["method"]],
        "peak_rss_gb": round(planned["peak_memory_bytes"]["file"] / 1e9, 2),
        "peak_disk_gb": round(planned["peak_disk_bytes"] / 1e9, 2),
        "output_gb": round(planned["weights_bytes"] / 1e9, 2),
    }


def main() -> None:
    """Measure, project, print, and write the result file."""
    parser = plain_parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for large files, which are removed at the end")
    parser.add_argument("--layers", type=int, default=SMALL["num_hidden_layers"], help="fewer make a quick trial")
    parser.add_argument("--refit-steps", type=int, default=AttentionAwareOptions().refit_steps, help="of each layer")
    arguments, options = parser.parse_known_args()
    options += ["--refit-steps", str(arguments.refit_steps)]
    source, out, large = (arguments.folder / f"large-{name}" for name in ("source", "mla", "70b"))
    try:
        config = LlamaConfig(**COMMON, **SMALL | {"num_hidden_layers": arguments.layers})
        write_source(source, config)
        LlamaConfig(**COMMON, **LARGE).save_pretrained(large)
        measured = watched_conversion(source, out, arguments.layers, options)
        planned, planned_large = (
            planned_figures(plan(folder, arguments.refit_steps), measured) for folder in (source, large)
        )
    finally:
        for path in arguments.folder.glob("large-*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    core_seconds = measured["seconds"] * measured["threads"]
    result = {
        "layers": arguments.layers,
        "options": options,
        "measured": measured,
        "planned": planned,
        "projected_70b": {
            "core_hours": round(planned_large["core_seconds"] * core_seconds / planned["core_seconds"] / 3600, 1),
            **{
                figure: round(planned_large[figure] * measured[figure] / planned[figure], 1)
                for figure in ("peak_rss_gb", "peak_disk_gb")
            },
            "derived": "plan for Llama-3-70B's shape x measured / plan of the shape measured",
        },
    }
    print(json.dumps(result, indent=2))
    write_result("large", f"python -m benchmarks.large {' '.join(sys.argv[1:])}", result)


if __name__ == "__main__":
    main()
