"""Healing: training what a conversion changed until the model predicts again what its source predicts."""

import shlex
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.progress import Progress

from mla_converters.cards.card import CARD, REPORT, read_report
from mla_converters.cards.describe import outcome
from mla_converters.checkpoints.families import architecture_names
from mla_converters.checkpoints.locate import local_path
from mla_converters.checkpoints.manifest import MANIFEST, all_files
from mla_converters.checkpoints.models import Model, converted_config, find_model
from mla_converters.checkpoints.reader import INDEX, Checkpoint
from mla_converters.checkpoints.source import Source, open_source
from mla_converters.checkpoints.tokenizer import load_tokenizer
from mla_converters.checkpoints.tokenizer_check import same_ids, tokenizer_difference
from mla_converters.errors import ConversionError
from mla_converters.options import HealOptions, given_options
from mla_converters.options.text import parse_weighted
from mla_converters.proof import prove_and_describe
from mla_converters.reports.conversion import ConversionReport, Divergence, Healing
from mla_converters.resume.identity import VERSIONS, healing_identity
from mla_converters.resume.work_folder import Work, joined_work, work_folder
from mla_converters.support.devices import native_bfloat16, usable_device
from mla_converters.support.progress import progress_bars
from mla_converters.text.healing import divided, hold_out, training_windows
from mla_converters.training.assembly import assemble
from mla_converters.training.distillation import Distillation, held_out_loss
from mla_converters.training.processes import asked_to_shard, join_processes, shares
from mla_converters.training.schedule import LONGEST, suited_length, suited_passes, suited_rate
from mla_converters.training.teachers import shares_the_rest
from mla_converters.training.trainer import Schedule, train
from mla_converters.training.writing import disk_bytes, write_weights

# Nats per token from the source that are no more than rounding; a small model that lost nothing has 2e-9 and 7e-4.
NOTHING = {torch.float32: 1e-5, torch.bfloat16: 1e-3}
MEASURED = 1  # held-out windows on which the loss is measured
# Options that change how the work is done, and not what comes out: an interrupted run may go on with others.
FREE = {"device_batch_size": None, "gradient_checkpointing": False, "fsdp": False}


def heal(
    model: Path,
    out: Path,
    options: HealOptions | None = None,
    *,
    force: bool = False,
    quiet: bool = False,
) -> ConversionReport:
    """Train the attentions of a converted model on what its source predicts; all other weights stay.

    Args:
        model: a folder that ``vllm-mla convert`` wrote.
        out: folder to create; appears when it is complete.
        options: text, steps, source; None for the defaults.
        force: replace ``out``.
        quiet: no progress.

    Returns:
        The conversion's report, with what healing did under ``healing``.

    Raises:
        ConversionError: the input cannot be used, or training made the model worse.
        UnfinishedError: interrupted, or out of disk space; called again with the same arguments, it goes on.
    """
    started = time.monotonic()
    options = options or HealOptions()
    device = usable_device(options.device)
    if asked_to_shard():
        options = options.model_copy(update={"fsdp": True})
    state = join_processes(device)
    with ExitStack() as stack:
        progress = stack.enter_context(progress_bars(quiet or not state.is_main_process))
        with state.main_process_first():  # so that only one process says what is wrong with the input
            run = _begin(model, out, options, device, force, stack)
        report, held_out = _train(run, progress)
        if state.is_main_process:
            report = prove_and_describe(
                run.source, run.work.model, run.config, report, held_out[:MEASURED], device, progress
            )
    state.wait_for_everyone()
    return outcome(report, out, started)


@dataclass(frozen=True)
class _Run:
    """Everything that a run needs, opened and checked."""

    model: Path
    config: dict[str, Any]
    report: ConversionReport
    source: Source
    teacher: Model | None
    options: HealOptions
    device: str
    work: Work


