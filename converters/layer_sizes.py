"""Sizes of the cache that differ between layers, under a fixed total."""

import heapq
from enum import StrEnum

import torch
from rich.progress import Progress

from mla_converters.attention_aware_run import (
    ATTENTION_WINDOWS,
    ERROR_WINDOWS,
    AttentionAware,
    first_weighing,
    layer_map,
    layer_model,
    map_errors,
)
from mla_converters.budget import CacheBudget
from mla_converters.latent_map import mla_weights
from mla_converters.layers import embed, logits, source_layers
from mla_converters.source import Source

SHARES = (0.5, 0.75, 0.875, 1.125, 1.25, 1.5, 2.0)  # of the size that all would have alike
SENSITIVITY_TOKENS = 512  # at the end of a window, whose predictions are compared
GRAIN = 4  # sizes are multiples of it


class LayerSizes(StrEnum):
    """How the cache is spread over layers."""

    SAME = "same"
    MEASURED = "measured"


def scaled_budget(budget: CacheBudget, share: float, width: int) -> CacheBudget | None:
    """``share`` of a budget, split alike; None if it does not fit ``width = g * d`` keys and as many values."""
    rope = max(GRAIN, round(budget.qk_rope_head_dim * share / GRAIN) * GRAIN)
    total = round(budget.width * share / GRAIN) * GRAIN
    fits = rope <= width and GRAIN <= total - rope <= 2 * width - rope
    return CacheBudget(total - rope, rope) if fits else None


def spread(costs: list[dict[int, float]], total: int) -> list[int]:
    """Sizes of least summed cost: greedily, each step goes where it saves most per number.

    Args:
        costs: for each layer, its cost at each size it can have.
        total: limit on the sum of the sizes.

    Returns:
        A size for each layer.
    """

    def best_step(layer: int) -> tuple[float, int, int] | None:
        now = sizes[layer]
        steps = [((costs[layer][now] - cost) / (size - now), size) for size, cost in costs[layer].items() if size > now]
        return max(((-gain, layer, size) for gain, size in steps), key=lambda step: -step[0], default=None)

    sizes = [min(options) for options in costs]
    left = total - sum(sizes)
    queue = [step for layer in range(len(costs)) if (step := best_step(layer))]
    heapq.heapify(queue)
    while queue:
        gain, layer, size = heapq.heappop(queue)
        if gain >= 0 or size - sizes[layer] > left:
            continue
        left -= size - sizes[layer]
        sizes[layer] = size
        if step := best_step(layer):
            heapq.heappush(queue, step)
    return sizes


def measured_sizes(
    source: Source,
    windows: torch.Tensor,
    budget: CacheBudget,
    options: AttentionAware,
    device: str,
    progress: Progress,
) -> list[CacheBudget]:
    """A size for each layer, the sum at most that of ``budget`` in all.

    A layer's cost at a size is the error of its attention there, times what such an error does to the model's
    predictions: the KL divergence when that layer alone is converted, per error.

    Args:
        source: the model.
        windows: ``[windows, tokens]`` token ids.
        budget: what all layers would have alike.
        options: of the method.
        device: where layers run.
        progress: for the bar.
    """
    count, width = source.config.num_hidden_layers, source.config.num_key_value_heads * source.head_dim
    scaled = (scaled_budget(budget, share, width) for share in SHARES)
    candidates = {candidate.width: candidate for candidate in scaled if candidate} | {budget.width: budget}
    weighing = first_weighing(options.without)
    hidden = embed(source, windows[:ATTENTION_WINDOWS])
    alone: list[torch.Tensor] = []  # hidden states of the model with one layer converted, for each layer so far
    errors: list[dict[int, float]] = []
    for layer in progress.track(source_layers(source, device), total=count, description="Measuring layers"):
        model = layer_model(layer, hidden, options.without)
        maps = {size: layer_map(layer, model, candidate, weighing) for size, candidate in candidates.items()}
        errors.append(dict(zip(maps, map_errors(layer, hidden, maps.values()), strict=True)))
        for other in alone:
            layer.advance(other, layer.attend)
        alone.append(hidden[:ERROR_WINDOWS].clone())
        layer.advance(alone[-1], layer.converted(mla_weights(layer.attention_weights, maps[budget.width])))
        layer.advance(hidden, layer.attend)
    compared = [states[:, -SENSITIVITY_TOKENS:] for states in (hidden[:ERROR_WINDOWS], *alone)]
    predictions = (scores.log_softmax(-1) for scores in logits(source, compared, device))
    expected = next(predictions)
    costs = []
    for got, by_size in zip(predictions, errors, strict=True):
        divergence = torch.nn.functional.kl_div(got, expected, log_target=True, reduction="sum").item()
        base = max(by_size[budget.width], 1e-30)  # zero where the budget loses nothing
        costs.append({size: divergence * error / base for size, error in by_size.items()})
    return [candidates[size] for size in spread(costs, budget.width * count)]
