"""Runs lm-evaluation-harness on models, one after the other."""

import contextlib
import io
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lm_eval
import torch
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase

from mla_converters.checkpoints.models import Model
from mla_converters.checkpoints.tokenizer import load_tokenizer
from mla_converters.engines.process import Engine
from mla_converters.errors import ConversionError, OptionError
from mla_converters.evaluation.needles.tasks import write_tasks
from mla_converters.evaluation.tasks.comparison import compared, measured
from mla_converters.evaluation.tasks.language_model import EngineModel
from mla_converters.evaluation.vllm_engine import ENVIRONMENT
from mla_converters.options import EvalOptions
from mla_converters.reports.evaluation import TaskScore

ADVICE = "give --dtype bfloat16 or a smaller VLLM_CPU_KVCACHE_SPACE, or run on a machine with more memory"
TOO_SMALL = "gpu_memory_utilization"  # an option of vLLM that it names if its cache does not hold the context
ALLOW = "HF_ALLOW_CODE_EVAL"  # a metric of Hugging Face that runs code looks for this variable
UNSAFE = re.compile(r"^unsafe_code:\s*true\b", re.MULTILINE)
INCLUDES = re.compile(r"^include:\s*(\S+)", re.MULTILINE)
FEWSHOT_SEED = 1234  # the harness's default
SHOWN = 3  # similar names of tasks that an error suggests
EXAMPLES = ("arc_easy", "gsm8k", "needles")  # suggested where no name is similar


def score_tasks(
    models: list[Model], reference: Model | None, options: EvalOptions, progress: Progress
) -> tuple[list[list[TaskScore]], list[TaskScore] | None]:
    """Score models on tasks, the reference first.

    Args:
        models: to score.
        reference: what to compare them with, on the same problems; or None.
        options: the tasks, and how to ask them.
        progress: gets a bar for each kind of request of each model.

    Returns:
        The scores of each model, and those of the reference.

    Raises:
        ConversionError: there is no such task, its data cannot be loaded, it would run code without leave, or an engine
            fails.
    """
    everyone = [reference, *models] if reference else models
    tokenizers = {model.name: _tokenizer(model, options.chat) for model in everyone}
    with TemporaryDirectory() as needles:
        write_tasks(Path(needles), options.tasks, everyone, options.text)
        tasks = _load(options, Path(needles))

    def run(model: Model) -> list[TaskScore]:
        return _run(model, tokenizers[model.name], tasks, options, progress)

    theirs = None if reference is None else run(reference)
    rows = [run(model) for model in models]
    if theirs is None:
        return rows, None
    return [compared(own, theirs) for own in rows], theirs


def _tokenizer(model: Model, chat: bool) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(model.path, model.trust_remote_code)
    if chat and tokenizer.chat_template is None:
        raise ConversionError(f"The tokenizer of {model.name} has no chat template: leave out --chat.")
    return tokenizer