def _begin(model: Path, out: Path, options: HealOptions, device: str, force: bool, stack: ExitStack) -> _Run:
    """Open everything until ``stack`` closes, and check it.

    Raises:
        ConversionError: something cannot be used.
    """
    state = PartialState()
    shares(options.batch_size, options.device_batch_size, state.num_processes)
    config, report = _converted(model, options)
    if out.resolve() == model.resolve():
        raise ConversionError(f"OUT is {out}, which is MODEL: give a folder of its own.")
    name, revision = (options.source, None) if options.source else _recorded_source(model, report)
    source = stack.enter_context(open_source(name, revision, options.trust_remote_code, report.rope_scaling))
    _refuse_quantised(model, config, source)
    _check_pair(model, config, source)
    teacher = _teacher(options, source, stack)
    if not state.is_main_process:
        return _Run(model, config, report, source, teacher, options, str(state.device), joined_work(out))
    decisive = options.model_copy(update={"device": device, **FREE})
    work = stack.enter_context(work_folder(out, force, healing_identity(model, source, decisive)))
    work.check_space(disk_bytes(Checkpoint(model), options.train, options.tokens))
    own_device = device if state.num_processes == 1 else str(state.device)
    return _Run(model, config, report, source, teacher, options, own_device, work)


def _converted(folder: Path, options: HealOptions) -> tuple[dict[str, Any], ConversionReport]:
    """A converted model's configuration and report.

    Raises:
        ConversionError: it is none, or lost nothing that its source could teach.
    """
    config, report = converted_config(folder), read_report(folder)
    if report.lossless and "kl" in options.losses and options.teacher is None:
        raise ConversionError(
            f"{folder} is an exact conversion: nothing was lost that could be healed. To train it on text, give "
            "--loss lm; to learn from a larger model, give --teacher."
        )
    return config, report


def _teacher(options: HealOptions, source: Source, stack: ExitStack) -> Model | None:
    """The model that ``--teacher`` names.

    Raises:
        ConversionError: it cannot teach.
    """
    if options.teacher is None:
        return None
    if "kl" not in options.losses:
        raise ConversionError(f"--teacher is {options.teacher}, but --loss {options.loss} learns from no teacher.")
    teacher = find_model(options.teacher, stack, options.trust_remote_code)
    if not same_ids(source.tokenizer, load_tokenizer(teacher.path, options.trust_remote_code)):
        raise ConversionError(
            f"--teacher {options.teacher} has another tokenizer than {source.name}, so its predictions are of other "
            "tokens: choose a teacher of the same family."
        )
    return teacher


def _recorded_source(model: Path, report: ConversionReport) -> tuple[str, str | None]:
    """What a model says it was converted from, and the revision."""
    try:
        local_path(report.source)
    except ConversionError as error:
        raise ConversionError(
            f"{model} was converted from {report.source}, which is gone: say where with --source."
        ) from error
    return report.source, report.revision


def _refuse_quantised(model: Path, config: dict[str, Any], source: Source) -> None:
    """Refuse quantised weights, through which training does not pass."""
    if source.quantisation is not None or config.get("quantization_config"):
        quantised = model if source.quantisation is None else source.name
        raise ConversionError(
            f"{quantised} has quantised weights, through which healing does not train: convert the unquantised model, "
            "heal that, and quantise after."
        )


def _check_pair(model: Path, config: dict[str, Any], source: Source) -> None:
    """Refuse a source that the model was not converted from, as far as sizes and the tokenizer tell."""
    same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    differ = [name for name in same if config.get(name) != getattr(source.config, name)]
    if source.family.mla_architecture not in architecture_names(config):
        differ.append("architecture")
    if differ:
        raise ConversionError(
            f"{model} was not converted from {source.name}: they differ in {', '.join(differ)}. Name its source with "
            "--source."
        )
    if difference := tokenizer_difference(source.tokenizer, load_tokenizer(model, source.trust_remote_code)):
        raise ConversionError(
            f"{model} has another tokenizer than {source.name}, with which it would be healed: {difference}. Convert "
            "it again."
        )


