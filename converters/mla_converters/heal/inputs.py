"""Everything that a training needs: opened, and checked before anything is written."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from mla_converters.cards.card import read_report
from mla_converters.checkpoints.families import architecture_names
from mla_converters.checkpoints.locate import local_path
from mla_converters.checkpoints.models import Model, converted_config, find_model
from mla_converters.checkpoints.reader import Checkpoint
from mla_converters.checkpoints.source import Source, open_source
from mla_converters.checkpoints.tokenizer import load_tokenizer
from mla_converters.checkpoints.tokenizer_check import same_ids, tokenizer_difference
from mla_converters.errors import ConversionError, OptionError
from mla_converters.options import HealOptions, option_name
from mla_converters.reports.conversion import ConversionReport
from mla_converters.resume.identity import healing_identity
from mla_converters.resume.out_folder import check_apart
from mla_converters.resume.work_folder import Work, joined_work, work_folder
from mla_converters.support.packages import require
from mla_converters.training.processes import shares
from mla_converters.training.stored import is_stored
from mla_converters.training.writing import disk_bytes

# Options that change how the work is done, and not what comes out: an interrupted run may go on with others.
OF_STORED = ("text", "tokens", "length", "temperature")  # options that have no effect on predictions written down
FREE = {"device_batch_size": None, "gradient_checkpointing": False, "fsdp": False}


@dataclass(frozen=True)
class Inputs:
    """Everything that a run needs, opened and checked."""

    model: Path
    config: dict[str, Any]
    report: ConversionReport
    source: Source
    teacher: Model | Path | None
    options: HealOptions
    device: str
    work: Work


def open_inputs(model: Path, out: Path, options: HealOptions, device: str, force: bool, stack: ExitStack) -> Inputs:
    """Open everything until ``stack`` closes, and check it.

    Raises:
        ConversionError: something cannot be used.
    """
    state = PartialState()
    if options.attention == "xformers":
        require("xformers", "--attention xformers", "run pip install xformers, or leave it out")
        if not device.startswith("cuda"):
            raise OptionError(f"--attention is xformers, which needs a GPU, but the device is {device}: leave it out.")
    shares(options.batch_size, options.device_batch_size, state.num_processes)
    config, report = _converted(model, options)
    if out.resolve() == model.resolve():
        raise ConversionError(f"OUT is {out}, which is MODEL: give a folder of its own.")
    name, revision = (options.source, None) if options.source else _recorded_source(model, report)
    source = stack.enter_context(open_source(name, revision, options.trust_remote_code, report.rope_scaling))
    check_apart(out, model.iterdir(), "MODEL")
    check_apart(out, source.files(), "MODEL's source")
    _refuse_quantised(model, config, source)
    _check_pair(model, config, source)
    teacher = _teacher(options, source, stack)
    if not state.is_main_process:
        return Inputs(model, config, report, source, teacher, options, str(state.device), joined_work(out))
    decisive = options.model_copy(update={"device": device, **FREE})
    work = stack.enter_context(work_folder(out, force, healing_identity(model, source, decisive)))
    work.check_space(disk_bytes(Checkpoint(model), options.train, options.lora_rank, options.tokens))
    own_device = device if state.num_processes == 1 else str(state.device)
    return Inputs(model, config, report, source, teacher, options, own_device, work)


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


def _teacher(options: HealOptions, source: Source, stack: ExitStack) -> Model | Path | None:
    """The model that ``--teacher`` names, or the folder of its predictions.

    Raises:
        ConversionError: it cannot teach.
    """
    name = options.teacher
    if name is None:
        return _checked_stages(options, source, None)
    if "kl" not in options.losses:
        raise ConversionError(f"--teacher is {name}, but --loss {options.loss} learns from no teacher.")
    stored = is_stored(Path(name))
    if stored and not options.model_fields_set.isdisjoint(OF_STORED):
        raise ConversionError(
            f"--teacher {name} holds predictions on text of its own, at temperature 1: leave out "
            f"{', '.join(map(option_name, OF_STORED))}."
        )
    teacher = Path(name) if stored else find_model(name, stack, options.trust_remote_code)
    folder = teacher if isinstance(teacher, Path) else teacher.path
    if not same_ids(source.tokenizer, load_tokenizer(folder, options.trust_remote_code)):
        raise ConversionError(
            f"--teacher {name} has another tokenizer than {source.name}, so its predictions are of other tokens: "
            "choose a teacher of the same family."
        )
    return _checked_stages(options, source, teacher)


def _checked_stages(options: HealOptions, source: Source, teacher: Model | Path | None) -> Model | Path | None:
    """The teacher, if it can teach what ``--hidden-steps`` asks for."""
    sizes = ("num_hidden_layers", "hidden_size")
    same = not isinstance(teacher, Model) or all(
        getattr(teacher.config, size, None) == getattr(source.config, size) for size in sizes
    )
    if options.hidden_steps and ("kl" not in options.losses or isinstance(teacher, Path) or not same):
        raise ConversionError(
            f"--hidden-steps is {options.hidden_steps}, but no teacher in memory has layers like MODEL's: leave it out."
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
