"""Method ``transmla`` over a whole model: choosing FreqFold, and converting layer by layer."""

import torch
from rich.progress import Progress

from mla_converters.budget import CacheBudget
from mla_converters.latent_map import mla_weights
from mla_converters.layer_conversion import ConvertedLayer, LayerConversion, map_errors, measure
from mla_converters.layers import SourceLayer, embed
from mla_converters.methods.transmla import freqfold_candidates, joint_map, rotate_keys, transmla_map
from mla_converters.record import Record, Streams
from mla_converters.search import search
from mla_converters.source import Source

SEARCH_WINDOWS = 4  # whose moments the candidates are built from
ERROR_WINDOWS = 2  # of these, on how many their errors are measured


def search_freqfold(
    source: Source,
    windows: torch.Tensor,
    budget: CacheBudget,
    device: str,
    progress: Progress,
    record: Record,
) -> tuple[int, dict[int, float]]:
    """The FreqFold with the smallest error of the attention outputs; see :func:`search`."""
    candidates = freqfold_candidates(source.head_dim, budget.qk_rope_head_dim)
    if len(candidates) == 1:
        return candidates[0], {}
    sizes = budget.kv_lora_rank, budget.qk_rope_head_dim

    def errors(layer: SourceLayer, hidden: torch.Tensor) -> list[float]:
        moments = layer.moments(hidden)
        maps = (transmla_map(moments, layer.freqs, *sizes, fold) for fold in candidates)
        return map_errors(layer, hidden[:ERROR_WINDOWS], maps)

    return search(source, windows[:SEARCH_WINDOWS], candidates, errors, device, progress, "Searching freqfold", record)


def transmla(source: Source, windows: torch.Tensor, budget: CacheBudget, freqfold: int) -> LayerConversion:
    """The method, ready to convert layers.

    As in TransMLA's own code, keys are rotated by what the original model computes, and the joint
    PCA sees what the model with partial RoPE (and no low rank) computes. So two streams of hidden
    states pass through each layer.
    """

    def start() -> Streams:
        hidden = embed(source, windows)
        return {"source": hidden, "partial": hidden.clone()}

    def convert(layer: SourceLayer, streams: Streams) -> ConvertedLayer:
        hidden, partial = streams["source"], streams["partial"]
        rotation = rotate_keys(layer.moments(hidden), budget.qk_rope_head_dim, freqfold)
        layer.advance(hidden, layer.attend)
        moments = layer.moments(partial)
        maps = joint_map(moments, layer.freqs, rotation, budget.kv_lora_rank)
        weights = mla_weights(layer.attention_weights, maps)
        measured = measure(layer, partial, maps, moments.kv, layer.converted(weights))
        partial_rope = joint_map(moments, layer.freqs, rotation, kv_lora_rank=None)
        layer.advance(partial, layer.converted(mla_weights(layer.attention_weights, partial_rope)))
        return ConvertedLayer(weights, measured)

    return LayerConversion(start, convert)
