"""The proof of a converted checkpoint: it computes what its report says, before it gets its name."""

import math
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import vllm_mla_plugin.hf  # noqa: F401 - registers the MLA models with transformers
from mla_converters.cards.describe import describe_model
from mla_converters.checkpoints.quantised.tensors import dequantised
from mla_converters.checkpoints.reader import Checkpoint
from mla_converters.checkpoints.rope_scaling import context_length
from mla_converters.checkpoints.side_files import has_tokenizer
from mla_converters.checkpoints.source import Source
from mla_converters.errors import ConversionError
from mla_converters.reports.conversion import ConversionReport, SelfCheck
from mla_converters.streaming.loss import measured_loss
from mla_converters.streaming.whole_model import Tensors, final_hidden, log_probabilities, output_head
from mla_converters.support.json_files import write_json
from vllm_mla_plugin.checkpoint.families import ExpertNames

TOKENS = 192  # of the probe; enough to meet long and short distances, and few enough to be read in no time
LOSSLESS_ERROR = 1e-3  # of a layer's attention output, relative and squared; rounding to bfloat16 leaves 1e-5
LOSSLESS_KL = 0.01  # nats per token that rounding may leave
# A layer may err by this many times its measured error and this much besides, because the probe is another text than
# the calibration's: on SmolLM2 at half its cache, calibrated on a licence, one layer errs by 0.61 where 0.05 was
# measured, and the median layer by 0.23 where 0.03 was. A wrong RoPE or lost biases err by about 1 in most layers.
LAYER_BOUND = (8.0, 2.0)
MEDIAN_BOUND = (8.0, 0.5)
NEGLIGIBLE = 1e-8  # of the input's squared size: what a layer adds below this, no prediction depends on
TINY = 1e-30  # so that nothing is divided by zero
CHANCE = 0.5  # of the vocabulary's size: a perplexity above this share is no better than guessing
PROBE = """\
The lighthouse stood at the end of a narrow path, and for most of the year nobody walked there. In winter the waves
reached the lower windows; in summer the grass grew as high as the door. The keeper wrote down the weather every
morning, the ships that passed, and the hours in which the lamp had burned. When the lamp was replaced by an electric
one, the letters he sent to the town became shorter, and in the end they held nothing but the date and his name. Years
later a student found the books in the cellar of the town hall. She counted the ships, compared them with the records
of three harbours, and showed that the keeper had missed only four vessels in twenty-six years. Two of them had passed
in fog. The other two, as far as anybody knows, had never existed.
"""


def prove_and_describe(
    source: Source,
    folder: Path,
    config: dict[str, Any],
    report: ConversionReport,
    held_out: torch.Tensor | None,
    device: str,
    progress: Progress,
) -> ConversionReport:
    """Prove a checkpoint whose weights are written, measure its loss, and write the files that describe it.

    Args:
        source: the model that was converted.
        folder: the checkpoint.
        config: its ``config.json``.
        report: of the conversion.
        held_out: ``[windows, tokens]``, text to measure the loss on; None for a method without text.
        device: where layers run.
        progress: gets a bar.

    Returns:
        The report with the numbers of the proof and the loss.

    Raises:
        ConversionError: see :func:`prove`.
    """
    write_json(folder / "config.json", config)
    check = prove(source, folder, report, device)
    warnings = [*report.warnings, *chance_warning(check, source.config.vocab_size)]
    loss = None if held_out is None else measured_loss(source, folder, held_out, device, progress)
    found = {"self_check": check, "loss": loss, "warnings": list(dict.fromkeys(warnings))}
    report = report.model_copy(update=found)
    describe_model(folder, config, report)
    return report


def prove(source: Source, folder: Path, report: ConversionReport, device: str) -> SelfCheck:
    """Run a short text through the source and through the converted checkpoint, with transformers.

    One layer of each is in memory at a time. Every attention of the converted model is compared with the source's on
    the same inputs, and the two models' predictions with each other.

    Args:
        source: the model that was converted.
        folder: the converted checkpoint, with its ``config.json``.
        report: of the conversion; the layers' measured errors bound those found here.
        device: where layers run.

    Raises:
        ConversionError: the converted model does not compute what the report says.
    """
    config = AutoConfig.from_pretrained(folder)
    checkpoint = dequantised(Checkpoint(folder), source.quantisation, config)
    ids, is_text = _probe(source, context_length(config))
    experts = source.family.experts
    seen: dict[int, tuple[dict[str, Any], torch.Tensor]] = {}
    errors: list[float] = []

    def keep(index: int, attention: nn.Module, given: dict[str, Any], output: torch.Tensor) -> None:
        seen[index] = given, output

    def compare(index: int, attention: nn.Module, given: dict[str, Any], output: torch.Tensor) -> None:
        theirs, expected = seen.pop(index, ({}, None))
        if expected is None:  # the comparison's own call
            return
        got = attention(**given | {"hidden_states": theirs["hidden_states"]})[0].float()
        # A dead layer's output is zero, and so its error is taken relative to a little of its input.
        least = NEGLIGIBLE * theirs["hidden_states"].square().sum() + TINY
        errors.append(((got - expected).square().sum() / expected.square().sum().clamp(min=least)).item())

    try:
        reference = _predictions(source.skeleton(), source, experts, ids, device, keep)
    except torch.OutOfMemoryError:  # a RuntimeError too, but nothing is wrong with the model
        raise
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        # transformers finds only now that parts of the configuration do not fit each other.
        reason = str(error).strip().split("\n")[0]
        raise ConversionError(f"transformers cannot run {source.name}: {reason}: its config.json is wrong.") from error
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    try:
        own = _predictions(skeleton, checkpoint, experts, ids, device, compare)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ConversionError(
            f"transformers cannot run what was converted from {source.name}: {reason} Please report this as a bug, "
            "with the source's config.json."
        ) from error
    check = SelfCheck(
        tokens=ids.shape[1],
        text=is_text,
        source_perplexity=round(_perplexity(reference, ids), 3),
        perplexity=round(_perplexity(own, ids), 3),
        kl=_rounded(F.kl_div(own, reference, log_target=True, reduction="sum").item() / ids.shape[1]),
        top1_agreement=_rounded((own.argmax(-1) == reference.argmax(-1)).double().mean().item()),
        worst_layer_error=_rounded(max(errors)),
    )
    _judge(source, report, check, errors)
    return check


