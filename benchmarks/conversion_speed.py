"""Measures how long a conversion by the map alone takes, without a refit or least squares, beside another converter.

    python -m benchmarks.conversion_speed --valid wiki.valid.tokens --test wiki.test.raw --peer COMMAND --peer-name NAME

Converts SmolLM2-135M-Instruct to 128 + 64, calibrated on ``--tokens`` tokens of WikiText-2's validation split. The
seconds are those from the start of a process to its end, with imports and writing. The perplexity is that of the first
8 windows of 1,024 tokens of the raw test split.

``--peer`` is any shell command that converts the same model; the two take turns. For TransMLA, it is a script that
loads the model in float32, cuts 32 windows of 512 tokens of the same text, and calls ``partial_rope`` and
``low_rank_qkv`` of its repository (https://github.com/MuLabPKU/TransMLA), as its ``converter.py`` does.
"""

import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import VLLM_MLA, evaluate, plain_text, text_parser, write_result
from scripts.demo_model import demo_folder

COMMAND = "python -m benchmarks.conversion_speed --valid wiki.valid.tokens --test wiki.test.raw --peer COMMAND"
SPLIT = ("--kv-lora-rank", "128", "--qk-rope-head-dim", "64")
OPTIONS = (*SPLIT, "--refit-steps", "0", "--without", "least-squares", "--force")


def seconds(command: str | list[Any]) -> float:
    """Seconds that a command takes; a string is a command of the shell."""
    started = time.monotonic()
    subprocess.run(command, shell=isinstance(command, str), check=True)
    return round(time.monotonic() - started, 1)


def main() -> None:
    """Time, score, write the result file."""
    parser = text_parser(__doc__)
    parser.add_argument("--peer", help="shell command of the other converter")
    parser.add_argument("--peer-name", help="its name in the result file")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 16384], help="calibration tokens")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.txt"
        text.write_text(plain_text(arguments.valid))
        outs = {f"{tokens} tokens": Path(scratch) / str(tokens) for tokens in arguments.tokens}
        commands = {
            name: [VLLM_MLA, "convert", demo_folder(), out, *OPTIONS, "--calibration", text, "--calibration-tokens"]
            for name, out in outs.items()
        }
        times: dict[str, list[float]] = {name: [] for name in (*commands, *(["peer"] if arguments.peer else []))}
        for _ in range(arguments.rounds):
            for (name, command), tokens in zip(commands.items(), arguments.tokens, strict=True):
                times[name].append(seconds([*command, str(tokens)]))
            if arguments.peer:
                times["peer"].append(seconds(arguments.peer))
        rows: dict[str, dict[str, Any]] = {
            name: {"seconds": row, "median": round(statistics.median(row), 1)} for name, row in times.items()
        }
        for name, out in outs.items():
            rows[name]["perplexity"] = round(evaluate(out, arguments.test)["perplexity"], 2)
            if arguments.peer:
                rows[name]["times_as_fast_as_peer"] = round(rows["peer"]["median"] / rows[name]["median"], 2)
    write_result("conversion_speed", COMMAND, {"peer": arguments.peer_name, "rows": rows})


if __name__ == "__main__":
    main()
