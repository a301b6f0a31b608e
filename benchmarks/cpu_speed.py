"""Compares how fast a conversion to half of the cache and its source serve on a CPU, after prompts of 2K and 6K tokens.

    python -m benchmarks.cpu_speed [SOURCE] [--model CONVERTED] [--rounds 3]

Converts SOURCE, or the demo model, to 192 cached numbers per token and layer. It takes the fastest method, because
speed does not depend on quality. `--model` names a conversion to use instead. Then `vllm-mla bench` runs both side by
side in bfloat16, with 16 requests of 2,048 and of 6,144 tokens.
"""

import json
import subprocess
import tempfile
from pathlib import Path

from benchmarks.common import VLLM_MLA, convert, plain_parser, write_result
from scripts.demo_model import demo_folder

ROOT = Path(__file__).resolve().parent.parent

SPLIT = ("--kv-lora-rank", "128", "--qk-rope-head-dim", "64")
CONVERSION = ("--method", "transmla", "--freqfold", "2", *SPLIT, "--calibration-tokens", "2048")
# Answers are long enough that most steps only decode for all 16 requests.
LENGTHS = "2048:40,6144:40"


def main() -> None:
    """Measure, print, and write the result file."""
    parser = plain_parser(__doc__)
    parser.add_argument("source", nargs="?", type=Path, help="a GQA model that caches 384 numbers per token and layer")
    parser.add_argument("--model", type=Path, help="its conversion, if there is one already")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    source = arguments.source or demo_folder()
    with tempfile.TemporaryDirectory(prefix="vllm-mla-cpu-speed-") as folder:
        model = arguments.model
        if model is None:
            model = Path(folder, "half")
            convert(source, model, *CONVERSION, "--calibration", str(ROOT / "LICENSE"))
        file = Path(folder, "bench.json")
        command = [VLLM_MLA, "bench", source, model, "--rivals", "none", "--lengths", LENGTHS, "--requests", "16"]
        command += ["--dtype", "bfloat16", "--rounds", str(arguments.rounds), "--json", file]
        subprocess.run(command, check=True)
        report = json.loads(file.read_text())
    rows = [{**row, "name": Path(row["name"]).name} for row in report["models"]]
    result = {key: report[key] for key in ("rounds", "hardware", "versions")}
    write_result("cpu_speed", f"python -m benchmarks.cpu_speed --rounds {arguments.rounds}", {**result, "rows": rows})


if __name__ == "__main__":
    main()