def _load(options: EvalOptions, needles: Path) -> TaskDict:
    """The tasks with their data, which are the same for every model.

    Raises:
        ConversionError: there is no such task, its data cannot be loaded, or it would run code without leave.
    """
    manager = _manager(options.tasks, [*_tasks_folder(options.tasks_dir), needles])
    names = manager.match_tasks(list(options.tasks))
    if not options.allow_code_execution:
        # Before they are loaded, because the metrics of some are code from the hub, which would run then.
        for name in names:
            if (path := manager.task_index[name].yaml_path) and _is_unsafe(Path(path)):
                raise _unsafe([name])
    try:
        with _surroundings(options):
            tasks = manager.load(names)
    except Exception as error:  # data sets and the code of tasks may fail in any way
        if ALLOW in str(error) and not options.allow_code_execution:
            raise _unsafe(options.tasks) from error
        raise ConversionError(
            f"--tasks {','.join(options.tasks)} cannot be loaded ({_first_line(error)}): check the task's YAML file, "
            "and whether its data can be reached."
        ) from error
    for name, task in tasks["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) and not options.allow_code_execution:
            raise _unsafe([name])
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
    return tasks


def _is_unsafe(path: Path) -> bool:
    """Whether a task's YAML file, or one that it includes, says that it runs what a model writes."""
    text = path.read_text()
    included = (path.parent / name for name in INCLUDES.findall(text))
    return bool(UNSAFE.search(text)) or any(_is_unsafe(file) for file in included if file.is_file())


def _tasks_folder(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    if not folder.is_dir() or not any(folder.rglob("*.yaml")):
        raise OptionError(f"--tasks-dir is {folder}, which is not a folder with YAML files.")
    return [folder.resolve()]


def _unsafe(names: Iterable[str]) -> OptionError:
    return OptionError(
        f"--tasks {','.join(names)} would run code that the models write: give --allow-code-execution if it may do so "
        "on this machine."
    )


def _manager(names: tuple[str, ...], folders: list[Path]) -> TaskManager:
    """What knows the tasks, those of the harness only if necessary: they are 14,000, and listing them takes seconds.

    Raises:
        OptionError: there is no task of a name.
    """
    paths = [str(folder) for folder in folders]
    with _quiet():
        manager = TaskManager(include_path=paths, include_defaults=False)
        if _unknown(names, manager):
            manager = TaskManager(include_path=paths)
    for name in _unknown(names, manager):
        similar = get_close_matches(name, manager.all_tasks, SHOWN) or EXAMPLES
        raise OptionError(
            f"--tasks has {name!r}, which is no task of lm-evaluation-harness, or of --tasks-dir; similar ones are "
            f"{', '.join(similar)}."
        )
    return manager


def _unknown(names: tuple[str, ...], manager: TaskManager) -> list[str]:
    return [name for name in names if not manager.match_tasks([name])]


def _run(
    model: Model, tokenizer: PreTrainedTokenizerBase, tasks: TaskDict, options: EvalOptions, progress: Progress
) -> list[TaskScore]:
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(FEWSHOT_SEED)  # each model sees the same examples
    # The engine starts outside of the tasks' folder, whose Python files its process would import in place of its own.
    with _engine(model, options.dtype) as engine, _surroundings(options):
        context = model.context or tokenizer.model_max_length
        try:
            results = lm_eval.evaluate(
                lm=EngineModel(tokenizer, context, engine, progress, Path(model.name).name),
                task_dict=tasks,
                limit=options.limit,
                apply_chat_template=options.chat,
                fewshot_as_multiturn=options.chat,
                confirm_run_unsafe_code=options.allow_code_execution,
                bootstrap_iters=0,
                log_samples=True,
            )
        except ConversionError:
            raise
        except Exception as error:  # the code of tasks may fail in any way
            raise ConversionError(
                f"--tasks {','.join(options.tasks)} failed with {model.name} ({_first_line(error)}): check the task's "
                "YAML file and its code."
            ) from error
    return measured(results)


@contextmanager
def _engine(model: Model, dtype: str) -> Iterator[Engine]:
    arguments: dict[str, Any] = {
        "model": model.path,
        "dtype": dtype,
        "skip_tokenizer_init": False,  # the engine looks for the texts at which an answer ends
        "trust_remote_code": model.trust_remote_code,
        # Compiling pays on a GPU. On a CPU it takes longer than it saves.
        "enforce_eager": not torch.cuda.is_available(),
    }
    if model.context is not None:
        arguments["max_model_len"] = model.context + 1  # a prompt may fill the context, and vLLM always adds a token
    task = f"answer tasks with {model.name} in {dtype}"
    try:
        with Engine(task, arguments, advice=ADVICE, environment=ENVIRONMENT) as engine:
            yield engine
    except ConversionError as error:
        if TOO_SMALL not in str(error) or torch.cuda.is_available():
            raise
        raise ConversionError(f"{error} Here, set VLLM_CPU_KVCACHE_SPACE to more GiB instead.") from error


@contextmanager
def _surroundings(options: EvalOptions) -> Iterator[None]:
    """What tasks find around them: their folder, silence, and whether code may run."""
    before = os.environ.get(ALLOW)
    os.environ[ALLOW] = "1" if options.allow_code_execution else "0"
    try:
        with contextlib.chdir(options.tasks_dir or "."), _quiet():
            yield
    finally:
        os.environ.pop(ALLOW)
        if before is not None:
            os.environ[ALLOW] = before


def _quiet() -> contextlib.AbstractContextManager[Any]:
    """Drops what the harness prints: its progress bars and notices, which would stand between ours."""
    return contextlib.redirect_stderr(io.StringIO())


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().split("\n")[0]
