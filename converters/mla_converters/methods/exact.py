"""Method ``exact``: GQA written as MLA. It loses nothing and saves no memory (TransMLA, section 4.1).

With a packed cache it saves memory and needs no text: only rounding is lost, which at 4 bits is little.

The rotary key that all heads share holds the rotary keys of all KV heads side by side. A query is zero outside the
block of its own KV head. The latent holds the values.
"""

from collections.abc import Callable

import torch

from mla_converters.checkpoints.shape import Shape
from mla_converters.checkpoints.source import Source
from mla_converters.errors import ConversionError
from mla_converters.latent.cache_size import CacheBudget, exact_budget
from mla_converters.latent.maps import LatentMap, mla_weights
from mla_converters.latent.packed_sizes import uniform_format
from mla_converters.methods.asked_cache import AskedCache
from mla_converters.methods.base import Cost, Job, Prepared
from mla_converters.methods.cost import Passes, conversion_cost
from mla_converters.methods.layer_conversion import ConvertedLayer, LayerConversion, measure, with_mean
from mla_converters.options import WINDOW, CacheSizes, ExactOptions
from mla_converters.resume.layer_pass import Streams
from mla_converters.streaming.layers import SourceLayer, embed
from mla_converters.text.origins import random_tokens
from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat

WINDOWS = 8  # windows of random tokens on which the means are measured that packing takes out


def exact_map(kv_heads: int, head_dim: int, freqs: torch.Tensor) -> LatentMap:
    """The exact conversion of a layer.

    Args:
        kv_heads, head_dim: ``g`` and ``d`` of the source.
        freqs: ``[d / 2]`` RoPE frequencies of the source.

    Returns:
        A map with ``r = R = g * d`` and no part without RoPE (``n = 0``).
    """
    width, half = kv_heads * head_dim, head_dim // 2
    # The source's order is (head, half, frequency); ours has the first halves of all pairs before the second halves.
    order = torch.arange(width).view(kv_heads, 2, half).transpose(0, 1).flatten()
    eye = torch.eye(width, dtype=torch.float64)
    rope = eye[order]  # [r, g * d]
    return LatentMap(
        rope_freqs=freqs.float().repeat(kv_heads),
        key_to_rope=rope,
        query_to_rope=rope.view(width, kv_heads, head_dim).transpose(0, 1).contiguous(),
        query_to_nope=torch.zeros(kv_heads, 0, head_dim, dtype=torch.float64),
        kv_to_latent=torch.cat((torch.zeros_like(eye), eye), dim=1),
        latent_to_key=torch.zeros(kv_heads, 0, width, dtype=torch.float64),
        latent_to_value=eye.view(kv_heads, head_dim, width).clone(),
    )


def packed_exact(source: Source, maps: Callable[[int], LatentMap], format: CacheFormat, seed: int) -> LayerConversion:
    """The conversion with a packed cache. Means are measured on random tokens, because the method has no text."""

    def start() -> Streams:
        windows = (WINDOWS, min(WINDOW, source.shape.context))
        return {"random": embed(source, random_tokens(source, windows, torch.Generator().manual_seed(seed)))}

    def convert(layer: SourceLayer, streams: Streams) -> ConvertedLayer:
        hidden = streams["random"]
        own = maps(layer.index)
        weights, attention = with_mean(layer, mla_weights(layer.attention_weights, own), format, hidden)
        measured = measure(layer, hidden, own, layer.moments(hidden).kv, attention)
        layer.advance(hidden, layer.attend)
        return ConvertedLayer(weights, measured)

    return LayerConversion(start, convert)


class Exact:
    """The method, see :class:`mla_converters.methods.base.Method`."""

    window = None
    lossless = True

    def __init__(self, options: ExactOptions) -> None:
        self.options = options

    def cache(self, shape: Shape, sizes: CacheSizes) -> AskedCache:
        if (sizes.kv_lora_rank, sizes.qk_rope_head_dim, sizes.cache_ratio) != (None, None, None):
            raise ConversionError(
                "Method exact keeps all of the cache's numbers: leave out --kv-lora-rank, --qk-rope-head-dim and "
                "--cache-ratio, give --latent-bits to round them, or use another --method."
            )
        whole = exact_budget(shape.kv_heads, shape.head_dim)
        if sizes.format is not None and CacheBudget(*sizes.format.sizes) != whole:
            raise ConversionError(
                f"--latent-cache packs {' + '.join(map(str, sizes.format.sizes))} numbers, but method exact caches "
                f"{whole.kv_lora_rank} + {whole.qk_rope_head_dim}."
            )
        if sizes.format is not None or sizes.uniform_bits == 16:
            return AskedCache(whole, sizes.format)
        return AskedCache(whole, uniform_format(whole.kv_lora_rank, whole.qk_rope_head_dim, sizes.uniform_bits))

    def nope_dim(self, shape: Shape) -> int:
        return 0

    def cost(self, shape: Shape, cache: AskedCache, tokens: int) -> Cost:
        # A plan compares methods at some smaller layout, but this method always keeps the source's numbers.
        whole = exact_budget(shape.kv_heads, shape.head_dim)
        random = 0 if cache.format is None else WINDOWS * WINDOW
        return conversion_cost(shape, whole, self.nope_dim(shape), Passes(tokens=random))

    def prepare(self, job: Job) -> Prepared:
        source, budgets = job.source, [job.budget] * job.source.config.num_hidden_layers

        def maps(index: int) -> LatentMap:
            return exact_map(source.config.num_key_value_heads, source.head_dim, source.frequencies(index))

        format = self.cache(source.shape, job.sizes).format
        if format is not None:
            return Prepared(budgets, packed_exact(source, maps, format, job.seed), format)
        conversion = LayerConversion(
            dict, lambda layer, _: ConvertedLayer(mla_weights(layer.attention_weights, maps(layer.index)))
        )
        return Prepared(budgets, conversion)
