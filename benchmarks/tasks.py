"""Scores of tasks, for a source and its conversions: what a smaller cache costs the people who use a model.

    python -m benchmarks.tasks SOURCE --name NAME --data DIR --text prose.txt --text code.txt --work DIR

Tasks, by lm-evaluation-harness on vLLM in bfloat16: HumanEval (all 164 problems, with the chat template), GSM8K (the
first 200, likewise), the first 500 of ARC-easy, ARC-challenge, OpenBookQA, PIQA and Winogrande, and facts that are
hidden in 4,096 tokens. HumanEval runs what the models write.

``--data`` is a folder with the sets as JSON lines: ``HumanEval.jsonl.gz`` and ``gsm8k-test.jsonl`` as published, and
``arc_easy.jsonl``, ``arc_challenge.jsonl``, ``openbookqa.jsonl``, ``piqa.jsonl`` and ``winogrande.jsonl`` with the keys
query, choices and gold.

Rows are conversions by ``vllm-mla convert``, calibrated on the texts of ``--text``, and those that ``vllm-mla heal``
trained on the same texts. Checkpoints stay in ``--work``. Results that are in the result file already are kept: choose
rows with ``--only`` and groups of tasks with ``--groups``.
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from shutil import copytree
from typing import Any

from benchmarks.common import RESULTS, VLLM_MLA, convert, heal, plain_parser, result, write_result
from benchmarks.task_jobs import GROUPS, Group, Job, jobs
from benchmarks.tasks_plot import draw
from mla_converters.evaluation.tasks.comparison import compared
from mla_converters.reports.conversion import WRITER, ConversionReport
from mla_converters.reports.evaluation import TaskScore

COMMAND = "python -m benchmarks.tasks SOURCE --name NAME --data DIR --text prose.txt --text code.txt --work DIR"
EACH = "score_of_each"
TASK_FILES = Path(__file__).with_name("task_files")


def main() -> None:
    """Measure what is missing; write the result file after every group of tasks, and the plot at the end."""
    arguments = _arguments()
    models = result("tasks").get("models", {})
    rows = models.setdefault(arguments.name, {})
    for name, job in jobs(arguments.text).items():
        if not re.search(arguments.only, name):
            continue
        missing = [group for group in arguments.groups if group not in rows.get(name, {}).get("asked", {})]
        if not missing:
            continue
        model = _model(arguments.source, name, job, arguments.work)
        row = rows.setdefault(name, _described(model, job, arguments.text))
        for group in missing:
            report = ask(model, GROUPS[group], arguments.data)
            row.setdefault("asked", {})[group] = {
                "seconds": report["seconds"],
                "peak_rss_bytes": report["peak_rss_bytes"],
            }
            row.setdefault("tasks", []).extend(stored(TaskScore(**score)) for score in report["models"][0]["tasks"])
            _compare(rows)
            write_result("tasks", COMMAND, {"models": models})
            print(
                name, [(score["task"], score["metric"], round(score["score"], 4)) for score in row["tasks"]], flush=True
            )
    draw(models, RESULTS / "tasks.png")


def _arguments() -> argparse.Namespace:
    parser = plain_parser(__doc__)
    parser.add_argument("source", help="hub id, folder or .gguf file")
    parser.add_argument("--name", required=True, help="what the result file calls the source")
    parser.add_argument("--data", type=Path, required=True, help="folder with the tasks' data")
    parser.add_argument("--text", type=Path, action="append", required=True, help="for calibration and healing")
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--only", default="", help="regular expression of row names")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups of tasks")
    return parser.parse_args()


def _model(source: str, name: str, job: Job, work: Path) -> Path | str:
    """The row's checkpoint, which is made unless an earlier run did it."""
    if job.options is None:
        return source
    converted = work / _file_name(name.removesuffix(", healed"))
    if not converted.exists():
        convert(Path(source), converted, *job.options, "--dtype", "bfloat16")
    if job.healing is None:
        return converted
    healed = work / _file_name(name)
    if not healed.exists():
        heal(converted, healed, *job.healing)
    return healed


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.]+", "-", name)


def _described(model: Path | str, job: Job, texts: list[Path]) -> dict[str, Any]:
    """Sizes of a row's cache, and how its model was made."""
    if job.options is None:
        return {"bytes": 1.0}
    config = Path(model, "config.json")
    report = ConversionReport.parse(json.loads(config.read_text())["mla_conversion"], str(config), WRITER)
    described = {
        "bytes": round(report.cache_ratio, 4),
        "split": f"{report.kv_lora_rank}+{report.qk_rope_head_dim}",
        "latent_cache": report.latent_cache,
        "options": _shown(job.options, texts),
    }
    if report.healing is not None:
        kl = report.healing.kl_held_out
        described["healing"] = {"options": _shown(job.healing or [], texts), "kl": kl.model_dump() if kl else None}
    return described


def _shown(options: list[str], texts: list[Path]) -> str:
    """Options as they stand in the result file, without folders."""
    shown = " ".join(options)
    for text in texts:
        shown = shown.replace(str(text), text.name)
    return shown


def ask(model: Path | str, group: Group, data: Path) -> dict[str, Any]:
    """Ask a model a group of tasks, whose data is a folder; return the report of ``vllm-mla eval``."""
    with tempfile.TemporaryDirectory() as scratch:
        tasks, report = Path(scratch, "tasks"), Path(scratch, "report.json")
        copytree(TASK_FILES, tasks)
        Path(tasks, "data").symlink_to(data.resolve())
        limit = [] if group.limit is None else ["--limit", str(group.limit)]
        names = ["--tasks", ",".join(group.tasks), "--tasks-dir", tasks]
        subprocess.run(
            [VLLM_MLA, "eval", model, *names, *limit, *group.options, "--dtype", "bfloat16", "--json", report],
            check=True,
        )
        return json.loads(report.read_text())


def _compare(rows: dict[str, Any]) -> None:
    """Say of every score how it differs from the source's, paired by problem."""
    source = {score.measure: score for score in unstored(rows.get("source", {}).get("tasks", []))}
    for name, row in rows.items():
        own = [score for score in unstored(row.get("tasks", [])) if name != "source" and score.measure in source]
        beside = {score.measure: score for score in compared(own, list(source.values()))}
        row["tasks"] = [stored(beside.get(score.measure, score)) for score in unstored(row.get("tasks", []))]


def unstored(scores: list[dict[str, Any]]) -> list[TaskScore]:
    """Scores from a result file."""
    return [TaskScore(**{**score, EACH: [float(value) for value in score[EACH].split()]}) for score in scores]


def stored(score: TaskScore) -> dict[str, Any]:
    """A score as it stands in the result file: those of its problems in one line."""
    fields = score.model_dump(exclude_none=True)
    return {**fields, EACH: " ".join(f"{value:g}" for value in score.score_of_each or [])}


if __name__ == "__main__":
    main()
