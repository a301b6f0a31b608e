"""Healing: training what a conversion changed until the model predicts again what its source predicts."""

import shlex
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from mla_converters.cards.card import CARD, REPORT, read_report
from mla_converters.cards.describe import outcome
from mla_converters.checkpoints.families import architecture_names
from mla_converters.checkpoints.locate import local_path
from mla_converters.checkpoints.manifest import MANIFEST, all_files
from mla_converters.checkpoints.models import Model, converted_config, load_model, read_config
from mla_converters.checkpoints.reader import INDEX, Checkpoint
from mla_converters.checkpoints.source import Source, open_source
from mla_converters.checkpoints.tokenizer import load_tokenizer
from mla_converters.checkpoints.tokenizer_check import tokenizer_difference
from mla_converters.checkpoints.writer import Shards
from mla_converters.errors import ConversionError
from mla_converters.options import HealOptions, given_options
from mla_converters.proof import prove_and_describe
from mla_converters.reports.conversion import ConversionReport, Divergence, Healing
from mla_converters.resume.identity import VERSIONS, healing_identity
from mla_converters.resume.work_folder import Work, work_folder
from mla_converters.support.devices import native_bfloat16, usable_device
from mla_converters.support.progress import progress_bars
from mla_converters.text.healing import divided, hold_out, training_windows
from mla_converters.training.distillation import distillation, held_out_kl
from mla_converters.training.schedule import LONGEST, suited_length, suited_passes, suited_rate
from mla_converters.training.trainer import SAVED_BYTES, train

# Nats per token from the source that are no more than rounding; a small model that lost nothing has 2e-9 and 7e-4.
NOTHING = {torch.float32: 1e-5, torch.bfloat16: 1e-3}
SAVES = 2  # a new one is written before the old one goes
ATTENTION = ".self_attn."  # in the names of what is trained


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
    config, report = _converted(model)
    if out.resolve() == model.resolve():
        raise ConversionError(f"OUT is {out}, which is MODEL: give a folder of its own.")
    name, revision = (options.source, None) if options.source else _recorded_source(model, report)
    with (
        progress_bars(quiet) as progress,
        open_source(name, revision, options.trust_remote_code, report.rope_scaling) as teacher,
    ):
        _refuse_quantised(model, config, teacher)
        _check_pair(model, config, teacher)
        checkpoint = Checkpoint(model)
        identity = healing_identity(model, teacher, options.model_copy(update={"device": device}))
        with work_folder(out, force, identity) as work:
            work.check_space(_disk_bytes(checkpoint))
            healed, healing = _train(model, teacher, options, device, work, progress)
            _write_weights(checkpoint, healed, work.model)
            _copy_others(model, checkpoint, work.model)
            report = report.model_copy(update={"healing": healing})
            report = prove_and_describe(teacher, work.model, config, report, device)
    return outcome(report, out, started)


def _converted(folder: Path) -> tuple[dict[str, Any], ConversionReport]:
    """A converted model's configuration and report.

    Raises:
        ConversionError: it is none, or lost nothing.
    """
    config, report = converted_config(folder), read_report(folder)
    if report.lossless:
        raise ConversionError(f"{folder} is an exact conversion: nothing was lost that could be healed.")
    return config, report


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


def _disk_bytes(checkpoint: Checkpoint) -> int:
    tensors = {name: checkpoint.meta(name) for name in checkpoint.names()}
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return weights + SAVES * sum(SAVED_BYTES * tensor.numel() for name, tensor in tensors.items() if ATTENTION in name)


def _train(
    model: Path, source: Source, options: HealOptions, device: str, work: Work, progress: Progress
) -> tuple[dict[str, torch.Tensor], Healing]:
    """The trained tensors by name, and what the report says of the training."""
    length = options.length or LONGEST
    windows = work.remembered(
        "text", lambda: training_windows(source, options.text, options.tokens, length, options.seed, progress, device)
    )
    trained_on, held_out = hold_out(windows)
    dtype = torch.bfloat16 if native_bfloat16(device) else torch.float32
    student = load_model(Model(str(model), str(model), read_config(model, False)), dtype, device)
    teacher = load_model(Model(source.name, str(source.model_folder), source.config), dtype, device)
    task = progress.add_task("Healing", total=None)

    def advance(step: int, loss: float) -> None:
        progress.update(task, completed=step, description=f"Healing, KL {loss:.4f}")

    with distillation(student, teacher) as distilled:
        before = work.remembered("before", lambda: torch.tensor([held_out_kl(distilled, held_out, device)]))
        if before.item() < NOTHING[dtype]:
            raise ConversionError(
                f"{model} predicts what its source predicts, to {before.item():.0e} nats per token on text held out: "
                "nothing was lost that could be healed."
            )
        if options.length is None:
            trained_on = divided(trained_on, suited_length(before.item()))
        steps = options.steps or -(-suited_passes(before.item()) * len(trained_on) // options.batch_size)
        progress.update(task, total=steps)
        rate = options.learning_rate or suited_rate(before.item(), trained_on[: options.batch_size].numel())
        train(distilled, trained_on, steps, rate, options, device, work.folder / "trainer", advance)
        after = held_out_kl(distilled, held_out, device)
    if not after < before.item():
        raise ConversionError(
            f"Training made the model worse on text held out ({before.item():.4f} to {after:.4f} nats per token from "
            "the source): lower --learning-rate, or give more --tokens."
        )
    healed = {name: tensor for name, tensor in student.named_parameters() if ATTENTION in name}
    return healed, Healing(
        command=_command_line(model, options),
        text=[Path(origin).name for origin in options.text],
        tokens=windows.numel(),
        window=trained_on.shape[1],
        steps=steps,
        batch_size=options.batch_size,
        learning_rate=rate,
        seed=options.seed,
        kl_held_out=Divergence(before=round(before.item(), 6), after=round(after, 6)),
        versions=VERSIONS,
    )


def _write_weights(checkpoint: Checkpoint, healed: dict[str, torch.Tensor], folder: Path) -> None:
    shards = Shards(folder, {name: checkpoint.meta(name) for name in checkpoint.names()})
    shards.allocate()
    for name in checkpoint.names():
        shards.write(name, healed[name] if name in healed else checkpoint.tensor(name))
    shards.finish()


def _copy_others(model: Path, checkpoint: Checkpoint, folder: Path) -> None:
    """Copy what is neither weights nor about to be written again."""
    written = {INDEX, MANIFEST, REPORT, CARD, "config.json", *(path.name for path in checkpoint.files())}
    for name in all_files(model):
        if name not in written:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(model / name, folder / name)


def _command_line(model: Path, options: HealOptions) -> str:
    return shlex.join(["vllm-mla", "heal", str(model), f"./{model.name}-healed", *given_options(options)])
