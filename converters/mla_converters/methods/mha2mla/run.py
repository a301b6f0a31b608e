"""Method ``mha2mla`` for a whole model, layer by layer. Pairs are measured if the rule that chooses them needs it."""

import torch

from mla_converters.checkpoints.source import Source
from mla_converters.latent.cache_size import CacheBudget
from mla_converters.latent.maps import LatentMap, mla_weights
from mla_converters.methods.layer_conversion import ConvertedLayer, LayerConversion, measure, with_mean
from mla_converters.methods.mha2mla.map import PairNorms, kept_pairs, latent_bias, mha2mla_map
from mla_converters.options import Mha2mlaOptions
from mla_converters.resume.layer_pass import Streams
from mla_converters.streaming.layers import SourceLayer, embed
from mla_converters.support.devices import calibration_autocast
from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat


@torch.inference_mode()
def pair_contributions(layer: SourceLayer, hidden: torch.Tensor) -> torch.Tensor:
    """Contributions ``[g, d / 2]`` of a layer's pairs, measured on its inputs ``[windows, tokens, D]``."""
    norms = PairNorms(layer.heads, layer.kv_heads, layer.head_dim)
    for batch in hidden.split(1):
        with calibration_autocast(layer.device):
            x = layer.normed(batch)
            q, (k, _) = layer.queries(x), layer.keys_values(x)
        norms.add(q, k)
    return norms.contributions()


def layer_weights(weights: dict[str, torch.Tensor], maps: LatentMap) -> dict[str, torch.Tensor]:
    """Fold a map into one layer's projections by :func:`mla_weights`, and its biases by :func:`latent_bias`."""
    converted = mla_weights(weights, maps)
    if "v_proj.bias" in weights:
        bias = latent_bias(maps, weights["v_proj.bias"])
        converted["kv_a_proj_with_mqa.bias"][: len(bias)] = bias
    return converted


def mha2mla(
    source: Source,
    windows: torch.Tensor | None,
    budget: CacheBudget,
    options: Mha2mlaOptions,
    format: CacheFormat | None = None,
) -> LayerConversion:
    """Prepare the method to convert layers.

    Args:
        source: the model.
        windows: ``[windows, tokens]`` token ids; None if ``options`` need no calibration.
        budget: cache sizes of every layer.
        options: the alternatives that the paper compares.
        format: the packed format of the cache; without windows, one that takes no mean out.

    Raises:
        ConversionError: see :func:`mla_converters.methods.mha2mla.map.check_sizes`.
        ValueError: ``2-norm`` without windows.
    """
    pairs, kv_heads, head_dim = budget.qk_rope_head_dim // 2, source.config.num_key_value_heads, source.head_dim

    def start() -> Streams:
        return {} if windows is None else {"source": embed(source, windows)}

    def convert(layer: SourceLayer, streams: Streams) -> ConvertedLayer:
        weights, hidden = layer.attention_weights, streams.get("source")
        contributions = pair_contributions(layer, hidden) if hidden is not None else None
        kept = kept_pairs(options.rope_keep, pairs, kv_heads, head_dim, contributions)
        k, v = weights["k_proj.weight"], weights["v_proj.weight"]
        maps = mha2mla_map(k, v, layer.freqs, kept, budget.kv_lora_rank, options.svd)
        converted = layer_weights(weights, maps)
        if hidden is None:
            return ConvertedLayer(converted)
        converted, attention = with_mean(layer, converted, format, hidden)
        measured = measure(layer, hidden, maps, layer.moments(hidden).kv, attention)
        layer.advance(hidden, layer.attend)
        return ConvertedLayer(converted, measured)

    return LayerConversion(start, convert)
