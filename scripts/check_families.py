"""Does vLLM serve every family? Writes ``benchmarks/results/served_families.json``, and the table of the docs from it.

    python -m scripts.check_families            # all families, half a minute each
    python -m scripts.check_families phi3       # some, by model_type; results of the others stay
    python -m scripts.check_families --table    # the table alone

A small random model of each family is converted by ``--method exact``. vLLM on a CPU then continues some prompts, in
float32. Its tokens and log-probabilities are compared with those of the unconverted model in transformers.
"""

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.agreement import differences  # noqa: E402
from support.commands import convert  # noqa: E402
from support.engine import run_engine  # noqa: E402
from support.models import FAMILY_MODELS, load  # noqa: E402

from benchmarks.common import result, write_result  # noqa: E402
from scripts.family_table import write_table  # noqa: E402

# vLLM's CPU build weighs experts by a softmax where they have no groups. With one expert of a token, its weight is 1 in
# any way.
OVERRIDES = {"minimax_m2": {"hf_overrides": {"scoring_func": "softmax"}}}
LENGTHS = (50, 1, 17, 2)
NEW_TOKENS = 16


def check(family: str, folder: Path) -> dict[str, Any]:
    """Serve a family's small model; return how far it is from transformers."""
    source = FAMILY_MODELS[family].save(folder / "source")
    out = convert(source, folder / "mla", "--method", "exact")
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 199, (length,), generator=generator).tolist() for length in LENGTHS]
    engine = {"max_model_len": 256} | OVERRIDES.get(family, {})
    job = {"max_tokens": NEW_TOKENS, "prompt_logprobs": True, "no_tokenizer": True, "engine": engine}
    served, model = run_engine(out, prompts, **job), load(source)
    worst, same = max(differences(served, model, prompts)), 0
    for prompt, tokens in zip(prompts, served["tokens"], strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        same += int((logits.argmax(-1) == torch.tensor(tokens)).sum())
    return OVERRIDES.get(family, {}) | {
        "date": datetime.date.today().isoformat(),
        "largest_difference_of_log_probabilities": float(f"{worst:.2g}"),
        "tokens_that_transformers_chooses": f"{same} of {len(prompts) * NEW_TOKENS}",
    }


def main() -> None:
    """Check families, write the result file and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", choices=[[], *FAMILY_MODELS], help="model types; default: all")
    parser.add_argument("--table", action="store_true", help="write the table alone")
    arguments = parser.parse_args()
    rows = result("served_families").get("families", {})
    if not arguments.table:
        import vllm

        for family in arguments.families or FAMILY_MODELS:
            with tempfile.TemporaryDirectory() as folder:
                rows[family] = check(family, Path(folder)) | {"vllm": vllm.__version__}
            print(family, json.dumps(rows[family]), flush=True)
            ordered = {name: rows[name] for name in FAMILY_MODELS if name in rows}
            write_result("served_families", "python -m scripts.check_families", {"families": ordered})
    write_table(rows)


if __name__ == "__main__":
    main()
