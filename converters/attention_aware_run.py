"""Method ``attention-aware`` over a whole model: searching its weights, and converting layer by layer."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from rich.progress import Progress

from mla_converters.budget import CacheBudget
from mla_converters.latent_map import LatentMap, balanced, mla_weights
from mla_converters.layers import SourceLayer, embed, source_layers
from mla_converters.methods.attention_aware import ScoreModel, Weighing, attention_aware_map, score_model
from mla_converters.methods.attention_statistics import attention_statistics
from mla_converters.refit import Refit, refit_layer
from mla_converters.source import Source

WINDOW = 2048  # tokens in a window: what loses RoPE must be right at long distances too
ATTENTION_WINDOWS = 4  # whose attention is measured
ERROR_WINDOWS = 1  # of these, on how many the candidates of a search are compared
VALUE_WEIGHTS = (0.1, 0.3, 1.0)
ENERGY_WEIGHTS = (0.1, 0.3, 1.0)


class Ingredient(StrEnum):
    """Parts of the method that can be left out, to see what each buys."""

    MEAN_PHASE = "mean-phase"
    ATTENTION_WEIGHTS = "attention-weights"
    METRIC = "metric"
    JOINT_CHOICE = "joint-choice"
    SEARCH = "search"
    CONVERTED_INPUTS = "converted-inputs"


@dataclass(frozen=True)
class AttentionAware:
    """How the method is run.

    Attributes:
        refit: steps and rate of the refit of each layer.
        without: ingredients left out.
        seed: of the refit.
    """

    refit: Refit
    without: frozenset[Ingredient]
    seed: int


def layer_model(layer: SourceLayer, hidden: torch.Tensor, without: frozenset[Ingredient]) -> ScoreModel:
    """Statistics of a layer on its inputs ``[windows, tokens, D]``."""
    return score_model(
        attention_statistics(layer, hidden[:ATTENTION_WINDOWS]),
        layer.moments(hidden).kv,
        layer.kv_heads,
        mean_phase=Ingredient.MEAN_PHASE not in without,
        attention_weights=Ingredient.ATTENTION_WEIGHTS not in without,
        metric=Ingredient.METRIC not in without,
    )


def best_map(
    layer: SourceLayer, hidden: torch.Tensor, model: ScoreModel, budget: CacheBudget, without: frozenset[Ingredient]
) -> tuple[LatentMap, float]:
    """The layer's map with the weighing whose attention output errs least, and that error."""
    weights = layer.attention_weights()

    def attempt(weighing: Weighing) -> tuple[float, LatentMap, Weighing]:
        maps = attention_aware_map(model, layer.freqs, budget.qk_rope_head_dim, budget.kv_lora_rank, weighing)
        maps = balanced(maps, model.key_value)
        (error,) = layer.errors(hidden[:ERROR_WINDOWS], [layer.converted(mla_weights(weights, maps))])
        return error, maps, weighing

    start = Weighing()
    if Ingredient.JOINT_CHOICE in without:
        start = replace(start, energy=0.0)
    best = attempt(start)
    if Ingredient.SEARCH not in without:
        values = [attempt(replace(start, values=value)) for value in VALUE_WEIGHTS if value != start.values]
        best = min([best, *values], key=lambda tried: tried[0])
        if Ingredient.JOINT_CHOICE not in without:
            energies = [attempt(replace(best[2], energy=e)) for e in ENERGY_WEIGHTS if e != start.energy]
            best = min([best, *energies], key=lambda tried: tried[0])
    return best[1], best[0]


def attention_aware_layers(
    source: Source, windows: torch.Tensor, budgets: list[CacheBudget], options: AttentionAware, device: str
) -> Iterator[dict[str, torch.Tensor]]:
    """Every layer's converted projections.

    Two streams of hidden states pass through each layer: the source's, and the converted model's. A layer is
    computed from the inputs it will really get, and refitted so that what comes out is what the source has there:
    it repairs what earlier layers lost.

    Args:
        source: the model.
        windows: ``[windows, tokens]`` token ids.
        budgets: sizes of each layer.
        options: ingredients.
        device: where layers run.
    """
    generator = torch.Generator().manual_seed(options.seed)
    hidden = embed(source, windows)
    converted_hidden = hidden.clone()
    for layer, budget in zip(source_layers(source, device), budgets, strict=True):
        if Ingredient.CONVERTED_INPUTS in options.without:
            converted_hidden = hidden.clone()
        model = layer_model(layer, converted_hidden, options.without)
        maps, _ = best_map(layer, converted_hidden, model, budget, options.without)
        attention = layer.converted(mla_weights(layer.attention_weights(), maps))
        layer.add_attention(hidden, layer.attend)
        if options.refit.steps:
            refit_layer(attention, layer, converted_hidden, hidden, options.refit, generator)
        yield attention.weights()
        layer.add_attention(converted_hidden, attention)
        layer.add_mlp(converted_hidden)
        layer.add_mlp(hidden)


def search_split(
    source: Source,
    windows: torch.Tensor,
    budgets: list[CacheBudget],
    options: AttentionAware,
    device: str,
    progress: Progress,
) -> tuple[CacheBudget, dict[CacheBudget, float]]:
    """The split between rotary key and latent with the smallest error of the attention outputs, summed over layers.

    Returns:
        The winner, and every candidate's mean relative squared error.
    """
    errors = dict.fromkeys(budgets, 0.0)
    hidden = embed(source, windows[:ATTENTION_WINDOWS])
    count = source.config.num_hidden_layers
    without = options.without | {Ingredient.SEARCH}
    for layer in progress.track(source_layers(source, device), total=count, description="Searching the split"):
        model = layer_model(layer, hidden, without)
        for budget in budgets:
            errors[budget] += best_map(layer, hidden, model, budget, without)[1] / count
        layer.advance(hidden, layer.attend)
    return min(errors, key=errors.__getitem__), errors
