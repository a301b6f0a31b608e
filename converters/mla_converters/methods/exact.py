"""Method ``exact``: GQA written as MLA, nothing lost, nothing saved (TransMLA, section 4.1).

The rotary key shared by all heads is every KV head's rotary key side by side; a query is zero
outside its own KV head's block; the latent is the values.
"""

import torch

from mla_converters.checkpoints.shape import Shape
from mla_converters.errors import ConversionError
from mla_converters.latent.cache_size import CacheBudget, exact_budget
from mla_converters.latent.maps import LatentMap, mla_weights
from mla_converters.methods.base import Cost, Job, Prepared
from mla_converters.methods.cost import Passes, conversion_cost
from mla_converters.methods.layer_conversion import ConvertedLayer, LayerConversion
from mla_converters.options import CacheSizes, ExactOptions


def exact_map(kv_heads: int, head_dim: int, freqs: torch.Tensor) -> LatentMap:
    """The exact conversion of a layer.

    Args:
        kv_heads, head_dim: ``g`` and ``d`` of the source.
        freqs: ``[d / 2]`` RoPE frequencies of the source.

    Returns:
        A map with ``r = R = g * d`` and no part without RoPE (``n = 0``).
    """
    width, half = kv_heads * head_dim, head_dim // 2
    # Source order is (head, half, frequency); ours keeps the two halves of all pairs apart.
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


class Exact:
    """The method, see :class:`mla_converters.methods.base.Method`."""

    window = None
    lossless = True

    def __init__(self, options: ExactOptions) -> None:
        self.options = options

    def budget(self, shape: Shape, sizes: CacheSizes) -> CacheBudget:
        if (sizes.kv_lora_rank, sizes.qk_rope_head_dim, sizes.cache_ratio) != (None, None, None):
            raise ConversionError(
                "Method exact keeps the whole cache: leave out --kv-lora-rank, --qk-rope-head-dim and "
                "--cache-ratio, or use another --method."
            )
        return exact_budget(shape.kv_heads, shape.head_dim)

    def nope_dim(self, shape: Shape) -> int:
        return 0

    def cost(self, shape: Shape, budget: CacheBudget, tokens: int) -> Cost:
        # Whatever layout a plan compares methods for, this one keeps the source's cache.
        whole = exact_budget(shape.kv_heads, shape.head_dim)
        return conversion_cost(shape, whole, self.nope_dim(shape), Passes())

    def prepare(self, job: Job) -> Prepared:
        source = job.source
        maps = exact_map(source.config.num_key_value_heads, source.head_dim, source.rope[0])
        conversion = LayerConversion(dict, lambda layer, _: ConvertedLayer(mla_weights(layer.attention_weights, maps)))
        return Prepared([job.budget] * source.config.num_hidden_layers, conversion)
