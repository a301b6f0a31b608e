"""Perplexity of conversions on WikiText-2, against what TransMLA's own code gives.

    python benchmarks/fidelity.py --valid wiki.valid.tokens --test wiki.test.raw

Calibrates on 32 windows of 512 tokens of the validation split, and scores the first 8 windows of
1,024 tokens of the raw test split as one stream, in float32. The two files are those of
WikiText-2 (Merity et al. 2016): the tokenised validation split and the raw, ordered test split.
"""

import argparse
import json
import math
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import vllm_mla_plugin.hf

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from demo_model import demo_folder

RESULT = Path(__file__).parent / "results" / "fidelity.json"
# What TransMLA's own code gives at these sizes with the same calibration and scoring.
TRANSMLA = {(128, 64, 2): 55.72, (96, 32, 4): 96.44}
UNDO_TOKENISATION = (
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    ("<unk>", ""),
    (" , ", ", "),
    (" . ", ". "),
)


@torch.inference_mode()
def perplexity(folder: Path, test: Path, windows: int = 8, length: int = 1024) -> float:
    """exp of the mean next-token loss over the first windows of ``test``, float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(test.read_text(), return_tensors="pt", verbose=False).input_ids
    ids = ids[0, : windows * length].view(windows, length)
    loss = 0.0
    for window in ids.split(2):
        logits = model(window, use_cache=False).logits[:, :-1]
        loss += F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="sum").item()
    return math.exp(loss / (windows * (length - 1)))


def main() -> None:
    """Convert, score, print, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--valid", type=Path, required=True, help="wiki.valid.tokens")
    parser.add_argument("--test", type=Path, required=True, help="wiki.test.raw")
    arguments = parser.parse_args()

    source = demo_folder()
    rows = [{"model": "source", "perplexity": round(perplexity(source, arguments.test), 4)}]
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "calibration.txt"
        content = arguments.valid.read_text()
        for mark, plain in UNDO_TOKENISATION:
            content = content.replace(mark, plain)
        text.write_text(content)
        jobs: list[tuple[list[str], float | None]] = [(["--method", "exact"], None)]
        jobs += [
            (
                [
                    *("--method", "transmla", "--calibration", str(text)),
                    *f"--kv-lora-rank {rank} --qk-rope-head-dim {rope} --freqfold {fold}".split(),
                ],
                reference,
            )
            for (rank, rope, fold), reference in TRANSMLA.items()
        ]
        for options, reference in jobs:
            out, report_file = Path(scratch) / "model", Path(scratch) / "report.json"
            # A process of its own, so that peak memory is that of the conversion.
            command = [Path(sys.executable).with_name("vllm-mla"), "convert", source, out, *options]
            subprocess.run([*command, "--force", "--json", report_file], check=True)
            report = json.loads(report_file.read_text())
            row = {
                "model": f"{report['method']} {report['kv_lora_rank']}+{report['qk_rope_head_dim']}",
                "perplexity": round(perplexity(out, arguments.test), 4),
                "seconds": report["seconds"],
                "peak_rss_gb": round(report["peak_rss_bytes"] / 1e9, 2),
            }
            if reference is not None:
                row |= {"freqfold": report["freqfold"], "transmla_own_code": reference}
            rows.append(row)
            print(row)
    result = {
        "command": f"python {' '.join(sys.argv)}",
        "hardware": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, CPU only",
        "versions": {
            "vllm-mla-plugin": vllm_mla_plugin.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "rows": rows,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
