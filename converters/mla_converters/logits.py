"""Writing down what a teacher predicts, so that it need not be in memory when a student learns from it."""

import shlex
import time
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress

from mla_converters.checkpoints.source import Source, open_source
from mla_converters.engines.process import Engine
from mla_converters.errors import ConversionError, UnfinishedError
from mla_converters.evaluation.vllm_engine import ENVIRONMENT
from mla_converters.options import LogitsOptions, given_options
from mla_converters.options.text import parse_weighted
from mla_converters.reports.logits import LogitsReport
from mla_converters.resume.identity import VERSIONS, logits_identity
from mla_converters.resume.work_folder import work_folder
from mla_converters.support.json_files import write_json
from mla_converters.support.packages import require
from mla_converters.support.progress import progress_bars
from mla_converters.text.healing import training_windows
from mla_converters.training.stored import COLUMNS, DESCRIPTION

TOGETHER = 16  # windows that are sent to the engine at one time
# Options that do not change the text, which is all that is kept of an interrupted run: it may go on with others.
FREE = {"top_k", "dtype", "tensor_parallel_size"}


def logits(model: str, out: Path, options: LogitsOptions | None = None, *, quiet: bool = False) -> LogitsReport:
    """Let vLLM predict every token of a text, and write down the likeliest tokens.

    Args:
        model: folder, hub id or ``.gguf`` file of the teacher.
        out: folder to create; appears when it is complete. ``vllm-mla heal --teacher`` takes it.
        options: text, how many tokens; None for the defaults.
        quiet: no progress.

    Returns:
        What was written.

    Raises:
        ConversionError: the input cannot be used.
        UnfinishedError: interrupted, too little disk space, or vLLM failed; the text is kept for the next call.
    """
    require("vllm", "logits", "run pip install 'vllm-mla-plugin[cuda]' or '[cpu]'")
    started = time.monotonic()
    options = options or LogitsOptions()
    decisive = LogitsOptions(**options.model_dump(exclude=FREE))
    with progress_bars(quiet) as progress, open_source(model, None, options.trust_remote_code) as teacher:
        if options.top_k >= teacher.config.vocab_size:
            raise ConversionError(
                f"--top-k is {options.top_k}, but must be less than the vocabulary of {model} "
                f"({teacher.config.vocab_size} tokens)."
            )
        with work_folder(out, False, logits_identity(teacher, decisive)) as work:
            windows = work.mapped(
                "text",
                lambda: training_windows(teacher, options.text, options.tokens, options.length, options.seed, progress),
            )
            try:
                work.check_space(_bytes(windows, options.top_k))
                remainder, versions = _predict(teacher, windows, options, work.model, progress)
            except ConversionError as error:  # the text stays, because the model may have written it for hours
                raise UnfinishedError(str(error)) from error
            report = LogitsReport(
                model=model,
                command=shlex.join(["vllm-mla", "logits", model, out.name, *given_options(options)]),
                text=[Path(parse_weighted(origin)[0]).name for origin in options.text],
                windows=len(windows),
                length=windows.shape[1],
                top_k=options.top_k,
                remainder=round(remainder, 6),
                bytes=_bytes(windows, options.top_k),
                seconds=round(time.monotonic() - started, 1),
                versions=VERSIONS | versions,
            )
            teacher.tokenizer.save_pretrained(work.model)  # the student's must be the same
            write_json(work.model / DESCRIPTION, report.as_json())
    return report


def _bytes(windows: torch.Tensor, top_k: int) -> int:
    sizes = {name: np.dtype(dtype).itemsize for name, dtype in COLUMNS.items()}
    return windows.numel() * (sizes["input_ids"] + top_k * (sizes["top_ids"] + sizes["top_logprobs"]))


def _predict(
    teacher: Source, windows: torch.Tensor, options: LogitsOptions, folder: Path, progress: Progress
) -> tuple[float, dict[str, str]]:
    """Write all arrays; the mean probability of what is left out, and the engine's versions."""
    size = tuple(windows.shape)
    shapes = {name: size if name == "input_ids" else (*size, options.top_k) for name in COLUMNS}
    arrays = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shapes[name])
        for name, dtype in COLUMNS.items()
    }
    arrays["input_ids"][:] = windows.numpy()
    arguments = {
        "model": str(teacher.model_folder),
        "dtype": options.dtype or "auto",
        "max_model_len": windows.shape[1] + 1,  # vLLM always generates one token
        "max_logprobs": options.top_k,
        "enforce_eager": True,  # prompts alone gain little from graphs
        "enable_prefix_caching": False,
        "tensor_parallel_size": options.tensor_parallel_size,
    }
    task, left = progress.add_task("Predicting", total=len(windows)), 0.0
    advice = "give fewer --top-k, or a smaller --length"
    with Engine(f"predict with {teacher.name}", arguments, advice=advice, environment=ENVIRONMENT) as engine:
        for first in range(0, len(windows), TOGETHER):
            some = windows[first : first + TOGETHER].tolist()
            for index, answer in enumerate(engine.predict(some, options.top_k), first):
                arrays["top_ids"][index] = answer["ids"]
                arrays["top_logprobs"][index] = answer["logprobs"]
                left += 1 - np.exp(answer["logprobs"]).sum(-1).mean()
                progress.advance(task)
        versions = engine.facts["versions"]
    for array in arrays.values():
        array.flush()
    return float(max(left, 0.0)) / len(windows), versions
