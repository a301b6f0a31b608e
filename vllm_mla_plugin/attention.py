"""The MLA self-attention on vLLM's MLA attention layer."""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PretrainedConfig
from vllm.config import CacheConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, extract_layer_index
from vllm.model_executor.utils import set_weight_attrs
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.mla.prefill.base import MLADimensions

from vllm_mla_plugin.backends import select_backend, select_prefill_backend
from vllm_mla_plugin.latent_attention import LatentAttention
from vllm_mla_plugin.latent_packing import take_mean_out
from vllm_mla_plugin.mapped_queries import MappedMLAAttention, PackedMappedMLAAttention, RankRotaryQueryMap
from vllm_mla_plugin.packed_attention import PackedMLAAttention, served_format
from vllm_mla_plugin.rope import FrequencyRotaryEmbedding

ROW_MULTIPLE = 16
"""Fast kernels want products whose columns are a multiple of this: cuBLAS wants rows of whole 16 bytes, AMX whole
tiles."""


def is_quantised(quant_config: QuantizationConfig | None, input_size: int, name: str) -> bool:
    """Whether the checkpoint's projection of this name is quantised: a checkpoint may leave some out."""
    if quant_config is None:
        return False
    with torch.device("meta"):  # the layer is only asked what it would be
        layer = ReplicatedLinear(input_size, input_size, quant_config=quant_config, prefix=name)
    return not isinstance(layer.quant_method, UnquantizedLinearMethod)


