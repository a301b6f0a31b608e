"""What training brings and takes. One command for each question; each writes ``results/training_NAME.json``.

    python -m benchmarks.training memory
    python -m benchmarks.training recovery --valid wiki.valid.tokens --test wiki.test.raw
    python -m benchmarks.training teacher --model Qwen2.5-Coder-0.5B --teacher Qwen2.5-Coder-1.5B \\
        --train prose.txt --train code.txt --test other.txt --data DIR --work DIR
    python -m benchmarks.training domain

- ``memory``: peak memory of one process, and of each of two that share the weights (FSDP2), on a random model of about
  0.5 billion parameters. Both take steps of two windows.
- ``recovery``: SmolLM2 at a quarter of its cache in 16 bits, trained on as many tokens: attentions (the default), all
  weights, low-rank changes, and attentions after a stage on hidden states.
- ``teacher``: a model at a quarter of its cache's bytes, taught by its source and by a larger model, on as many tokens
  of the texts that calibrated it. HumanEval is asked besides; ``--data`` is the folder of ``benchmarks.tasks``.
  Checkpoints stay in ``--work``, and rows that are in the result file already are kept.
- ``domain``: SmolLM2 and its exact conversion, which has the same cache, trained on the same tokens of a domain: the
  source code of Python's ``asyncio``, or ``--train``. Perplexity of text held out (``http``, or ``--test``), with three
  seeds, at a learning rate that is chosen for each model with the first seed.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.common import convert, cost, each, evaluate, heal, measured_rows, plain_text, write_result
from benchmarks.task_jobs import GROUPS
from benchmarks.tasks import ask, stored, unstored
from mla_converters.evaluation.tasks.comparison import compared
from mla_converters.heal.run import heal as heal_here
from mla_converters.options import HealOptions
from mla_converters.reports.evaluation import TaskScore
from mla_converters.support.devices import native_bfloat16, usable_device
from mla_converters.support.memory import peak_rss_bytes, return_freed_memory
from mla_converters.training.distillation import Distillation, held_out_loss
from mla_converters.training.losses import Weights
from mla_converters.training.stored import Examples
from mla_converters.training.trained import make_trainable
from mla_converters.training.trainer import Schedule, train
from scripts.demo_model import demo_folder

QUARTER = ("--cache-ratio", "0.25", "--latent-bits", "16")
QUICKLY = ("--refit-steps", "0", "--without", "least-squares", "--calibration-tokens", "1024")
SIZES = {
    "0.5B": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
}
RATES = (0.0003, 0.001, 0.003)
SEEDS = (0, 1, 2)


def memory(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Peak memory by number of processes."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokenizer = AutoTokenizer.from_pretrained(demo_folder())
        shape = SIZES[options.size]
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            initializer_range=0.05,
            num_key_value_heads=shape["num_attention_heads"] // 2,
            head_dim=64,
            **shape,
        )
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        parameters = model.num_parameters()
        model.save_pretrained(folder / "source")
        tokenizer.save_pretrained(folder / "source")
        del model
        convert(folder / "source", folder / "mla", "--calibration", options.text, *QUICKLY, *QUARTER)
        peaks = {}
        for processes in (1, 2):
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
            out = folder / f"out-{processes}"
            job = ["-m", "benchmarks.training", "process", str(folder / "mla"), str(out), options.text]
            subprocess.run([sys.executable, *(launch if processes > 1 else []), *job], check=True)
            reports = [json.loads(path.read_text()) for path in folder.glob(f"out-{processes}.*.json")]
            peaks[str(processes)] = [round(report["peak_rss_gb"], 3) for report in reports]
    yield {"parameters": parameters, "peak_rss_gb": peaks, "ratio": round(max(peaks["2"]) / max(peaks["1"]), 3)}


def process(options: argparse.Namespace) -> None:
    """One process of ``memory``: a training of a few steps."""
    steps = HealOptions(
        text=(options.text,),
        tokens=12288,
        length=1024,
        batch_size=2,
        steps=6,  # fewer may leave a random model worse on text held out, which is refused
        loss="kl:0.5,lm:0.5",
        learning_rate=1e-3,
        fsdp=True,
        device="cpu",
    )
    return_freed_memory()  # as the command does
    heal_here(options.model, options.out, steps, quiet=True)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    peak = {"peak_rss_gb": (peak_rss_bytes() or 0) / 1e9}
    options.out.with_suffix(f".{rank}.json").write_text(json.dumps(peak))


def recovery(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Perplexity by what is trained, on the same tokens."""
    ways = {
        "attention": (),
        "all": ("--train", "all"),
        "lora": ("--train", "lora"),
        "hidden states first": ("--hidden-steps", str(options.hidden_steps)),
    }
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        text = folder / "valid.txt"
        text.write_text(plain_text(options.valid))
        calibrated = ("--calibration", str(text), "--calibration-tokens", str(options.tokens))
        converted = convert(demo_folder(), folder / "mla", *calibrated, *QUARTER, *options.convert.split())
        rows["converted"] = {"perplexity": evaluate(folder / "mla", options.test)["perplexity"], **cost(converted)}
        for name, way in ways.items():
            healed = heal(folder / "mla", folder / "healed", "--text", str(text), "--tokens", str(options.tokens), *way)
            score = evaluate(folder / "healed", options.test)["perplexity"]
            rows[name] = {"perplexity": score, "healing": _healing(healed), **cost(healed)}
            yield {"tokens": options.tokens, "rows": rows}


