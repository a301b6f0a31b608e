"""Method ``attention-aware`` for one layer: its statistics, and the map with the smallest error of its output."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from mla_converters.latent.cache_size import CacheBudget
from mla_converters.latent.maps import LatentMap, balanced, mla_weights
from mla_converters.methods.attention_aware.amounts import RANDOM_SHARE
from mla_converters.methods.attention_aware.map import ScoreModel, Weighing, attention_aware_map, score_model
from mla_converters.methods.attention_aware.noise import suited_to_packing
from mla_converters.methods.attention_aware.refit import Refit
from mla_converters.methods.attention_aware.statistics import attention_statistics
from mla_converters.options import Ingredient
from mla_converters.streaming.layers import SourceLayer
from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat

ATTENTION_WINDOWS = 4  # windows of text whose attention is measured
ERROR_WINDOWS = 1  # windows of text on which the candidates of a search are compared
VALUE_WEIGHTS = (0.1, 0.3, 1.0)
ENERGY_WEIGHTS = (0.1, 0.3, 1.0)


@dataclass(frozen=True)
class Settings:
    """Settings of the method.

    Attributes:
        refit: steps and rate of the refit of each layer.
        without: the ingredients to leave out.
        seed: the seed of the refit.
        cache_format: the packed format of the cache; None if nothing is rounded.
    """

    refit: Refit
    without: frozenset[Ingredient]
    seed: int
    cache_format: CacheFormat | None = None

    @property
    def fits_outputs(self) -> bool:
        """Whether outputs are fitted by least squares.

        With a refit they are not, because a refit that starts from fitted outputs ends worse than one that starts from
        the map itself.
        """
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
        layer.moments(text[:ATTENTION_WINDOWS], first=1).covariance,
        layer.kv_heads,
        mean_phase=Ingredient.MEAN_PHASE not in without,
        attention_weights=Ingredient.ATTENTION_WEIGHTS not in without,
        metric=Ingredient.METRIC not in without,
    )


def layer_map(
    layer: SourceLayer, model: ScoreModel, budget: CacheBudget, weighing: Weighing, packed: bool = False
) -> LatentMap:
    """The layer's map for one weighing, with components scaled for a cache that rounds them (``packed``) or not."""
    maps = attention_aware_map(model, layer.freqs, budget.qk_rope_head_dim, budget.kv_lora_rank, weighing)
    return suited_to_packing(maps, model) if packed else balanced(maps, model.key_value)


def first_weighing(without: frozenset[Ingredient]) -> Weighing:
    """The weighing with which the search begins."""
    return replace(Weighing(), energy=0.0) if Ingredient.JOINT_CHOICE in without else Weighing()


def best_map(
    layer: SourceLayer, text: torch.Tensor, model: ScoreModel, budget: CacheBudget, settings: Settings
) -> tuple[float, LatentMap]:
    """The map whose weighing gives the smallest error of the layer's attention output, and that error.

    The search tries the weights of values first, then the weights of energy.
    """
    compared, without = text[:ERROR_WINDOWS], settings.without
    error_of = layer.comparison(compared)
    tried: dict[Weighing, tuple[float, LatentMap]] = {}

    def best_of(candidates: Iterable[Weighing]) -> Weighing:
        for candidate in candidates:
            if candidate not in tried:
                maps = layer_map(layer, model, budget, candidate, packed=settings.cache_format is not None)
                weights = mla_weights(layer.attention_weights, maps)
                tried[candidate] = error_of(layer.converted(weights, settings.cache_format, compared)), maps
        return min(tried, key=lambda candidate: tried[candidate][0])

    best = best_of([first_weighing(without)])
    if Ingredient.SEARCH not in without:
        best = best_of(replace(best, values=value) for value in VALUE_WEIGHTS)
        if Ingredient.JOINT_CHOICE not in without:
            best = best_of(replace(best, energy=energy) for energy in ENERGY_WEIGHTS)
    return tried[best]
