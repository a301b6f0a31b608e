"""How many tokens do packed caches hold, and how fast do they decode, beside the same numbers in 16 bits?

    python -m benchmarks.packed_speed [--shares 0.25] [--rounds 2]

Takes the formats that `benchmarks.quality` found for each share of the source's bytes, and converts the demo model to
them with few tokens of calibration, because neither speed nor capacity depends on quality.

- Capacity: what vLLM reports for 1 GiB, divided by the source's.
- Speed, for `--shares`: `vllm-mla bench` runs the conversion with packed and with 16-bit rows side by side, with 16
  requests of 2,048 and of 6,144 tokens.
"""

import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import VLLM_MLA, convert, measured_rows, plain_parser, write_result
from scripts.demo_model import demo_folder

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = "2048:40,6144:40"
CALIBRATION = ("--calibration", str(ROOT / "LICENSE"), "--calibration-tokens", "2048")
QUICKLY = ("--refit-steps", "0", "--without", "least-squares")


def formats() -> dict[float, dict[str, Any]]:
    """The rows of the quality benchmark that have packed caches: the first for each share of the bytes."""
    rows = reversed(measured_rows("quality").values())
    return {row["bytes"]: row for row in rows if "latent_cache" in row}


def packed(row: dict[str, Any], out: Path) -> Path:
    """The demo model with the row's format."""
    convert(demo_folder(), out, "--latent-cache", row["latent_cache"], *CALIBRATION, *QUICKLY)
    return out


def in_16_bits(model: Path, out: Path) -> Path:
    """A copy of a packed checkpoint whose rows are not packed."""
    shutil.copytree(model, out)
    config = json.loads((out / "config.json").read_text())
    del config["latent_cache"]
    (out / "config.json").write_text(json.dumps(config))
    return out


def bench(models: list[Path], *options: str) -> list[dict[str, Any]]:
    """The rows of ``vllm-mla bench``, with the last part of each model's path as its name."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [VLLM_MLA, "bench", *models, "--rivals", "none", "--dtype", "bfloat16", *options, "--json", file.name]
        subprocess.run(command, check=True)
        return [{**row, "name": Path(row["name"]).name} for row in json.loads(Path(file.name).read_text())["models"]]


def main() -> None:
    """Measure, print, and write the result file."""
    parser = plain_parser(__doc__)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25], help="whose speed is measured")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vllm-mla-packed-speed-") as folder:
        models = {share: packed(row, Path(folder, str(share))) for share, row in formats().items()}
        once = ("--lengths", "64:8", "--requests", "1", "--rounds", "1", "--cache", "1GiB")
        # In pairs, because the engines of one command are all in memory.
        capacities = {share: bench([demo_folder(), model], *once)[1] for share, model in models.items()}
        speeds = {
            share: bench(
                [in_16_bits(models[share], Path(folder, f"{share} in 16 bits")), models[share]],
                *("--lengths", LENGTHS, "--requests", "16", "--rounds", str(arguments.rounds)),
            )
            for share in arguments.shares
        }
    content = {
        "capacity": {share: round(row["ratios"]["kv_capacity"], 2) for share, row in capacities.items()},
        "speed": speeds,
    }
    shares = " ".join(map(str, arguments.shares))
    write_result("packed_speed", f"python -m benchmarks.packed_speed --shares {shares}", content)


if __name__ == "__main__":
    main()
