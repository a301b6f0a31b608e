"""``vllm-mla eval --tasks``: the real harness and the real engine, on small tasks that this file writes."""

import json
import math
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import Refused, vllm_mla
from support.files import ROOT
from support.models import RandomModel

from mla_converters.api import EvalOptions
from mla_converters.cards.card import read_report
from mla_converters.cards.evaluation import read_evaluation
from mla_converters.checkpoints.tokenizer import load_tokenizer
from mla_converters.errors import OptionError
from mla_converters.reports.evaluation import EvaluationReport, TaskScore

pytest.importorskip("lm_eval", reason="--tasks needs lm-eval")
from mla_converters.evaluation.needles.problems import DEPTHS, PROBLEMS, ROOM, build, score
from mla_converters.evaluation.needles.tasks import TEXT, lengths_up_to
from mla_converters.evaluation.tasks.comparison import compared, measured, verdict

CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Germany": "Berlin",
    "Spain": "Madrid",
    "Russia": "Moscow",
    "England": "London",
    "Egypt": "Cairo",
    "Greece": "Athens",
    "Ireland": "Dublin",
    "Austria": "Vienna",
    "Portugal": "Lisbon",
}
TASKS = {
    "north": """
        output_type: multiple_choice
        doc_to_text: "The capital of {{country}} is"
        doc_to_choice: "{{choices}}"
        doc_to_target: answer
        metric_list: [{metric: acc}]
    """,
    "counting": """
        output_type: generate_until
        doc_to_text: "{{question}}"
        doc_to_target: "{{answer}}"
        generation_kwargs: {until: [","], max_gen_toks: 8}
        metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
    """,
    "coding": """
        output_type: generate_until
        unsafe_code: true
        doc_to_text: "{{prompt}}"
        doc_to_target: "{{test}}"
        process_results: !function running.passes
        generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
        metric_list: [{metric: passed, aggregation: mean, higher_is_better: true}]
    """,
    "prose": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{text}}"
        metric_list: [{metric: word_perplexity}]
    """,
}
RUNNING = """
import pathlib, subprocess, sys

def passes(doc, results):
    code = doc["prompt"] + results[0] + chr(10) + doc["test"]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    return {"passed": float(run.returncode == 0)}
"""
QUESTIONS = [
    {
        "country": country,
        "choices": (choices := sorted(list(CAPITALS.values())[(i + j) % len(CAPITALS)] for j in range(4))),
        "answer": choices.index(capital),
    }
    for i, (country, capital) in enumerate(CAPITALS.items())
]
DATA: dict[str, list[dict[str, Any]]] = {
    "north": QUESTIONS[:6],
    "south": QUESTIONS[6:],
    "counting": [
        {"question": f"{n}, {n + 1}, {n + 2}, {n + 3}, {n + 4},", "answer": f" {n + 5}"} for n in range(1, 13)
    ],
    "coding": [{"prompt": f"def number():\n    return {n}\n\n\nassert number() ==", "test": ""} for n in (1, 7)],
    "prose": [{"text": text} for text in ("The sun rises in the east.", "Water boils at a hundred degrees.")],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for ``--tasks-dir``. Its data lie beside the YAML files, which name them without their folder."""
    folder = tmp_path_factory.mktemp("tasks")
    for name in DATA:
        body = re.sub(r"(?m)^ +", "", TASKS["north" if name == "south" else name])
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}\n"
        (folder / f"{name}.yaml").write_text(f"{head}test_split: test\n{body}")
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DATA[name]))
    (folder / "capitals.yaml").write_text("group: capitals\ntask: [north, south]\n")
    (folder / "running.py").write_text(RUNNING)
    # A module that vLLM's process must not import in place of its own.
    (folder / "psutil.py").write_text("raise RuntimeError('imported from the folder of the tasks')\n")
    return folder


