"""Training a converted model: until it predicts again what its source predicts, or what others or a text teach it."""

import shlex
import shutil
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.progress import Progress

from mla_converters.cards.card import CARD, REPORT
from mla_converters.cards.describe import outcome
from mla_converters.checkpoints.manifest import MANIFEST, all_files
from mla_converters.checkpoints.models import Model
from mla_converters.checkpoints.reader import INDEX, Checkpoint
from mla_converters.errors import ConversionError
from mla_converters.heal.inputs import Inputs, open_inputs
from mla_converters.options import HealOptions, given_options
from mla_converters.options.text import parse_weighted
from mla_converters.proof import prove_and_describe
from mla_converters.reports.conversion import ConversionReport, Divergence, Healing
from mla_converters.resume.identity import VERSIONS
from mla_converters.support.devices import native_bfloat16, usable_device
from mla_converters.support.progress import progress_bars
from mla_converters.text.healing import divided, hold_out, training_windows
from mla_converters.training.assembly import assemble
from mla_converters.training.distillation import Distillation, held_out_loss
from mla_converters.training.processes import asked_to_shard, begin_on_own_gpu, following, join_processes, shares
from mla_converters.training.schedule import LONGEST, suited_length, suited_passes, suited_rate
from mla_converters.training.stored import Examples, read_description, read_stored
from mla_converters.training.teachers import shares_the_rest
from mla_converters.training.trainer import Schedule, train
from mla_converters.training.writing import write_weights

# Nats per token from the source that are no more than rounding; a small model that lost nothing has 2e-9 and 7e-4.
NOTHING = {torch.float32: 1e-5, torch.bfloat16: 1e-3}
MEASURED = 1  # held-out windows on which the loss is measured
BY_CHANCE = 0.05  # share of the divergence by which a few windows may differ though two models are equally good


