"""MLA self-attention for transformers models, shared by all families."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward, rotate_half
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from vllm_mla_plugin.checkpoint.query_norm import norm_queries
from vllm_mla_plugin.checkpoint.rotary_query import RotaryQueryMap
from vllm_mla_plugin.hf import xformers_attention
from vllm_mla_plugin.hf.packed_cache import PackedLayer
from vllm_mla_plugin.latent_packing import take_mean_out


def apply_rope(x: torch.Tensor, freqs: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs ``(i, i + r / 2)`` of ``x`` by ``position * freqs[i]``.

    Args:
        x: ``[batch, heads, tokens, r]``.
        freqs: ``[r / 2]``, radians per position; angles are computed in float32, as transformers does.
        position_ids: ``[batch or 1, tokens]``.

    Returns:
        Shape and dtype of ``x``.
    """
    angles = position_ids[:, None, :, None].float() * freqs.float()  # [batch or 1, 1, tokens, r / 2]
    angles = torch.cat((angles, angles), dim=-1)
    return x * angles.cos().to(x.dtype) + rotate_half(x) * angles.sin().to(x.dtype)


class MLASelfAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, section 2.1) that caches latents only.

    In the place of a layer's keys, transformers' cache holds the latent ``[batch, 1, tokens, R]``; in the place of its
    values, the rotated shared key ``[batch, 1, tokens, r]``. A packed cache holds the rows of
    :class:`~vllm_mla_plugin.hf.packed_cache.PackedLayer`.
    """

    rope_freqs: torch.Tensor
    cache_mean: torch.Tensor | None
    is_causal = True
    num_key_value_groups = 1  # after expansion every query head has its own keys and values

    def __init__(self, config: PretrainedConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.nope_dim = config.qk_nope_head_dim
        self.latent_dim, self.rope_dim = config.cached_sizes(layer_idx)
        self.v_dim = config.v_head_dim
        self.scaling = config.softmax_scale
        self.attention_dropout = getattr(config, "attention_dropout", 0.0)
        bias, bias_o_proj = config.attention_biases
        hidden, heads = config.hidden_size, config.num_attention_heads
        self.make_projections(config, bias)
        self.kv_b_proj = nn.Linear(self.latent_dim, heads * (self.nope_dim + self.v_dim), bias=False)
        self.o_proj = nn.Linear(heads * self.v_dim, hidden, bias=bias_o_proj)
        self.register_buffer("rope_freqs", torch.ones(self.rope_dim // 2))
        self.cache_format = config.cache_format(layer_idx)
        taken_out = self.cache_format is not None and self.cache_format.mean
        self.register_buffer("cache_mean", torch.zeros(2, self.latent_dim + self.rope_dim) if taken_out else None)

    def make_projections(self, config: PretrainedConfig, bias: bool) -> None:
        """Make the modules that :meth:`project` needs."""
        self.make_queries(config, self.nope_dim, bias)
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, self.latent_dim + self.rope_dim, bias=bias)

    def make_queries(self, config: PretrainedConfig, own_dim: int, bias: bool) -> None:
        """Make ``q_proj``, and ``q_rope_map`` if the checkpoint has it; else ``own_dim`` numbers of each head come
        before its rotary query."""
        heads, mapped = config.num_attention_heads, config.rotary_query_map
        self.q_rope_map = RotaryQueryMap(heads, self.v_dim, self.rope_dim) if mapped else None
        self.query_dim = self.v_dim if mapped else own_dim + self.rope_dim
        self.q_proj = nn.Linear(config.hidden_size, heads * self.query_dim, bias=bias)

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries ``[batch, tokens, heads, nope + rope]``, and the rows to cache ``[batch, tokens, latent + rope]``,
        before RoPE."""
        q = self.q_proj(hidden_states).unflatten(-1, (-1, self.query_dim))
        return self.with_rotary(q), self.kv_a_proj_with_mqa(hidden_states)

    def with_rotary(self, q: torch.Tensor) -> torch.Tensor:
        """Queries ``[batch, tokens, heads, nope + rope]`` from what ``q_proj`` gives, after any norm."""
        return q if self.q_rope_map is None else self.q_rope_map(q, self.nope_dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend.

        Args:
            hidden_states: ``[batch, tokens, hidden]``.
            position_ids: ``[batch or 1, tokens]``.
            attention_mask: as transformers builds it for the chosen attention implementation.
            cache: latents of earlier tokens; the new ones are added.
            past_key_values: the name of ``cache`` in transformers before 5.24.

        Returns:
            ``[batch, tokens, hidden]``, and the attention weights if the implementation has them.
        """
        batch, tokens, _ = hidden_states.shape
        kwargs.pop("position_embeddings", None)  # made from the source's frequencies; here each layer has its own
        q, cached = self.project(hidden_states)
        if self.cache_mean is not None:
            cached = take_mean_out(cached, self.cache_mean, position_ids)
        q_nope, q_rope = q.transpose(1, 2).split([self.nope_dim, self.rope_dim], dim=-1)
        latent, k_rope = cached.unsqueeze(1).split([self.latent_dim, self.rope_dim], dim=-1)
        q = torch.cat((q_nope, apply_rope(q_rope, self.rope_freqs, position_ids)), dim=-1)
        k_rope = apply_rope(k_rope, self.rope_freqs, position_ids)
        cache = past_key_values if cache is None else cache
        if self.cache_format is not None:
            packed = PackedLayer(self.cache_format, self.cache_mean, self.rope_freqs, self.layer_idx)
            latent, k_rope = packed.update(latent, k_rope, position_ids, cache)
        elif cache is not None:
            latent, k_rope = cache.update(latent, k_rope, self.layer_idx)

        kv = self.kv_b_proj(latent.squeeze(1)).view(batch, latent.shape[2], -1, self.nope_dim + self.v_dim)
        k_nope, v = kv.transpose(1, 2).split([self.nope_dim, self.v_dim], dim=-1)
        k = torch.cat((k_nope, k_rope.expand(-1, k_nope.shape[1], -1, -1)), dim=-1)
        if self.config._attn_implementation != xformers_attention.NAME:
            # torch's fused kernels want one head size. Without them, all scores would be kept in memory at once.
            width = max(q.shape[-1], self.v_dim)
            q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )  # [batch, tokens, heads, width]
        return self.o_proj(output[..., : self.v_dim].reshape(batch, tokens, -1)), weights


class QKNormMLASelfAttention(MLASelfAttention):
    """MLA for models with QK-norm: the latent is a linear map of normalised keys and of the layer's input.

    The norm of queries and keys comes before anything is cached, so it is computed as in the source.

    - ``kv_a_proj_with_mqa`` maps ``[k; x]`` to the row to cache. The source's projection to values is folded into the
      part for ``x``.
    - ``q_proj`` gives each head the source's query and, below it, the rotary part, if ``q_rope_map`` does not make
      that. Both are divided by the root mean square of the query.
    - The weight of the query's norm, and the map of the part without RoPE, are folded into ``kv_b_proj``.
    """

    def make_projections(self, config: PretrainedConfig, bias: bool) -> None:
        kv_width = config.num_key_value_heads * self.v_dim
        self.make_queries(config, self.v_dim, bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=bias)
        self.over_heads = config.qk_norm == "all"
        self.norm_width = kv_width if self.over_heads else self.v_dim
        self.k_norm = Qwen3RMSNorm(self.norm_width, eps=config.rms_norm_eps)
        self.kv_a_proj_with_mqa = nn.Linear(kv_width + config.hidden_size, self.latent_dim + self.rope_dim, bias=bias)

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q = self.q_proj(hidden_states).unflatten(-1, (-1, self.query_dim))
        k = self.k_norm(self.k_proj(hidden_states).unflatten(-1, (-1, self.norm_width))).flatten(-2)
        cached = self.kv_a_proj_with_mqa(torch.cat((k, hidden_states), dim=-1))
        kept = self.nope_dim if self.q_rope_map is None else self.v_dim
        q = norm_queries(q, self.v_dim, kept, self.config.rms_norm_eps, self.over_heads)
        return self.with_rotary(q), cached


class MLAModel:
    """Mixed into a family's ``ForCausalLM``: replaces every ``self_attn`` by MLA."""

    # If a frequency were rounded to bfloat16, it would be off by whole turns after a few hundred tokens.
    _keep_in_fp32_modules_strict: ClassVar[set[str]] = {"rope_freqs", "cache_mean"}
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"\.cache_mean$"]  # of a checkpoint served unpacked
    _supports_flash_attn = False  # keys and values differ in head size
    _supports_flex_attn = False

    def __init__(self, config: PretrainedConfig) -> None:
        config.check_rope()  # type: ignore[attr-defined]
        super().__init__(config)  # type: ignore[call-arg]
        for index, layer in enumerate(self.model.layers):  # type: ignore[attr-defined]
            layer.self_attn = (QKNormMLASelfAttention if config.qk_norm else MLASelfAttention)(config, index)
        self.post_init()  # type: ignore[attr-defined]
