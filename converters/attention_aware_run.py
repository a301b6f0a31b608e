"""Method ``attention-aware`` over a whole model: searching its weights, and converting layer by layer."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from rich.progress import Progress

from mla_converters.budget import CacheBudget
from mla_converters.latent_map import LatentMap, balanced, mla_weights
from mla_converters.layer_conversion import ConvertedLayer, LayerConversion, Measured, energy_kept, measure
from mla_converters.layers import SourceLayer, embed
from mla_converters.methods.attention_aware import ScoreModel, Weighing, attention_aware_map, score_model
from mla_converters.methods.attention_statistics import attention_statistics
from mla_converters.record import Record, Streams
from mla_converters.refit import Refit, refit_layer
from mla_converters.search import search
from mla_converters.source import Source

WINDOW = 2048  # tokens in a window: what loses RoPE must be right at long distances too
ATTENTION_WINDOWS = 4  # whose attention is measured
RANDOM_SHARE = 1 / 8  # of random tokens among those that count alike
ERROR_WINDOWS = 1  # of the text's, on how many the candidates of a search are compared
VALUE_WEIGHTS = (0.1, 0.3, 1.0)
ENERGY_WEIGHTS = (0.1, 0.3, 1.0)


class Ingredient(StrEnum):
    """Parts of the method that can be left out, to see what each buys."""

    MEAN_PHASE = "mean-phase"
    ATTENTION_WEIGHTS = "attention-weights"
    METRIC = "metric"
    RANDOM_TOKENS = "random-tokens"
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


def some_windows(windows: torch.Tensor) -> torch.Tensor:
    """As many windows of text as attention is measured on, and the one of random tokens, which is the last."""
    return torch.cat((windows[:-1][:ATTENTION_WINDOWS], windows[-1:]))


def layer_model(layer: SourceLayer, hidden: torch.Tensor, without: frozenset[Ingredient]) -> ScoreModel:
    """Statistics of a layer on its inputs ``[windows, tokens, D]``, the last window's of random tokens."""
    text, random = hidden[:-1], hidden[-1:]
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


def map_errors(layer: SourceLayer, hidden: torch.Tensor, maps: Iterable[LatentMap]) -> list[float]:
    """Relative squared errors of the attention's output with each map, on a few of ``[windows, tokens, D]`` inputs."""
    attentions = (layer.converted(mla_weights(layer.attention_weights, candidate)) for candidate in maps)
    return layer.errors(hidden[:ERROR_WINDOWS], attentions)


def first_weighing(without: frozenset[Ingredient]) -> Weighing:
    """Where the search begins."""
    return replace(Weighing(), energy=0.0) if Ingredient.JOINT_CHOICE in without else Weighing()


def best_map(
    layer: SourceLayer, hidden: torch.Tensor, model: ScoreModel, budget: CacheBudget, without: frozenset[Ingredient]
) -> tuple[float, LatentMap]:
    """The layer's map with the weighing whose attention output errs least, and that error; values' weight is searched
    first, then energy's."""
    start = first_weighing(without)
    tried: dict[Weighing, tuple[float, LatentMap]] = {}

    def best_of(candidates: list[Weighing]) -> Weighing:
        new = [candidate for candidate in candidates if candidate not in tried]
        maps = [layer_map(layer, model, budget, candidate) for candidate in new]
        tried.update(zip(new, zip(map_errors(layer, hidden, maps), maps, strict=True), strict=True))
        return min(tried, key=lambda candidate: tried[candidate][0])

    values = () if Ingredient.SEARCH in without else VALUE_WEIGHTS
    best = best_of([start, *(replace(start, values=value) for value in values)])
    if not {Ingredient.SEARCH, Ingredient.JOINT_CHOICE} & without:
        best = best_of([replace(best, energy=energy) for energy in ENERGY_WEIGHTS])
    return tried[best]


def attention_aware(
    source: Source, windows: torch.Tensor, budgets: list[CacheBudget], options: AttentionAware
) -> LayerConversion:
    """The method, ready to convert layers.

    The source's hidden states pass through each layer, which is converted on them; and with a refit, the converted
    model's too. The layer is then refitted on the inputs it will really get, so that what comes out is what the source
    has there: it repairs what earlier layers lost. The closed form by itself cannot repair, and adapts to errors of
    earlier layers if it is computed on their results.

    Args:
        source: the model.
        windows: ``[windows, tokens]`` token ids, the last window's random.
        budgets: sizes of each layer.
        options: ingredients.
    """

    def start() -> Streams:
        hidden = embed(source, windows)
        if not options.refit.steps:
            return {"source": hidden}
        generator = torch.Generator().manual_seed(options.seed).get_state()
        return {"source": hidden, "converted": hidden[:-1].clone(), "generator": generator}

    def convert(layer: SourceLayer, streams: Streams) -> ConvertedLayer:
        hidden = streams["source"]
        model = layer_model(layer, hidden, options.without)
        error, maps = best_map(layer, hidden, model, budgets[layer.index], options.without)
        attention = layer.converted(mla_weights(layer.attention_weights, maps))
        if "converted" not in streams:
            layer.advance(hidden, layer.attend)
            return ConvertedLayer(attention.weights(), Measured(energy_kept(maps, model.key_value), error))
        converted = streams["converted"]
        if Ingredient.CONVERTED_INPUTS in options.without:
            converted.copy_(hidden[:-1])
        layer.add_attention(hidden, layer.attend)
        generator = torch.Generator()
        generator.set_state(streams["generator"])
        refit_layer(attention, layer, converted, hidden[:-1], options.refit, generator)
        streams["generator"] = generator.get_state()
        measured = measure(layer, converted, maps, model.key_value, attention)
        layer.advance(converted, attention)
        layer.add_mlp(hidden)
        return ConvertedLayer(attention.weights(), measured)

    return LayerConversion(start, convert)


def search_split(
    source: Source,
    windows: torch.Tensor,
    budgets: list[CacheBudget],
    options: AttentionAware,
    device: str,
    progress: Progress,
    record: Record,
) -> tuple[CacheBudget, dict[CacheBudget, float]]:
    """The split between rotary key and latent with the smallest error of the attention outputs; see :func:`search`."""
    weighing = first_weighing(options.without)

    def errors(layer: SourceLayer, hidden: torch.Tensor) -> list[float]:
        model = layer_model(layer, hidden, options.without)
        return map_errors(layer, hidden, (layer_map(layer, model, budget, weighing) for budget in budgets))

    return search(source, some_windows(windows), budgets, errors, device, progress, "Searching the split", record)
