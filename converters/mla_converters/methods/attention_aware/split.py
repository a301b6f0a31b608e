"""The search for the split of the cache between rotary key and latent, by the errors of the attention outputs."""

import torch
from rich.progress import Progress

from mla_converters.checkpoints.source import Source
from mla_converters.latent.cache_size import CacheBudget
from mla_converters.methods.attention_aware.layer import (
    ATTENTION_WINDOWS,
    ERROR_WINDOWS,
    Settings,
    first_weighing,
    layer_map,
    layer_model,
)
from mla_converters.methods.layer_conversion import map_errors
from mla_converters.methods.search import sampled_layers, search
from mla_converters.resume.layer_pass import Record
from mla_converters.streaming.layers import SourceLayer
from mla_converters.text.calibration import Calibration

# A candidate may lose this many times as much as the best. After healing, a candidate at 1.26 times the best loss was
# better than the best itself, and one at 1.42 times was worse than one at 1.19 times.
MARGIN = 1.3


def search_split(
    source: Source,
    calibration: Calibration,
    budgets: list[CacheBudget],
    settings: Settings,
    device: str,
    progress: Progress,
    record: Record,
) -> tuple[CacheBudget, dict[CacheBudget, float]]:
    """The chosen split between rotary key and latent, and the error of every candidate; see :func:`search`."""
    weighing = first_weighing(settings.without)

    def errors(layer: SourceLayer, hidden: torch.Tensor) -> list[float]:
        model = layer_model(layer, hidden[:-1], hidden[-1:], settings.without)
        maps = ((layer_map(layer, model, budget, weighing), None) for budget in budgets)
        return map_errors(layer, hidden[:ERROR_WINDOWS], maps)

    windows = calibration.some(ATTENTION_WINDOWS).windows
    layers = sampled_layers(source)
    found = search(source, windows, budgets, errors, device, progress, "Searching the split", record, layers)
    return widest_latent(found), found


def widest_latent(errors: dict[CacheBudget, float]) -> CacheBudget:
    """The split with the widest latent among those that lose at most :data:`MARGIN` times as much as the best.

    A wide latent is better because training can repair the loss of RoPE, but cannot restore directions that did not fit
    into the latent.

    Args:
        errors: relative squared errors of the attention outputs, in [0, 1): ``1 - error`` of the output survives.
            Candidates are ranked by ``error / (1 - error)``.
    """
    lost = {split: error / max(1 - error, torch.finfo(torch.float64).tiny) for split, error in errors.items()}
    most = MARGIN * min(lost.values())
    return max((split for split, ratio in lost.items() if ratio <= most), key=lambda split: split.kv_lora_rank)