def _train(run: _Run, progress: Progress) -> tuple[ConversionReport, torch.Tensor]:
    """Train, and write the weights and what they need; all processes together.

    Returns:
        The report with what was done, and the windows ``[windows, tokens]`` that were held out.

    Raises:
        ConversionError: nothing was lost, or training made the model worse.
    """
    options, state = run.options, PartialState()
    windows = _windows(run, progress)
    trained_on, held_out = hold_out(windows)
    sharded = options.fsdp and state.num_processes > 1
    dtype = _dtype(options, run.device)
    distilled = _assemble(run, dtype, sharded)

    def measure() -> torch.Tensor:
        return held_out_loss(distilled, held_out, run.device, dtype)

    before = run.work.remembered_together("before", measure)
    total, kl, lm = before.tolist()
    if state.is_main_process and options.loss == "kl" and options.teacher is None and kl < NOTHING[dtype]:
        raise ConversionError(
            f"{run.model} predicts what its source predicts, to {kl:.0e} nats per token on text held out: "
            "nothing was lost that could be healed."
        )
    lost = kl if "kl" in options.losses else None
    if options.length is None and lost is not None:
        trained_on = divided(trained_on, suited_length(lost))
    steps = options.steps or -(-suited_passes(lost) * len(trained_on) // options.batch_size)
    rate = options.learning_rate or suited_rate(lost, options.batch_size * trained_on.shape[1], options.train)
    at_a_time, accumulated = shares(options.batch_size, options.device_batch_size, state.num_processes)
    schedule = Schedule(steps, rate, at_a_time, accumulated, options.seed, dtype, options.gradient_checkpointing)
    task = progress.add_task("Training", total=steps)

    def advance(step: int, loss: float) -> None:
        progress.update(task, completed=step, description=f"Training, loss {loss:.4f}")

    train(
        distilled,
        [{"input_ids": ids} for ids in trained_on],
        schedule,
        run.device,
        run.work.folder / "trainer",
        advance,
    )
    after = measure()
    if state.is_main_process and not after[0] < total:
        raise ConversionError(
            f"Training made the model worse on text held out ({total:.4f} to {after[0].item():.4f} nats per token): "
            "lower --learning-rate, or give more --tokens."
        )
    write_weights(Checkpoint(run.model), distilled.student, run.work.model)
    if state.is_main_process:
        _copy_others(run.model, Checkpoint(run.model), run.work.model)
    healing = Healing(
        command=_command_line(run.model, options),
        text=[Path(parse_weighted(origin)[0]).name for origin in options.text],
        tokens=windows.numel(),
        window=trained_on.shape[1],
        steps=steps,
        batch_size=options.batch_size,
        learning_rate=rate,
        seed=options.seed,
        train=options.train,
        loss=options.loss,
        teacher=options.teacher,
        kl_held_out=_change(kl, after[1].item()) if "kl" in options.losses else None,
        lm_held_out=_change(lm, after[2].item()) if "lm" in options.losses else None,
        versions=VERSIONS,
    )
    return run.report.model_copy(update={"healing": healing, "lossless": False}), held_out


def _windows(run: _Run, progress: Progress) -> torch.Tensor:
    """The windows of all text; the main process makes them, and all get them."""
    options, length = run.options, run.options.length or LONGEST
    with PartialState().main_process_first():
        return run.work.mapped(
            "text",
            lambda: training_windows(
                run.source, options.text, options.tokens, length, options.seed, progress, run.device
            ),
        )


def _assemble(run: _Run, dtype: torch.dtype, sharded: bool) -> Distillation:
    """Student and teacher. If they can share all but attentions, the source is in memory only where they differ."""
    if run.teacher is not None or "kl" not in run.options.losses:
        return assemble(run.model, None, run.teacher, run.options, dtype, run.device, sharded)
    source = run.source
    shared = [PartialState().is_main_process and run.options.train != "all"]
    shared = [shared[0] and shares_the_rest(Checkpoint(run.model), source, dtype)]
    broadcast_object_list(shared)
    if shared[0]:
        return assemble(run.model, source, None, run.options, dtype, run.device, sharded)
    whole = Model(source.name, str(source.model_folder), source.config)
    return assemble(run.model, None, whole, run.options, dtype, run.device, sharded)


def _change(before: float, after: float) -> Divergence:
    return Divergence(before=round(before, 6), after=round(after, 6))


def _dtype(options: HealOptions, device: str) -> torch.dtype:
    """The dtype of the computation."""
    if options.dtype is not None:
        return getattr(torch, options.dtype)
    return torch.bfloat16 if native_bfloat16(device) else torch.float32


def _copy_others(model: Path, checkpoint: Checkpoint, folder: Path) -> None:
    """Copy what is neither weights nor about to be written again."""
    written = {INDEX, MANIFEST, REPORT, CARD, "config.json", *(path.name for path in checkpoint.files())}
    for name in all_files(model):
        if name not in written:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(model / name, folder / name)


def _command_line(model: Path, options: HealOptions) -> str:
    return shlex.join(["vllm-mla", "heal", str(model), f"./{model.name}-healed", *given_options(options)])
