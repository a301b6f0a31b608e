"""A conversion method in one file: all keys keep RoPE, and the latent has the first values only."""

from dataclasses import replace

from pydantic import Field

from mla_converters.checkpoints.shape import Shape
from mla_converters.latent.cache_size import CacheBudget
from mla_converters.latent.maps import mla_weights
from mla_converters.methods.asked_cache import AskedCache
from mla_converters.methods.base import Cost, Job, Prepared
from mla_converters.methods.cost import Passes, conversion_cost
from mla_converters.methods.exact import exact_map
from mla_converters.methods.layer_conversion import ConvertedLayer, LayerConversion
from mla_converters.methods.registry import register
from mla_converters.options import CacheSizes, MethodOptions


class ToyOptions(MethodOptions):
    """Options of the method."""

    name = "toy"
    summary = "the first values and no others"
    reference = "https://example.org/toy"

    kept_values: int = Field(8, ge=1, description="How many values the latent keeps.")


class Toy:
    """The method."""

    window = None
    lossless = False

    def __init__(self, options: ToyOptions) -> None:
        self.options = options

    def cache(self, shape: Shape, sizes: CacheSizes) -> AskedCache:
        return AskedCache(CacheBudget(self.options.kept_values, shape.kv_heads * shape.head_dim))

    def nope_dim(self, shape: Shape) -> int:
        return 0

    def cost(self, shape: Shape, cache: AskedCache, tokens: int) -> Cost:
        return conversion_cost(shape, cache.budget, 0, Passes())

    def prepare(self, job: Job) -> Prepared:
        source, kept = job.source, self.options.kept_values
        maps = exact_map(source.config.num_key_value_heads, source.head_dim, source.rope[0])
        fewer = replace(
            maps,
            kv_to_latent=maps.kv_to_latent[:kept],
            latent_to_key=maps.latent_to_key[..., :kept],
            latent_to_value=maps.latent_to_value[..., :kept],
        )
        conversion = LayerConversion(dict, lambda layer, _: ConvertedLayer(mla_weights(layer.attention_weights, fewer)))
        budgets = [job.budget] * source.config.num_hidden_layers
        return Prepared(budgets, conversion, settings={"kept_values": kept})


register(ToyOptions, "support.toy_method:Toy")
