"""Method ``attention-aware`` over a whole model: searching its weights, and converting layer by layer."""

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from rich.progress import Progress

from mla_converters.checkpoints.source import Source
from mla_converters.latent.cache_size import CacheBudget, exact_budget
from mla_converters.latent.maps import LatentMap, balanced, mla_weights
from mla_converters.methods.attention_aware.least_squares import Examples, enough_tokens, fit_output
from mla_converters.methods.attention_aware.map import ScoreModel, Weighing, attention_aware_map, score_model
from mla_converters.methods.attention_aware.refit import Refit, refit_layer
from mla_converters.methods.attention_aware.statistics import attention_statistics
from mla_converters.methods.base import (
    ConvertedLayer,
    LayerConversion,
    Measured,
    energy_kept,
    map_error,
    map_errors,
    measure,
)
from mla_converters.methods.search import search
from mla_converters.resume.layer_pass import Record, Streams
from mla_converters.streaming.layers import SourceLayer, embed

WINDOW = 2048  # tokens in a window: what loses RoPE must be right at long distances too
ATTENTION_WINDOWS = 4  # whose attention is measured
RANDOM_SHARE = 1 / 8  # of random tokens among those that count alike
MIN_RANDOM = 512  # random tokens, where a window has as many
ERROR_WINDOWS = 1  # of the text's, on how many the candidates of a search are compared
MARGIN = 1.3  # of splits, of what is lost over what is kept; healed, 1.26 was better than 1, and 1.42 worse than 1.19
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
    LEAST_SQUARES = "least-squares"
    CONVERTED_INPUTS = "converted-inputs"
    MLP = "mlp"


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


def random_count(tokens: int, window: int = WINDOW) -> int:
    """How many random tokens pass through the layers with so many of text: their share, but enough to tell a layer's
    directions apart, and no more than a window."""
    return min(window, max(MIN_RANDOM, int(RANDOM_SHARE * tokens)))


def fits_outputs(options: AttentionAware) -> bool:
    """Whether outputs are to be fitted by least squares, in the place of a refit: that starts worse from them than from
    the map itself."""
    return not options.refit.steps and Ingredient.LEAST_SQUARES not in options.without


def enough_text(tokens: int, read: int, window: int = WINDOW) -> bool:
    """Whether tokens of text, and the random ones beside them, are enough for least squares of outputs that are
    made of ``read`` numbers."""
    return enough_tokens(tokens + random_count(tokens, window), read)


def too_little_text(read: int) -> str:
    """What a user is told whose text is not :func:`enough_text`."""
    windows = bisect_left(range(read + 1), True, lo=1, key=lambda windows: enough_text(windows * WINDOW, read))
    return (
        "There are too few calibration tokens to fit the output projections, which then stay as they are: give "
        f"--calibration-tokens {windows * WINDOW} or more, and as much text."
    )


def attention_aware(
    source: Source, windows: torch.Tensor, budgets: list[CacheBudget], options: AttentionAware
) -> LayerConversion:
    """The method, ready to convert layers.

    The source's hidden states pass through each layer, whose map is computed on them; and the converted model's, for
    the layer is then fitted on the inputs it will really get, so that what comes out is what the source has there: it
    repairs what earlier layers lost. A map by itself cannot repair, and would adapt to errors of earlier layers if it
    were computed on their results.

    Args:
        source: the model.
        windows: ``[windows, tokens]`` token ids, the last window's random.
        budgets: sizes of each layer.
        options: ingredients.
    """

    tokens = windows[:-1].numel()
    count = random_count(tokens, windows.shape[1])
    read = source.config.num_attention_heads * source.head_dim
    fits = fits_outputs(options) and enough_text(tokens, read, windows.shape[1])

    def start() -> Streams:
        text, random = embed(source, windows[:-1]), embed(source, windows[-1:, :count])
        if not (options.refit.steps or fits):
            return {"text": text, "random": random}
        generator = torch.Generator().manual_seed(options.seed).get_state()
        return {"text": text, "random": random, "converted": text.clone(), "generator": generator}

    def convert(layer: SourceLayer, streams: Streams) -> ConvertedLayer:
        text, random = streams["text"], streams["random"]
        model = layer_model(layer, text, random, options.without)
        error, maps = best_map(layer, text, model, budgets[layer.index], options.without)
        random_inputs = random.clone()
        layer.add_attention(random, layer.attend)
        if "converted" not in streams:
            layer.add_mlp(random)
            layer.advance(text, layer.attend)
            weights = mla_weights(layer.attention_weights, maps)
            return ConvertedLayer(weights, Measured(energy_kept(maps, model.key_value), error))
        converted = streams["converted"]
        if Ingredient.CONVERTED_INPUTS in options.without:
            converted.copy_(text)
        attention = layer.converted(mla_weights(layer.attention_weights, maps))
        layer.add_attention(text, layer.attend)
        lossless = budgets[layer.index] == exact_budget(layer.kv_heads, layer.head_dim)
        if fits and not lossless:
            examples = [Examples(converted, text, 1 - RANDOM_SHARE)]
            if Ingredient.RANDOM_TOKENS not in options.without:
                examples.append(Examples(random_inputs, random, RANDOM_SHARE))
            fit_output(attention, layer, examples, options.seed)
        layer.add_mlp(random)
        # Experts would be read from disk in each step, and held in memory for their gradient.
        through_mlp = bool(options.refit.steps) and Ingredient.MLP not in options.without and not layer.has_experts
        if through_mlp:
            layer.add_mlp(text)
        if options.refit.steps:
            generator = torch.Generator()
            generator.set_state(streams["generator"])
            refit_layer(attention, layer, converted, text, error, options.refit, generator, through_mlp)
            streams["generator"] = generator.get_state()
        measured = measure(layer, converted, maps, model.key_value, attention)
        layer.advance(converted, attention)
        if not through_mlp:
            layer.add_mlp(text)
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
    """The split between rotary key and latent, by the errors of the attention outputs; see :func:`search`."""
    weighing = first_weighing(options.without)

    def errors(layer: SourceLayer, hidden: torch.Tensor) -> list[float]:
        model = layer_model(layer, hidden[:-1], hidden[-1:], options.without)
        maps = (layer_map(layer, model, budget, weighing) for budget in budgets)
        return map_errors(layer, hidden[:ERROR_WINDOWS], maps)

    found = search(source, some_windows(windows), budgets, errors, device, progress, "Searching the split", record)
    return widest_latent(found), found


def widest_latent(errors: dict[CacheBudget, float]) -> CacheBudget:
    """The split with the widest latent of those that lose little more than the best: training makes up for what lost
    RoPE, but not for what a latent has no room for.

    Args:
        errors: of the attention outputs, squared and relative to them, so that what is kept is what 1 is more.
    """
    lost = {split: error / max(1 - error, torch.finfo(torch.float64).tiny) for split, error in errors.items()}
    most = MARGIN * min(lost.values())
    return max((split for split, ratio in lost.items() if ratio <= most), key=lambda split: split.kv_lora_rank)
