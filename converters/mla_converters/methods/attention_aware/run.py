"""Method ``attention-aware`` for a whole model, layer by layer."""

import torch

from mla_converters.checkpoints.source import Source
from mla_converters.latent.cache_size import CacheBudget, exact_budget
from mla_converters.latent.maps import mla_weights
from mla_converters.methods.attention_aware.amounts import RANDOM_SHARE, enough_text, random_count
from mla_converters.methods.attention_aware.layer import Settings, best_map, layer_model
from mla_converters.methods.attention_aware.least_squares import Examples, fit_output
from mla_converters.methods.attention_aware.refit import refit_layer
from mla_converters.methods.layer_conversion import (
    MEAN_WINDOWS,
    ConvertedLayer,
    LayerConversion,
    Measured,
    energy_kept,
    measure,
    with_mean,
)
from mla_converters.options import Ingredient
from mla_converters.resume.layer_pass import Streams
from mla_converters.streaming.layers import SourceLayer, embed
from mla_converters.text.calibration import Calibration


def attention_aware(
    source: Source, calibration: Calibration, budgets: list[CacheBudget], settings: Settings
) -> LayerConversion:
    """Prepare the method to convert layers.

    Two kinds of hidden states pass through each layer:

    - Those of the source. The layer's map is computed on them. A map cannot repair losses of earlier layers; computed
      on the converted model's hidden states, it would adapt to the errors in them.
    - Those of the converted model. The layer is then fitted on them, because they are the inputs that it will really
      get. The target is the source's hidden state, so the fit repairs losses of earlier layers.

    Args:
        source: the model.
        calibration: text and random tokens.
        budgets: cache sizes of each layer.
        settings: refit, ingredients and seed.
    """

    tokens, window = calibration.text.numel(), calibration.text.shape[1]
    count = random_count(tokens, window)
    read = source.config.num_attention_heads * source.head_dim
    # Least squares find no projection whose output passes a norm before it is added.
    plain = source.family.norms.after_attention is None
    fits = plain and settings.fits_outputs and enough_text(tokens, read, window)

    def start() -> Streams:
        text, random = embed(source, calibration.text), embed(source, calibration.random[:, :count])
        if not (settings.refit.steps or fits):
            return {"text": text, "random": random}
        generator = torch.Generator().manual_seed(settings.seed).get_state()
        return {"text": text, "random": random, "converted": text.clone(), "generator": generator}

    def convert(layer: SourceLayer, streams: Streams) -> ConvertedLayer:
        text, random = streams["text"], streams["random"]
        model = layer_model(layer, text, random, settings.without)
        error, maps = best_map(layer, text, model, budgets[layer.index], settings)
        weights, attention = with_mean(layer, mla_weights(layer.attention_weights, maps), settings.cache_format, text)
        random_inputs = random.clone()
        layer.add_attention(random, layer.attend)
        if "converted" not in streams:
            layer.add_mlp(random)
            layer.advance(text, layer.attend)
            return ConvertedLayer(weights, Measured(energy_kept(maps, model.key_value), error))
        converted = streams["converted"]
        if Ingredient.CONVERTED_INPUTS in settings.without:
            converted.copy_(text)
        layer.add_attention(text, layer.attend)
        whole = budgets[layer.index] == exact_budget(layer.kv_heads, layer.head_dim)
        lossless = whole and settings.cache_format is None
        read = []
        if fits and not lossless:
            examples = [Examples(converted, text, 1 - RANDOM_SHARE)]
            if Ingredient.RANDOM_TOKENS not in settings.without:
                examples.append(Examples(random_inputs, random, RANDOM_SHARE))
            read, *_ = fit_output(attention, layer, examples, settings.seed)
        layer.add_mlp(random)
        # A refit through experts would read them from disk in each step, and hold them in memory for the gradient.
        through_mlp = bool(settings.refit.steps) and Ingredient.MLP not in settings.without and not layer.has_experts
        if through_mlp:
            layer.add_mlp(text)
        if settings.refit.steps:
            generator = torch.Generator()
            generator.set_state(streams["generator"])
            refit_layer(attention, layer, converted, text, error, settings.refit, generator, through_mlp)
            streams["generator"] = generator.get_state()
            attention.measure_mean(layer.normed(converted[:MEAN_WINDOWS]))
        measured = measure(layer, converted, maps, model.key_value, attention)
        if read:
            layer.add_projected(converted, read, attention.o_proj)
            layer.add_mlp(converted)
        else:
            layer.advance(converted, attention)
        if not through_mlp:
            layer.add_mlp(text)
        return ConvertedLayer(attention.weights(), measured)

    return LayerConversion(start, convert)
