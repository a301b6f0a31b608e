"""What a conversion lost, on text that it was not calibrated or trained on."""

import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import Progress
from transformers import AutoConfig, AutoModelForCausalLM

import vllm_mla_plugin.hf  # noqa: F401 - registers the MLA models with transformers
from mla_converters.checkpoints.quantised.tensors import dequantised
from mla_converters.checkpoints.reader import Checkpoint
from mla_converters.checkpoints.source import Source
from mla_converters.reports.conversion import Loss
from mla_converters.streaming.whole_model import final_hidden, log_probabilities, output_head

CHUNK = 128  # positions whose logits exist at the same time
NOTHING = -100  # what follows a window's last token; torch leaves it out of losses
HUGE = math.log(1e300)  # of a loss whose perplexity is not finite in a report


def measured_loss(source: Source, folder: Path, windows: torch.Tensor, device: str, progress: Progress) -> Loss | None:
    """Compare a written checkpoint with its source on token ids ``[windows, tokens]``; None without windows.

    Both run through transformers in float32, with one layer in memory at a time.

    Args:
        source: the model that was converted.
        folder: the converted checkpoint, with its ``config.json``.
        windows: token ids that neither calibration nor training has seen.
        device: where layers run.
        progress: gets a bar, with a step for each layer of both.
    """
    if not len(windows):
        return None
    config = AutoConfig.from_pretrained(folder)
    checkpoint = dequantised(Checkpoint(folder), source.quantisation, config)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    layers = 2 * config.num_hidden_layers
    task = progress.add_task("Measuring the loss", total=layers)
    experts, advance = source.family.experts, lambda *_: progress.advance(task)
    hidden = partial(final_hidden, experts=experts, ids=windows, device=device, watch=advance)
    theirs, own = hidden(source.skeleton(), source), hidden(skeleton, checkpoint)
    of_source, of_own = (
        partial(log_probabilities, head=output_head(settings, tensors), config=settings)
        for settings, tensors in ((source.config, source), (config, checkpoint))
    )
    following = windows.long().roll(-1, dims=1)
    following[:, -1] = NOTHING
    kl, agreed, losses = 0.0, 0, torch.zeros(2, dtype=torch.float64)
    for ids, *states in zip(*(each.flatten(0, 1).split(CHUNK) for each in (following, theirs, own)), strict=True):
        expected, got = of_source(states[0][None]), of_own(states[1][None])
        kl += F.kl_div(got, expected, log_target=True, reduction="sum").item()
        agreed += int((got.argmax(-1) == expected.argmax(-1)).sum())
        targets = ids.to(expected.device)
        losses += torch.tensor([F.nll_loss(each, targets, reduction="sum").item() for each in (expected, got)])
    source_loss, own_loss = (losses / (windows.numel() - len(windows))).tolist()
    return Loss(
        tokens=windows.numel(),
        source_perplexity=_perplexity(source_loss),
        perplexity=_perplexity(own_loss),
        kl=round(kl / windows.numel(), 4) + 0.0,  # not the negative zero
        top1_agreement=round(agreed / windows.numel(), 4),
    )


def _perplexity(loss: float) -> float:
    return round(math.exp(min(loss, HUGE)), 3)