class MLASelfAttention(nn.Module):
    """Drop-in for ``LlamaAttention``: same constructor, MLA inside (DeepSeek-V2, section 2.1).

    It differs from DeepSeek's in three ways:

    - It has no norm on the latent, because a converted model would then compute another function.
    - It takes the RoPE frequencies from the checkpoint.
    - It may have biases.

    Args:
        config: an MLA configuration (:class:`vllm_mla_plugin.checkpoint.config.MLAFields`).
        num_heads: query heads over all tensor-parallel ranks.
        bias, bias_o_proj: not used, because vLLM's Llama does not know every family's; the configuration says which
            projections have a bias.
        prefix: the module's name. It contains the number of the layer, which decides the sizes of the cache.

    Raises:
        ValueError: MLA is disabled, or the attention is not causal, or no backend serves the sizes on this device.
    """

    product: ClassVar[str] = "query_latent_proj"
    """The name of the module that multiplies the layer's input, where one product does."""
    parts: ClassVar[tuple[str, str]] = ("q_proj", "kv_a_proj_with_mqa")
    """The checkpoint's names of its parts: the queries, and the part that every tensor-parallel rank needs whole."""

    def __init__(
        self,
        config: PretrainedConfig,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        max_position_embeddings: int = 8192,
        quant_config: QuantizationConfig | None = None,
        bias: bool = False,
        bias_o_proj: bool = False,
        cache_config: CacheConfig | None = None,
        prefix: str = "",
        attn_type: str = AttentionType.DECODER,
    ) -> None:
        super().__init__()
        if attn_type != AttentionType.DECODER:
            raise ValueError(f"MLA models are causal decoders; attention type {attn_type!r} is not served.")
        model_config = get_current_vllm_config().model_config
        if not model_config.use_mla:
            raise ValueError("This checkpoint can only be served with MLA: unset VLLM_MLA_DISABLE.")

        self.nope_dim = config.qk_nope_head_dim
        layer = extract_layer_index(prefix)
        self.latent_dim, self.rope_dim = config.cached_sizes(layer)
        self.v_dim = config.v_head_dim
        self.num_heads = num_heads // get_tensor_model_parallel_world_size()

        self.q_rope_map: RankRotaryQueryMap | None = None
        if config.rotary_query_map:
            self.q_rope_map = RankRotaryQueryMap(self.num_heads, self.v_dim, self.rope_dim)
        bias, bias_o_proj = config.attention_biases
        self.make_projections(config, num_heads, bias, quant_config, prefix)
        self.kv_b_proj = ColumnParallelLinear(
            self.latent_dim,
            num_heads * (self.nope_dim + self.v_dim),
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.kv_b_proj",
        )
        self.o_proj = RowParallelLinear(
            num_heads * self.v_dim,
            hidden_size,
            bias=bias_o_proj,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )

        # These are plain RoPE frequencies until weights are loaded, because `--load-format dummy` never loads them.
        theta = config.rope_parameters["rope_theta"]
        exponents = torch.arange(0, self.rope_dim, 2, dtype=torch.float32) / self.rope_dim
        self.rope_freqs = nn.Parameter(theta**-exponents, requires_grad=False)
        set_weight_attrs(self.rope_freqs, {"weight_loader": self._load_rope_freqs})
        self.rotary_emb = FrequencyRotaryEmbedding(
            self.rope_freqs, max_position=model_config.max_model_len, dtype=model_config.dtype
        )

        format = served_format(get_current_vllm_config(), layer)
        more: dict[str, Any] = {}
        self.cache_mean: nn.Parameter | None = None
        if format is not None:
            if format.mean:
                mean = torch.zeros(2, self.latent_dim + self.rope_dim, dtype=torch.float32)
                self.cache_mean = nn.Parameter(mean, requires_grad=False)
            more = {
                "cache_format": format,
                "cache_mean": self.cache_mean,
                "rope_freqs": self.rope_freqs,
                "max_position": model_config.max_model_len,
            }
        if self.q_rope_map is None:
            attention: Any = LatentAttention if format is None else PackedMLAAttention
        else:
            attention = MappedMLAAttention if format is None else PackedMappedMLAAttention
            more |= {"q_rope_map": self.q_rope_map, "rotary_emb": self.rotary_emb}
        self.attn = attention(
            num_heads=self.num_heads,
            scale=config.softmax_scale,
            qk_nope_head_dim=self.nope_dim,
            qk_rope_head_dim=self.rope_dim,
            v_head_dim=self.v_dim,
            q_lora_rank=None,
            kv_lora_rank=self.latent_dim,
            kv_b_proj=self.kv_b_proj,
            cache_config=cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
            attn_backend=select_backend(self.latent_dim, self.rope_dim, format),
            prefill_backend_cls=select_prefill_backend(
                MLADimensions(qk_nope_head_dim=self.nope_dim, qk_rope_head_dim=self.rope_dim, v_head_dim=self.v_dim)
            ),
            **more,
        )

    def make_projections(
        self,
        config: PretrainedConfig,
        num_heads: int,
        bias: bool,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        """Make the modules that :meth:`project` needs; arguments as for the class."""
        # Every rank caches the whole latent, so every rank computes it.
        sizes = [num_heads * self.query_dim(self.nope_dim), self.latent_dim + self.rope_dim]
        self.make_input_projections(sizes, config.hidden_size, bias, quant_config, prefix)

    def query_dim(self, own: int) -> int:
        """Numbers that ``q_proj`` gives each head: the source's query, or else ``own`` and the rotary query."""
        return own + self.rope_dim if self.q_rope_map is None else self.v_dim

    def make_input_projections(
        self, sizes: list[int], hidden_size: int, bias: bool, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        """Make the projections of the layer's input.

        They are one product where possible, because at small batches a second product costs its launch. The two
        ``parts`` stay apart in three cases:

        - With several ranks, because these share out the queries but not the other part.
        - Where one of them is quantised, because each part then has its own scales.
        - Where the second part would make the columns of the product no multiple of :data:`ROW_MULTIPLE`, so that fast
          kernels would no longer take the first.

        Args:
            sizes: columns of the parts, over all ranks.
        """
        self.input_sizes = sizes
        self.packed_modules_mapping: dict[str, list[str]] = {}
        if (
            get_tensor_model_parallel_world_size() == 1
            and sum(sizes) % ROW_MULTIPLE == 0
            and not any(is_quantised(quant_config, hidden_size, f"{prefix}.{name}") for name in self.parts)
        ):
            self.packed_modules_mapping[self.product] = list(self.parts)
            self.add_module(
                self.product,
                MergedColumnParallelLinear(hidden_size, sizes, bias=bias, prefix=f"{prefix}.{self.product}"),
            )
            return
        for name, size, kind in zip(self.parts, sizes, (ColumnParallelLinear, ReplicatedLinear), strict=True):
            self.add_module(
                name, kind(hidden_size, size, bias=bias, quant_config=quant_config, prefix=f"{prefix}.{name}")
            )

    def project_input(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries ``[tokens, heads, size]`` of this rank's heads, and the other part ``[tokens, size]``."""
        if self.packed_modules_mapping:
            q, other = getattr(self, self.product)(hidden_states)[0].split(self.input_sizes, dim=-1)
        else:
            q, other = (getattr(self, name)(hidden_states)[0] for name in self.parts)
        return q.unflatten(-1, (self.num_heads, -1)), other

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries, and the row to cache ``[tokens, latent + rope]`` before RoPE.

        Queries are ``[tokens, heads, nope + rope]`` before RoPE; or, where ``q_rope_map`` makes the rotary part of
        them, ``[tokens, heads, v]``.
        """
        return self.project_input(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load weights; their names are the checkpoint's, relative to this module.

        vLLM's loader of the model calls this, possibly for a few weights at a time.

        Returns:
            The names of the parameters that got the weights.
        """
        if self.cache_mean is None:  # the checkpoint has one, but its cache is served unpacked
            weights = ((name, weight) for name, weight in weights if name != "cache_mean")
        stacked = {
            f"{part}.": (f"{product}.", shard)
            for product, parts in self.packed_modules_mapping.items()
            for shard, part in enumerate(parts)
        }
        return AutoWeightsLoader(self).load_weights(weights, mapper=WeightsMapper(orig_to_new_stacked=stacked))

    def _load_rope_freqs(self, param: nn.Parameter, loaded: torch.Tensor) -> None:
        param.data.copy_(loaded)
        if not param.is_meta:
            self.rotary_emb.set_frequencies(param.data)
        elif not self.rotary_emb.has_frequencies(loaded):  # vLLM loads weights again, and puts the old table back
            raise ValueError(
                "These weights have other RoPE frequencies than those that are served: start vLLM with them, instead "
                "of loading them again."
            )

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Attend.

        Args:
            positions: ``[tokens]``.
            hidden_states: ``[tokens, hidden_size]``.

        Returns:
            ``[tokens, hidden_size]``.
        """
        q, cached = self.project(hidden_states)
        if self.cache_mean is not None:
            cached = take_mean_out(cached, self.cache_mean, positions)
        latent, k_rope = cached.split([self.latent_dim, self.rope_dim], dim=-1)
        output_shape = (hidden_states.shape[0], self.num_heads * self.v_dim)
        if self.q_rope_map is not None:
            k_rope, _ = self.rotary_emb(positions, k_rope.unsqueeze(1))
            output = self.attn(q, latent, k_rope, positions, output_shape=output_shape)
            return self.o_proj(output)[0]
        q_nope, q_rope = q.split([self.nope_dim, self.rope_dim], dim=-1)
        q_rope, k_rope = self.rotary_emb(positions, q_rope, k_rope.unsqueeze(1))
        output = self.attn(
            # The rotated part is not written into q in place, because the query would then be strided, which not all
            # kernels read. And torch.compile, which makes a new tensor in either case, would also copy the latent.
            torch.cat((q_nope, q_rope), dim=-1),
            latent,
            k_rope,  # [tokens, 1, rope]: one rotary key for all heads
            output_shape=output_shape,
        )
        return self.o_proj(output)[0]