def _rounded(value: float) -> float:
    """To a digit that the order of a sum does not change, so that the same conversion has the same bytes."""
    return round(value, 4) + 0.0  # not the negative zero


def _probe(source: Source, context: int) -> tuple[torch.Tensor, bool]:
    """Token ids ``[1, tokens]`` within the converted model's context, and whether they are text.

    A source without tokenizer gets every n-th of its ids.
    """
    longest = min(TOKENS, context)
    if has_tokenizer(source.folder):
        ids = source.tokenizer(PROBE, return_tensors="pt").input_ids[:, :longest]
        if ids.shape[1] > 1 and int(ids.max()) < source.config.vocab_size:
            return ids, True
    steps = torch.arange(longest) * 7919 % source.config.vocab_size
    return steps[None], False


def _predictions(
    model: PreTrainedModel, tensors: Tensors, experts: ExpertNames | None, ids: torch.Tensor, device: str, watch: Any
) -> torch.Tensor:
    """Log-probabilities ``[tokens, vocabulary]`` float32."""
    hidden = final_hidden(model, tensors, experts, ids, device, watch)
    return log_probabilities(hidden, output_head(model.config, tensors), model.config).cpu()


def _perplexity(predictions: torch.Tensor, ids: torch.Tensor) -> float:
    loss = -predictions[:-1].gather(1, ids[0, 1:, None]).mean().item()
    return math.exp(loss) if loss < math.log(1e300) else math.inf


def _judge(source: Source, report: ConversionReport, check: SelfCheck, errors: list[float]) -> None:
    """Refuse a checkpoint that does not compute what its report says."""
    numbers = (check.source_perplexity, check.perplexity, check.kl, *errors)
    if not all(map(math.isfinite, numbers)):
        raise ConversionError(
            f"The converted model gives numbers that are not finite on a short text: the weights of {source.name} are "
            "broken, or overflow in this --dtype."
        )
    for where, error, bound in _bounded(report, errors):
        if error > bound:
            raise ConversionError(
                f"The converted model does not compute what it should: the attention of {where} differs from the "
                f"source's by {error:.2g} (squared, relative), where at most {bound:.2g} was expected. Please report "
                f"this as a bug, with config.json of {source.name}."
            )
    if report.lossless and check.kl > LOSSLESS_KL:
        raise ConversionError(
            f"The converted model should predict what {source.name} predicts, but differs by {check.kl:.2g} nats per "
            "token. Please report this as a bug, with the source's config.json."
        )


def _bounded(report: ConversionReport, errors: list[float]) -> list[tuple[str, float, float]]:
    """Errors with their bounds, and where they are; none without measures, or after training."""
    if report.lossless:
        return [(f"layer {layer}", error, LOSSLESS_ERROR) for layer, error in enumerate(errors)]
    if report.per_layer is None or report.healing is not None:
        return []
    measured = [layer.output_error for layer in report.per_layer]
    factor, margin = LAYER_BOUND
    bounded = [
        (f"layer {layer}", error, factor * before + margin)
        for layer, (error, before) in enumerate(zip(errors, measured, strict=True))
    ]
    factor, margin = MEDIAN_BOUND
    return [*bounded, ("the median layer", median(errors), factor * median(measured) + margin)]


def chance_warning(check: SelfCheck, vocabulary: int) -> list[str]:
    """A warning where the source itself predicts no better than by guessing; else nothing."""
    if not check.text or check.source_perplexity < CHANCE * vocabulary:
        return []
    return [
        f"The source predicts plain English no better than by guessing (perplexity {check.source_perplexity:,.0f} of a "
        f"vocabulary of {vocabulary:,}): its weights may be random or broken, or its tokenizer another model's."
    ]
