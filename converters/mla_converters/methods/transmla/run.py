"""Method ``transmla`` for a whole model: it chooses FreqFold, and converts layer by layer."""

import torch
from rich.progress import Progress

from mla_converters.checkpoints.source import Source
from mla_converters.latent.cache_size import CacheBudget
from mla_converters.latent.maps import mla_weights
from mla_converters.methods.layer_conversion import ConvertedLayer, LayerConversion, map_errors, measure, with_mean
from mla_converters.methods.search import search
from mla_converters.methods.transmla.map import freqfold_candidates, joint_map, rotate_keys, transmla_map
from mla_converters.methods.transmla.partial_rope import PartialRope
from mla_converters.resume.layer_pass import Record, Streams
from mla_converters.streaming.layers import SourceLayer, embed
from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat

SEARCH_WINDOWS = 2  # windows from whose moments the candidates are built
ERROR_WINDOWS = 1  # how many of these windows measure the candidates' errors
SOURCE_WINDOWS = 2  # windows that pass through the original model


def search_freqfold(
    source: Source,
    windows: torch.Tensor,
    budget: CacheBudget,
    device: str,
    progress: Progress,
    record: Record,
) -> tuple[int, dict[int, float]]:
    """The FreqFold with the smallest error of the attention outputs, and all errors; see :func:`search`."""
    candidates = freqfold_candidates(source.head_dim, budget.qk_rope_head_dim)
    if len(candidates) == 1:
        return candidates[0], {}
    sizes = budget.kv_lora_rank, budget.qk_rope_head_dim

    def errors(layer: SourceLayer, hidden: torch.Tensor) -> list[float]:
        moments = layer.moments(hidden)
        maps = ((transmla_map(moments, layer.freqs, *sizes, fold), None) for fold in candidates)
        return map_errors(layer, hidden[:ERROR_WINDOWS], maps)

    some, layers = windows[:SEARCH_WINDOWS], range(source.config.num_hidden_layers)
    found = search(source, some, candidates, errors, device, progress, "Searching freqfold", record, layers)
    return min(found, key=found.__getitem__), found


def transmla(
    source: Source, windows: torch.Tensor, budget: CacheBudget, freqfold: int, format: CacheFormat | None = None
) -> LayerConversion:
    """Prepare the method to convert layers.

    As in TransMLA's own code, the rotation of the keys is computed from the hidden states of the original model, and
    the joint PCA from those of the model with partial RoPE (and no low rank). Two streams of hidden states therefore
    pass through each layer. Unlike in that code, only a few windows pass through the original model. They show by how
    much the moments of its keys differ from those with partial RoPE. On SmolLM2 this halves the products of a
    conversion, and changes the converted model's perplexity by at most 0.6%.
    """

    def start() -> Streams:
        hidden = embed(source, windows)
        return {"source": hidden[:SOURCE_WINDOWS].clone(), "partial": hidden}

    def convert(layer: SourceLayer, streams: Streams) -> ConvertedLayer:
        hidden, partial = streams["source"], streams["partial"]
        moments = layer.moments(partial)
        of_source = moments.corrected(layer.moments(partial[: len(hidden)]), layer.moments(hidden))
        rotation = rotate_keys(of_source, budget.qk_rope_head_dim, freqfold)
        layer.advance(hidden, layer.attend)
        maps = joint_map(moments, layer.freqs, rotation, budget.kv_lora_rank)
        weights, attention = with_mean(layer, mla_weights(layer.attention_weights, maps), format, partial)
        measured = measure(layer, partial, maps, moments.kv, attention)
        layer.advance(partial, PartialRope(layer, rotation))
        return ConvertedLayer(weights, measured)

    return LayerConversion(start, convert)