@pytest.fixture(scope="module")
def deaf(exact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exact conversion with attention outputs of zero, so that no token knows those before it."""
    model = Path(shutil.copytree(exact, tmp_path_factory.mktemp("deaf") / "deaf"))
    for path in model.glob("*.safetensors"):
        tensors = load_file(path)
        save_file({k: torch.zeros_like(v) if "o_proj" in k else v for k, v in tensors.items()}, path, {"format": "pt"})
    return model


@pytest.fixture(scope="module")
def report(smollm2: Path, exact: Path, deaf: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One run of source, exact conversion and broken conversion: ``printed`` and ``told`` are its outputs."""
    out = tmp_path_factory.mktemp("report") / "report.json"
    names = "capitals,counting,coding,prose"
    text = ("--text", ROOT / "scripts" / "demo_text.txt", "--windows", 1, "--length", 128)
    arguments = (*text, "--reference", smollm2, "--tasks", names, "--tasks-dir", folder, "--allow-code-execution")
    cache = {"VLLM_CPU_KVCACHE_SPACE": "1", "COLUMNS": "160"}
    result = vllm_mla("eval", exact, deaf, *arguments, "--json", out, environment=cache)
    assert result.returncode == 0, result.stderr[-3000:]
    return {"printed": result.stdout, "told": result.stderr} | json.loads(out.read_text())


def task_of(row: dict[str, Any], task: str) -> dict[str, Any]:
    (found,) = [score for score in row["tasks"] if score["task"] == task]
    return found


@pytest.mark.engine
def test_exact_conversion_is_not_distinguishable(report: Any) -> None:
    """It answers as its source does, in multiple choice and in generated text."""
    exact, _ = report["models"]
    for task, least in (("capitals", 0.7), ("counting", 0.7)):
        source, own = task_of(report["reference"], task), task_of(exact, task)
        assert source["score"] >= least and source["problems"] == own["problems"] == 12
        assert own["score"] == source["score"] and own["difference"] == own["difference_stderr"] == 0
        assert own["verdict"] == "not distinguishable from the reference on 12 problems"
        spread = math.sqrt(source["score"] * (1 - source["score"]) / 11)
        assert own["stderr"] == pytest.approx(spread)
    assert exact["kl"] == pytest.approx(0, abs=1e-5), "the text was scored too"
    assert exact["cached_per_token_and_layer"] == 384


@pytest.mark.engine
def test_broken_conversion_is_worse(report: Any) -> None:
    _, deaf = report["models"]
    for task in ("capitals", "counting"):
        own, source = task_of(deaf, task), task_of(report["reference"], task)
        assert own["difference"] == pytest.approx(own["score"] - source["score"])
        amounts = f"{-100 * own['difference']:.1f} ± {100 * own['difference_stderr']:.1f}"
        assert own["verdict"] == f"worse by {amounts} points on 12 problems"
        assert own["verdict"] in report["printed"]


@pytest.mark.engine
def test_groups_and_other_metrics(report: Any) -> None:
    """A group counts the problems of its tasks together. A perplexity is no mean, so that nothing is said of chance."""
    exact, deaf = report["models"]
    for row in (exact, deaf, report["reference"]):
        parts = [task_of(row, "north"), task_of(row, "south")]
        assert [part["problems"] for part in parts] == [6, 6]
        assert task_of(row, "capitals")["score"] == pytest.approx(sum(part["score"] for part in parts) / 2)
    assert task_of(exact, "prose")["difference"] == pytest.approx(0, abs=0.01 * task_of(exact, "prose")["score"])
    assert task_of(deaf, "prose")["difference"] > 0
    assert "verdict" not in task_of(deaf, "prose") and task_of(deaf, "prose")["higher_is_better"] is False


@pytest.mark.engine
def test_code_runs_if_allowed(report: Any) -> None:
    assert task_of(report["reference"], "coding")["score"] == 1
    assert task_of(report["models"][0], "coding")["verdict"] == "not distinguishable from the reference on 2 problems"


@pytest.mark.engine
def test_what_is_shown(report: Any, exact: Path) -> None:
    """Progress with the time left, a card, and versions. Nothing of what the harness prints."""
    assert re.search(r"Requests to exact: \d+ of \d+, \d+ (s|min) left", report["told"])
    assert "it/s" not in report["told"] and "Error" not in report["told"]
    assert {"lm-eval", "vllm"} <= report["versions"].keys()
    assert report["tasks"] == {"names": ["capitals", "counting", "coding", "prose"], "chat": False}
    typed = EvaluationReport.model_validate({k: v for k, v in report.items() if k not in ("printed", "told")})
    card = read_evaluation(typed, exact, read_report(exact).source)
    rows = {what: (source, own) for what, source, own in card.rows}
    source, own = rows["counting, exact_match, 12 problems"]
    assert own == f"{source}: not distinguishable from the reference on 12 problems"
    assert "%" in source and "perplexity" in rows
    assert "Perplexity of `demo_text.txt`" in card.text and "Tasks by lm-evaluation-harness" in card.text


@pytest.mark.engine
@pytest.mark.slow
def test_too_small_cache(
    refusal: Refused, smollm2: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's advice is an option of its own, which this command does not have."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    model = Path(shutil.copytree(smollm2, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 65536}))
    line = refusal("eval", model, "--tasks", "counting", "--tasks-dir", folder)
    assert "KV cache is needed" in line and line.endswith("Here, set VLLM_CPU_KVCACHE_SPACE to more GiB instead.")


@pytest.mark.engine
@pytest.mark.slow
def test_chat_and_needles(smollm2: Path, folder: Path, tmp_path: Path) -> None:
    """A chat template makes the model talk where it would go on counting. Needles are found in a short text."""
    arguments = ("--tasks", "counting,needles_512", "--tasks-dir", folder, "--limit", 3, "--chat")
    cache = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    result = vllm_mla("eval", smollm2, *arguments, "--json", tmp_path / "report.json", environment=cache)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    counting, needles = report["models"][0]["tasks"]
    assert counting["score"] < 0.5 and counting["problems"] == needles["problems"] == 3
    assert needles["task"] == "needles_512" and needles["score"] > 0
    assert "text" not in report and "perplexity" not in report["models"][0]
    assert report["tasks"]["chat"] and report["tasks"]["limit"] == 3


@pytest.fixture
def refused(refusal: Refused, random_model: Path) -> Refused:
    """Runs ``eval`` on a small model, which must refuse; returns the one sentence."""
    return lambda *arguments: refusal("eval", random_model, *arguments)


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return RandomModel().save(tmp_path_factory.mktemp("random") / "source")


def test_refused_code(refused: Refused, folder: Path) -> None:
    line = refused("--tasks", "capitals,coding", "--tasks-dir", folder)
    assert "--tasks coding would run code that the models write: give --allow-code-execution" in line
    (folder / "recoding.yaml").write_text("include: coding.yaml\ntask: recoding\n")
    (folder / "group.yaml").write_text("group: recodings\ntask: [recoding]\n")
    for names in ("recoding", "recodings"):
        assert "--tasks recoding would run" in refused("--tasks", names, "--tasks-dir", folder)


def test_refused_tasks(refused: Refused, folder: Path, tmp_path: Path) -> None:
    line = refused("--tasks", "counting,capitols", "--tasks-dir", folder)
    assert "'capitols', which is no task" in line and "similar ones are capitals" in line
    assert "which is not a folder with YAML files" in refused("--tasks", "counting", "--tasks-dir", tmp_path)
    assert "has no chat template: leave out --chat" in refused("--tasks", "counting", "--tasks-dir", folder, "--chat")
    assert "needles_4096, but needles need at least 512" in refused("--tasks", "needles_4096")
    assert "--tasks needles needs contexts of at least 512" in refused("--tasks", "needles")
    assert "--plot draws perplexity" in refused("--tasks", "arc_easy", "--plot", tmp_path / "picture.png")
    (tmp_path / "lost.yaml").write_text((folder / "counting.yaml").read_text().replace("task: counting", "task: lost"))
    line = refused("--tasks", "lost", "--tasks-dir", tmp_path)
    assert "--tasks lost cannot be loaded (FileNotFoundError" in line and "check the task's YAML file" in line


@pytest.mark.parametrize("option", [{"tasks_dir": Path("x")}, {"limit": 5}, {"chat": True}])
def test_options_of_tasks_need_tasks(option: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="is for tasks: name them with --tasks"):
        EvalOptions(**option)


@pytest.mark.parametrize("option", ["protocol", "windows", "length", "engine", "device"])
def test_options_of_text_need_text(option: str) -> None:
    given = {option: {"protocol": "stream", "engine": "hf", "device": "cpu"}.get(option, 2)}
    with pytest.raises(OptionError, match=f"--{option} is for text: give --text or --dataset, or leave it out"):
        EvalOptions(tasks=("a",), **given)
    EvalOptions(tasks=("a",), text=Path("x"), **given)


def test_names_of_tasks() -> None:
    assert EvalOptions.model_validate({"tasks": "a, b,a"}).tasks == ("a", "b")
    with pytest.raises(OptionError, match="names separated by commas"):
        EvalOptions.model_validate({"tasks": "a,,b"})
    with pytest.raises(OptionError, match="--limit is 0, but must be 1 or more"):
        EvalOptions(tasks=("a",), limit=0)


def test_missing_packages(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = "lm_eval"
    monkeypatch.setattr("mla_converters.support.packages.find_spec", lambda module: None if module == missing else 1)
    assert "--tasks needs the package lm_eval" in (line := refused("--tasks", "arc_easy"))
    assert "pip install 'vllm-mla-plugin[eval]'" in line
    missing = "vllm"
    assert "--tasks needs the package vllm" in refused("--tasks", "arc_easy")


def test_words() -> None:
    """Differences within chance, and those of fewer than six problems, are not called differences."""
    lost = [-1.0] * 10 + [0.0] * 90
    assert verdict(lost, 0.03, True, True) == "worse by 10.0 ± 3.0 points on 100 problems"
    assert verdict(lost, 0.03, False, True) == "better by 10.0 ± 3.0 points on 100 problems"
    assert verdict([-30.0, *lost], 0.03, True, False) == "worse by 0.3960 ± 0.0300 on 101 problems"
    assert verdict(lost, 0.06, True, True) == "not distinguishable from the reference on 100 problems"
    assert verdict([-1.0] * 5, 0.0, True, True) == "not distinguishable from the reference on 5 problems"
    assert verdict([-1.0] * 6, 0.0, True, True).startswith("worse by 100.0 ± 0.0")


def results(first: list[float], second: list[float]) -> dict[str, Any]:
    """The harness's results of two tasks in a group."""
    values = {"one": first, "two": second}
    return {
        "samples": {
            task: [{"doc_id": i, "filter": "none", "metrics": ["acc"], "acc": value} for i, value in enumerate(scores)]
            for task, scores in values.items()
        },
        "results": {task: {"acc,none": sum(scores) / len(scores)} for task, scores in values.items()},
        "higher_is_better": {task: {"acc": True} for task in values},
        "n-shot": {"one": 5, "two": 0},
        "group_subtasks": {"outer": ["inner"], "inner": ["one", "two"]},
    }


def test_paired_by_problem() -> None:
    """The standard error of a difference is that of the differences, which is smaller than that of either score."""
    reference = measured(results([1, 1, 1, 0, 0, 0], [1, 1]))
    own = compared(measured(results([1, 1, 0, 0, 0, 0], [1, 0])), reference)
    assert [score.task for score in own] == ["outer", "inner", "one", "two"]
    assert own[0].problems == own[1].problems == 8 and own[0].score == 3 / 8
    one = own[2]
    assert one.few_shot == 5 and one.difference == pytest.approx(-1 / 6)
    assert one.difference_stderr == pytest.approx(1 / 6) and one.stderr == pytest.approx(math.sqrt(8 / 36 / 5))
    assert own[3].difference == -0.5 and own[3].difference_stderr == pytest.approx(0.5)


def test_scores_as_text() -> None:
    share = TaskScore(task="t", metric="m", filter="f", higher_is_better=True, problems=9, fraction=True, score=0.5)
    assert (share.measure, share.shown, share.compared) == ("t, m (f)", "50.0%", "")
    assert share.model_copy(update={"stderr": 0.123}).shown == "50.0% ± 12.3"
    assert share.model_copy(update={"difference": -0.1}).compared == "-10.0 points"
    other = share.model_copy(update={"fraction": False, "stderr": 0.5, "difference": 1.0, "filter": None})
    assert (other.measure, other.shown, other.compared) == ("t, m", "0.5000 ± 0.5000", "+1.0000")


def test_lengths_of_needles() -> None:
    assert lengths_up_to(8192) == [1024, 2048, 4096, 8192]
    assert lengths_up_to(3000) == [1024, 2048, 3000] and lengths_up_to(600) == [600]


@pytest.mark.parametrize("length", [512, 3000])
def test_needles(smollm2: Path, tmp_path: Path, length: int) -> None:
    """Problems fill their length and no more. The fact that is asked for stands in its depth, beside three others."""
    tokenizer = load_tokenizer(smollm2, False)
    rows = build(length, str(TEXT), str(smollm2), False)["test"]
    assert len(rows) == PROBLEMS and rows[0] == build(length, str(TEXT), str(smollm2), False)["test"][0]
    found: dict[float, list[float]] = {depth: [] for depth in DEPTHS}
    for row in rows:
        size = len(tokenizer(row["prompt"])["input_ids"])
        assert length - ROOM - 100 <= size <= length - ROOM
        text, question = row["prompt"].split("\n\nQuestion: ")
        (city,) = re.findall(r"access code of (\w+)\?", question)
        assert len(set(re.findall(r"access code of \w+ is (\d{5})\.", text))) == 4
        needle = f"The access code of {city} is {row['answer']}."
        assert text.count(needle) == 1
        found[row["depth"]].append(text.index(needle) / (len(text) - len(needle)))
        assert score(row, [f" {row['answer']}."]) == {"found": 1.0} and score(row, [" unknown"]) == {"found": 0.0}
    assert set(found[0.0]) == {0.0} and set(found[1.0]) == {1.0}
    for depth, places in found.items():
        assert all(abs(place - depth) < 0.25 for place in places)
    assert len({row["answer"] for row in rows}) == PROBLEMS
    assert all(first["prompt"] != second["prompt"] for first, second in pairwise(rows))


def test_needles_in_text_without_sentences(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("word " * 5000)
    (row, *_) = build(1024, str(tmp_path / "words.txt"), str(smollm2), False)["test"]
    assert len(load_tokenizer(smollm2, False)(row["prompt"])["input_ids"]) > 800
