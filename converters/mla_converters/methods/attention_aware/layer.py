"""One layer by method ``attention-aware``: its statistics, and the map whose attention output errs least."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from mla_converters.latent.cache_size import CacheBudget
from mla_converters.latent.maps import LatentMap, balanced
from mla_converters.methods.attention_aware.amounts import RANDOM_SHARE
from mla_converters.methods.attention_aware.map import ScoreModel, Weighing, attention_aware_map, score_model
from mla_converters.methods.attention_aware.refit import Refit
from mla_converters.methods.attention_aware.statistics import attention_statistics
from mla_converters.methods.layer_conversion import map_error
from mla_converters.options import Ingredient
from mla_converters.streaming.layers import SourceLayer

ATTENTION_WINDOWS = 4  # of text, whose attention is measured
ERROR_WINDOWS = 1  # of text, on which the candidates of a search are compared
VALUE_WEIGHTS = (0.1, 0.3, 1.0)
ENERGY_WEIGHTS = (0.1, 0.3, 1.0)


@dataclass(frozen=True)
class Settings:
    """How the method is run.

    Attributes:
        refit: steps and rate of the refit of each layer.
        without: ingredients left out.
        seed: of the refit.
    """

    refit: Refit
    without: frozenset[Ingredient]
    seed: int

    @property
    def fits_outputs(self) -> bool:
        """Whether outputs are fitted by least squares. With a refit they are not, because the refit starts worse from
        fitted outputs than from the map itself."""
        return not self.refit.steps and Ingredient.LEAST_SQUARES not in self.without


def layer_model(
    layer: SourceLayer, text: torch.Tensor, random: torch.Tensor, without: frozenset[Ingredient]
) -> ScoreModel:
    """Statistics of a layer on its inputs ``[windows, tokens, D]``, for text and for random tokens."""
    plain = layer.moments(text).kv
    if Ingredient.RANDOM_TOKENS not in without:
        plain = plain.lerp(layer.moments(random).kv, RANDOM_SHARE)
    return score_model(
        attention_statistics(layer, text[:ATTENTION_WINDOWS]),
        plain,
        layer.kv_heads,
        mean_phase=Ingredient.MEAN_PHASE not in without,
        attention_weights=Ingredient.ATTENTION_WEIGHTS not in without,
        metric=Ingredient.METRIC not in without,
    )


def layer_map(layer: SourceLayer, model: ScoreModel, budget: CacheBudget, weighing: Weighing) -> LatentMap:
    """The layer's map for one weighing."""
    maps = attention_aware_map(model, layer.freqs, budget.qk_rope_head_dim, budget.kv_lora_rank, weighing)
    return balanced(maps, model.key_value)


def first_weighing(without: frozenset[Ingredient]) -> Weighing:
    """Where the search begins."""
    return replace(Weighing(), energy=0.0) if Ingredient.JOINT_CHOICE in without else Weighing()


def best_map(
    layer: SourceLayer, text: torch.Tensor, model: ScoreModel, budget: CacheBudget, without: frozenset[Ingredient]
) -> tuple[float, LatentMap]:
    """The layer's map with the weighing whose attention output errs least, and that error; values' weight is searched
    first, then energy's."""
    error_of = layer.comparison(text[:ERROR_WINDOWS])
    tried: dict[Weighing, tuple[float, LatentMap]] = {}

    def best_of(candidates: Iterable[Weighing]) -> Weighing:
        for candidate in candidates:
            if candidate not in tried:
                maps = layer_map(layer, model, budget, candidate)
                tried[candidate] = map_error(error_of, layer, maps), maps
        return min(tried, key=lambda candidate: tried[candidate][0])

    best = best_of([first_weighing(without)])
    if Ingredient.SEARCH not in without:
        best = best_of(replace(best, values=value) for value in VALUE_WEIGHTS)
        if Ingredient.JOINT_CHOICE not in without:
            best = best_of(replace(best, energy=energy) for energy in ENERGY_WEIGHTS)
    return tried[best]
