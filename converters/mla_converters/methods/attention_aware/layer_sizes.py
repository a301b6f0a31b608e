"""Sizes of the cache that differ between layers, under a fixed total."""

import heapq
from itertools import combinations

import torch
from rich.progress import Progress

from mla_converters.checkpoints.source import Source
from mla_converters.latent.cache_size import CacheBudget
from mla_converters.latent.maps import mla_weights
from mla_converters.methods.attention_aware.layer import (
    ATTENTION_WINDOWS,
    ERROR_WINDOWS,
    Settings,
    first_weighing,
    layer_map,
    layer_model,
)
from mla_converters.methods.layer_conversion import map_errors
from mla_converters.resume.layer_pass import Record, Streams
from mla_converters.streaming.layers import embed, logits
from mla_converters.text.calibration import Calibration
from vllm_mla_plugin.checkpoint.layouts import GPUS, gpu_backends

SHARES = (0.5, 0.75, 0.875, 1.125, 1.25, 1.5, 2.0)  # a layer's size, relative to the size if all layers had the same
SENSITIVITY_TOKENS = 512  # tokens at the end of a window whose predictions are compared
GRAIN = 4  # sizes are multiples of this number
MOST_SIZES = 4
"""Sizes that one model has at most, because on a GPU vLLM compiles the layers of each size by themselves, and builds
metadata for each size in every step."""


def scaled_budget(budget: CacheBudget, share: float, width: int) -> CacheBudget | None:
    """``share`` times a budget, split in the same proportion; None if it exceeds ``width = g * d`` keys and values."""
    rope = max(GRAIN, round(budget.qk_rope_head_dim * share / GRAIN) * GRAIN)
    total = round(budget.width * share / GRAIN) * GRAIN
    fits = rope <= width and GRAIN <= total - rope <= 2 * width - rope
    return CacheBudget(total - rope, rope) if fits else None


def candidate_sizes(budget: CacheBudget, width: int, head_dim: int) -> dict[int, CacheBudget]:
    """The sizes that a layer may get, by their numbers per token: the common one, and shares of it.

    A share is left out if a GPU serves the common size but not the share: its heads or its rows may be too wide.

    Args:
        budget: the common size.
        width: keys of the source per token, ``g * d``.
        head_dim: of the source.
    """

    def served_on(size: CacheBudget) -> set[str]:
        layout = (size.kv_lora_rank, size.qk_rope_head_dim)
        return {gpu for gpu in GPUS if gpu_backends(layout, head_dim, "bfloat16", gpu, differ=True)}

    scaled = (scaled_budget(budget, share, width) for share in SHARES)
    fitting = (size for size in scaled if size and served_on(size) >= served_on(budget))
    return {size.width: size for size in fitting} | {budget.width: budget}


def spread(costs: list[dict[int, float]], total: int, most: int) -> list[int]:
    """Choose few sizes whose summed cost is small: the best of what :func:`_spread` gives for every choice of them.

    Args:
        costs: for each layer, its cost at each size; all layers have the same sizes to choose from.
        total: limit on the sum of the sizes.
        most: at most this many different sizes are chosen.

    Returns:
        A size for each layer.
    """
    sizes = sorted(costs[0])
    found = []
    for few in combinations(sizes, min(most, len(sizes))):
        if few[0] * len(costs) <= total:
            chosen = _spread([{size: cost[size] for size in few} for cost in costs], total)
            found.append((sum(cost[size] for cost, size in zip(costs, chosen, strict=True)), chosen))
    return min(found)[1]


def _spread(costs: list[dict[int, float]], total: int) -> list[int]:
    """Choose sizes whose summed cost is small: each step enlarges the layer that saves most per number (greedy)."""

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
    calibration: Calibration,
    budget: CacheBudget,
    settings: Settings,
    device: str,
    progress: Progress,
    record: Record,
) -> list[CacheBudget]:
    """Choose a size for each layer. In total the layers cache at most as much as with ``budget`` in every layer.

    The cost of a layer at some size is the error of its attention at that size, times its sensitivity. The sensitivity
    is the KL divergence of the model's predictions if only that layer is converted, divided by the error of that layer.

    Args:
        source: the model.
        calibration: text and random tokens.
        budget: the sizes that every layer would have if all had the same.
        settings: the method's settings.
        device: the device on which layers run.
        progress: shows the progress.
        record: keeps the state of the measurement, so that an interrupted run can go on.
    """
    count, width = source.config.num_hidden_layers, source.config.num_key_value_heads * source.head_dim
    candidates = candidate_sizes(budget, width, source.head_dim)
    weighing = first_weighing(settings.without)
    sizes = list(candidates)

    def start() -> Streams:
        hidden = embed(source, calibration.some(ATTENTION_WINDOWS).windows)
        alone = hidden[:ERROR_WINDOWS].expand(count, -1, -1, -1).clone()  # row i: only layer i is converted
        return {"hidden": hidden, "alone": alone, "errors": torch.zeros(count, len(sizes), dtype=torch.float64)}

    streams = record.begin(start)
    hidden, alone = streams["hidden"], streams["alone"]
    for layer in record.layers(source, device, progress, "Measuring layers"):
        model = layer_model(layer, hidden[:-1], hidden[-1:], settings.without)
        maps = [layer_map(layer, model, candidates[size], weighing) for size in sizes]
        errors = map_errors(layer, hidden[:ERROR_WINDOWS], [(each, None) for each in maps])
        streams["errors"][layer.index] = torch.tensor(errors, dtype=torch.float64)
        for other in alone[: layer.index]:
            layer.advance(other, layer.attend)
        alone[layer.index] = hidden[:ERROR_WINDOWS]
        here = maps[sizes.index(budget.width)]
        layer.advance(alone[layer.index], layer.converted(mla_weights(layer.attention_weights, here)))
        layer.advance(hidden, layer.attend)
    by_layer = [dict(zip(sizes, row, strict=True)) for row in streams["errors"].tolist()]
    compared = [states[:, -SENSITIVITY_TOKENS:] for states in (hidden[:ERROR_WINDOWS], *alone)]
    predictions = (scores.log_softmax(-1) for scores in logits(source, compared, device))
    expected = next(predictions)
    costs = []
    for got, by_size in zip(predictions, by_layer, strict=True):
        divergence = torch.nn.functional.kl_div(got, expected, log_target=True, reduction="sum").item()
        base = max(by_size[budget.width], 1e-30)  # the error is zero if the budget loses nothing
        costs.append({size: divergence * error / base for size, error in by_size.items()})
    return [candidates[size] for size in spread(costs, budget.width * count, MOST_SIZES)]