def heal(
    model: Path,
    out: Path,
    options: HealOptions | None = None,
    *,
    force: bool = False,
    quiet: bool = False,
) -> ConversionReport:
    """Train a converted model; by default its attentions, on what its source predicts.

    Every process that ``torchrun`` or ``accelerate launch`` starts calls this with the same arguments, and they train
    together. They must see the same folders.

    Args:
        model: a folder that ``vllm-mla convert`` wrote.
        out: folder to create; appears when it is complete.
        options: text, what is trained, on which loss; None for the defaults.
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
    begin_on_own_gpu(options.device)
    device = usable_device(options.device)
    if asked_to_shard():
        options = options.model_copy(update={"fsdp": True})
    state = join_processes(device)
    with following(), ExitStack() as stack:
        progress = stack.enter_context(progress_bars(quiet or not state.is_main_process))
        with state.main_process_first():  # so that only one process says what is wrong with the input
            run = open_inputs(model, out, options, device, force, stack)
        report, held_out = _train(run, progress)
        if state.is_main_process:
            report = prove_and_describe(
                run.source, run.work.model, run.config, report, held_out[:MEASURED], device, progress
            )
    state.wait_for_everyone()
    return outcome(report, out, started)


def _train(run: Inputs, progress: Progress) -> tuple[ConversionReport, torch.Tensor]:
    """Train, and write the weights and what they need; all processes together.

    Returns:
        The report with what was done, and the windows ``[windows, tokens]`` that were held out.

    Raises:
        ConversionError: nothing was lost, or training made the model worse.
    """
    options, state = run.options, PartialState()
    examples = _examples(run, progress)
    trained_on, held_out = hold_out(examples)
    sharded = options.fsdp and state.num_processes > 1
    dtype = _dtype(options, run.device)
    distilled = _assemble(run, dtype, sharded)

    def measure() -> torch.Tensor:
        return held_out_loss(distilled, held_out, run.device, dtype)

    before = run.work.remembered_together("before", measure)
    total, kl, lm = before.tolist()
    if state.is_main_process and "lm" not in options.losses and kl < NOTHING[dtype]:
        raise ConversionError(
            f"{run.model} predicts what {options.teacher or 'its source'} predicts, to {abs(kl):.0e} nats per token on "
            "text held out: there is nothing that training could improve."
        )
    trained_on, schedule = _planned(run, trained_on, kl, dtype)
    task = progress.add_task("Training", total=schedule.steps)

    def advance(step: int, loss: float) -> None:
        progress.update(task, completed=step, description=f"Training, loss {loss:.4f}")

    train(distilled, trained_on, schedule, run.device, run.work.folder / "trainer", advance)
    after = measure()
    warning = _judged(total, after[0].item(), options.losses.get("kl", 0.0) * kl) if state.is_main_process else None
    write_weights(Checkpoint(run.model), distilled.student, run.work.model)
    if state.is_main_process:
        _copy_others(run.model, Checkpoint(run.model), run.work.model)
    healing = Healing(
        command=_command_line(run.model, options),
        text=_texts(run),
        tokens=examples.columns["input_ids"].numel(),
        window=trained_on.columns["input_ids"].shape[1],
        steps=schedule.steps,
        batch_size=options.batch_size,
        learning_rate=schedule.rate,
        seed=options.seed,
        train=options.train,
        loss=options.loss,
        teacher=options.teacher,
        kl_held_out=_change(kl, after[1].item()) if "kl" in options.losses else None,
        lm_held_out=_change(lm, after[2].item()) if "lm" in options.losses else None,
        warning=warning,
        versions=VERSIONS,
    )
    return run.report.model_copy(update={"healing": healing, "lossless": False}), held_out.columns["input_ids"]


def _judged(before: float, after: float, kl: float) -> str | None:
    """A warning if training brought nothing, by the losses on text held out.

    Args:
        before, after: the losses, in nats per token.
        kl: the part of ``before`` that is a divergence; rounding may leave a little less than nothing.

    Raises:
        ConversionError: the model became worse by more than chance.
    """
    losses = f"{before:.4f} to {after:.4f} nats per token"
    if not after <= before + BY_CHANCE * max(kl, 0.0):
        raise ConversionError(
            f"Training made the model worse on text held out ({losses}): lower --learning-rate, or give more --tokens."
        )
    if after < before:
        return None
    return (
        f"Training did not make the model better on text held out ({losses}): keep the model that you have, or give "
        "more --tokens."
    )


def _planned(run: Inputs, trained_on: Examples, kl: float, dtype: torch.dtype) -> tuple[Examples, Schedule]:
    """The windows as they are trained on, and how, by how much was lost.

    Args:
        run: the inputs.
        trained_on: the windows that are not held out.
        kl: divergence from the teacher in nats per token, if there is one.
        dtype: of the computation.

    Raises:
        OptionError: all steps would teach hidden states.
    """
    options, state = run.options, PartialState()
    lost = kl if "kl" in options.losses else None
    if options.length is None and lost is not None and not isinstance(run.teacher, Path):
        trained_on = Examples(input_ids=divided(trained_on.columns["input_ids"], suited_length(lost)))
    length = trained_on.columns["input_ids"].shape[1]
    steps = options.steps or -(-suited_passes(lost) * len(trained_on) // options.batch_size)
    if state.is_main_process:
        options.check_stages(steps)
    rate = options.learning_rate or suited_rate(
        lost, options.batch_size * length, options.train, on_text="lm" in options.losses
    )
    at_a_time, accumulated = shares(options.batch_size, options.device_batch_size, state.num_processes)
    return trained_on, Schedule(
        steps, rate, at_a_time, accumulated, options.seed, dtype, options.hidden_steps, options.gradient_checkpointing
    )


def _examples(run: Inputs, progress: Progress) -> Examples:
    """The windows of all text; the main process makes them, and all get them."""
    if isinstance(run.teacher, Path):
        return read_stored(run.teacher)
    options, length = run.options, run.options.length or LONGEST
    with PartialState().main_process_first():
        windows = run.work.mapped(
            "text",
            lambda: training_windows(
                run.source, options.text, options.tokens, length, options.seed, progress, run.device
            ),
        )
    return Examples(input_ids=windows)


def _texts(run: Inputs) -> list[str]:
    """Names of the texts."""
    if isinstance(run.teacher, Path):
        return read_description(run.teacher).text
    return [Path(parse_weighted(origin)[0]).name for origin in run.options.text]


def _assemble(run: Inputs, dtype: torch.dtype, sharded: bool) -> Distillation:
    """Student and teacher. If they can share all but attentions, the source is in memory only where they differ."""
    if run.teacher is not None or "kl" not in run.options.losses:
        teacher = None if isinstance(run.teacher, Path) else run.teacher
        return assemble(run.model, None, teacher, run.options, dtype, run.device, sharded)
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