def teacher(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Divergence from the source, perplexity and score of HumanEval by who teaches."""
    rows = measured_rows("training_teacher")
    if "source" not in rows:
        rows["source"] = {"tasks": [stored(score) for score in _code_scores(options.model, options.data)]}
    asked = unstored(rows["source"]["tasks"])
    converted = options.work / "mla"
    if not converted.exists():
        calibrated = (*each("--calibration", options.train), "--calibration-tokens", "16384")
        convert(options.model, converted, *calibrated, "--cache-ratio", "0.25", *options.convert.split())
    steps = options.tokens // options.length  # as many for both teachers; the default follows from the divergence
    amount = ("--tokens", str(options.tokens), "--length", str(options.length), "--steps", str(steps))
    taught = (*each("--text", options.train), *amount)
    for name, way in (("converted", None), ("larger teacher", ("--teacher", options.teacher)), ("own source", ())):
        if name in rows:
            continue
        model, healing = converted, None
        if way is not None:
            model = options.work / name.replace(" ", "-")
            healing = _healing(heal(converted, model, *taught, *map(str, way)))
        score = evaluate(model, options.test, "--reference", str(options.model))
        tasks = compared(_code_scores(model, options.data), asked)
        rows[name] = {key: score[key] for key in ("perplexity", "perplexity_ratio", "kl", "top1_agreement")}
        rows[name] |= {"healing": healing, "tasks": [stored(task) for task in tasks]}
        yield {"tokens": options.tokens, "rows": rows}


def _healing(report: dict[str, Any]) -> dict[str, Any]:
    """What a report says of a training, without its files."""
    kept = ("tokens", "window", "steps", "batch_size", "learning_rate", "kl_held_out")
    return {key: report["healing"][key] for key in kept}


def _code_scores(model: Path, data: Path) -> list[TaskScore]:
    """How many problems of HumanEval a model solves."""
    report = ask(model, GROUPS["code"], data)
    return [TaskScore(**score) for score in report["models"][0]["tasks"]]


def domain(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Held-out perplexity of a model and of its exact conversion, by seed; each at its best learning rate."""
    source = options.model or demo_folder()
    tokenizer = AutoTokenizer.from_pretrained(source)
    windows = {
        name: _windows(tokenizer, _source_code(package) if given is None else given.read_text(), options.length)
        for name, given, package in (("train", options.train, "asyncio"), ("test", options.test, "http"))
    }
    windows["test"] = windows["test"][: options.test_windows]
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        exact = Path(folder, "exact")
        convert(source, exact, "--method", "exact")
        for name, path in (("source", source), ("exact", exact)):
            first, *others = options.seeds
            runs = [_tuned(path, windows, rate, first, options) for rate in options.rates]
            best = min(runs, key=lambda run: run["perplexity"])["rate"]
            runs += [_tuned(path, windows, best, seed, options) for seed in others]
            scores = [run["perplexity"] for run in runs if run["rate"] == best]
            rows[name] = {"best_rate": best, "perplexity": statistics.mean(scores), "runs": runs}
            yield {f"{name}_windows": len(part) for name, part in windows.items()} | {"rows": rows}


def _source_code(package: str) -> str:
    """The source code of a package of Python's standard library."""
    folder = Path(sysconfig.get_path("stdlib"), package)
    return "\n".join(path.read_text() for path in sorted(folder.glob("*.py")))


def _windows(tokenizer: Any, text: str, length: int) -> torch.Tensor:
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    return ids[: len(ids) // length * length].view(-1, length)


def _tuned(
    path: Path, windows: dict[str, torch.Tensor], rate: float, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Train a model's attentions on text; the trained weights, and the perplexity before and after."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if hasattr(model.config, "kv_lora_rank"):
        make_trainable(model, "attention", 0, seed)
    else:
        model.requires_grad_(False)
        for layer in model.model.layers:
            layer.self_attn.requires_grad_(True)
    tuned = Distillation(model, Weights(kl=0, lm=1))
    device = usable_device(None)
    dtype = torch.bfloat16 if native_bfloat16(device) else torch.float32
    tuned.to(device)
    held_out = Examples(input_ids=windows["test"])
    before = held_out_loss(tuned, held_out, device, dtype)[2].item()
    schedule = Schedule(options.steps, rate, options.batch_size, 1, seed, dtype)
    with tempfile.TemporaryDirectory() as folder:
        train(tuned, Examples(input_ids=windows["train"]), schedule, device, Path(folder), lambda step, loss: None)
    after = held_out_loss(tuned, held_out, device, dtype)[2].item()
    trained = sum(weight.numel() for weight in tuned.trained)
    perplexities = {"perplexity_before": math.exp(before), "perplexity": math.exp(after)}
    return {"seed": seed, "rate": rate, "trained_parameters": trained, **perplexities}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = made.add_subparsers(dest="kind", required=True)
    one = kinds.add_parser("memory")
    one.add_argument("--size", choices=SIZES, default="0.5B")
    one.add_argument("--text", default=str(Path(__file__).parents[1] / "LICENSE"))
    one = kinds.add_parser("process")
    one.add_argument("model", type=Path)
    one.add_argument("out", type=Path)
    one.add_argument("text")
    one = kinds.add_parser("recovery")
    one.add_argument("--valid", type=Path, required=True, help="wiki.valid.tokens")
    one.add_argument("--test", type=Path, required=True, help="wiki.test.raw")
    one.add_argument("--tokens", type=int, default=65536)
    one.add_argument("--hidden-steps", type=int, default=64)
    one.add_argument("--convert", default="", help="more options of convert")
    one = kinds.add_parser("teacher")
    for name in ("model", "teacher", "test", "data", "work"):
        one.add_argument(f"--{name}", type=Path, required=True)
    one.add_argument("--train", type=Path, action="append", required=True, help="text; may be repeated")
    one.add_argument("--tokens", type=int, default=1_000_000)
    one.add_argument("--length", type=int, default=1024)
    one.add_argument("--convert", default="", help="more options of convert")
    one = kinds.add_parser("domain")
    one.add_argument("--model", type=Path, help="SmolLM2 by default")
    one.add_argument("--train", type=Path, help="text")
    one.add_argument("--test", type=Path, help="text held out")
    one.add_argument("--length", type=int, default=512)
    one.add_argument("--test-windows", type=int, default=32)
    one.add_argument("--batch-size", type=int, default=1)
    one.add_argument("--steps", type=int, default=96)
    one.add_argument("--rates", type=float, nargs="+", default=RATES)
    one.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    return made


def main() -> None:
    """Measure; write the result after every row."""
    options = parser().parse_args()
    if options.kind == "process":
        process(options)
        return
    question = {"memory": memory, "recovery": recovery, "teacher": teacher, "domain": domain}[options.kind]
    given = " ".join(Path(word).name for word in sys.argv[1:])
    for measured in question(options):
        print(json.dumps(measured, indent=2))
        write_result(f"training_{options.kind}", f"python -m benchmarks.training {given}", measured)


if __name__ == "__main__":
    main()
