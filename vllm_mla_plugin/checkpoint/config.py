"""Configurations of MLA checkpoints: the source family's fields, plus DeepSeek's names for MLA's sizes."""

from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import LlamaConfig, MistralConfig, MixtralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat
from vllm_mla_plugin.checkpoint.families import FAMILIES
from vllm_mla_plugin.checkpoint.latent_cache import parse_latent_cache

MLA_TP_PLAN = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.kv_b_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}


@dataclass(kw_only=True, repr=False, eq=False)
class MLAFields:
    """Fields that every MLA family adds to the configuration of its source family.

    Attributes:
        kv_lora_rank: width ``R`` of the latent that is cached for keys and values.
        q_lora_rank: rank of the query projection. It is None because queries are not cached.
        qk_rope_head_dim: width ``r`` of the rotary key that all heads share. It is cached too, so a
            token costs ``R + r`` numbers in each layer.
        kv_lora_ranks, qk_rope_head_dims: ``R`` and ``r`` of each layer, where layers differ. The two
            fields above are then the maxima, whatever was given for them. None: all layers have the same sizes.
        qk_nope_head_dim: per-head width of queries and keys without RoPE (0 for a model whose
            whole key keeps RoPE).
        v_head_dim: per-head width of the values.
        softmax_scale: factor on attention scores: ``head_dim ** -0.5`` of the source, times the
            square of its RoPE attention factor (YaRN).
        qk_norm: whether the family normalises each head's query and key before RoPE.
        converted_rope_parameters: the source's ``rope_parameters``, from which the checkpoint's ``rope_freqs`` were
            made; None in checkpoints of version 0.1.0.
        latent_cache: how the cache is packed, as :func:`~vllm_mla_plugin.checkpoint.latent_cache.latent_cache_json`
            writes it. None: in numbers of 16 bits, as the model computes them.
        mla_conversion: how the checkpoint was made: method, source, calibration, versions.

    Raises:
        ValueError: sizes per layer are given, but not one for each layer; or ``latent_cache`` does not fit the sizes.
    """

    model_type: ClassVar[str]
    kv_lora_rank: int = 512
    q_lora_rank: int | None = None
    qk_rope_head_dim: int = 64
    kv_lora_ranks: list[int] | None = None
    qk_rope_head_dims: list[int] | None = None
    qk_nope_head_dim: int = 128
    v_head_dim: int = 128
    softmax_scale: float | None = None
    qk_norm: ClassVar[bool] = False
    converted_rope_parameters: dict[str, Any] | None = None
    latent_cache: dict[str, Any] | None = None
    mla_conversion: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]  # the source family's
        if self.softmax_scale is None:
            self.softmax_scale = self.v_head_dim**-0.5
        layers: int = self.num_hidden_layers  # type: ignore[attr-defined]  # the source family's
        for name in ("kv_lora_rank", "qk_rope_head_dim"):
            sizes = getattr(self, f"{name}s")
            if sizes is None:
                continue
            if len(sizes) != layers:
                raise ValueError(f"{name}s has {len(sizes)} entries, but the model has {layers} layers.")
            setattr(self, name, max(sizes))
        self.cache_format(0)  # raises, if the formats do not fit

    @property
    def attention_biases(self) -> tuple[bool, bool]:
        """Whether queries, keys and values have a bias, and whether the output has one."""
        bias: bool = getattr(self, "attention_bias", False)
        return bias, bias

    def check_rope(self) -> None:
        """Refuse another RoPE than that of the conversion, which cannot have any effect: each layer's frequencies are
        in its ``rope_freqs``.

        Raises:
            ValueError: ``rope_parameters`` were changed, by an override for instance.
        """
        converted: dict[str, Any] = self.converted_rope_parameters or {}
        now: dict[str, Any] = self.rope_parameters or {}  # type: ignore[attr-defined]  # the source family's
        changed = [name for name, value in converted.items() if now.get(name) != value]
        if changed:
            raise ValueError(
                f"This MLA checkpoint was converted with the RoPE parameters {converted}, and {', '.join(changed)} "
                "cannot be changed afterwards: convert the source again with --rope-scaling."
            )

    def cached_sizes(self, layer: int) -> tuple[int, int]:
        """``(R, r)`` of a layer, counted over the whole model: a token costs ``R + r`` numbers there."""
        rank = self.kv_lora_rank if self.kv_lora_ranks is None else self.kv_lora_ranks[layer]
        rope = self.qk_rope_head_dim if self.qk_rope_head_dims is None else self.qk_rope_head_dims[layer]
        return rank, rope

    def cache_format(self, layer: int) -> CacheFormat | None:
        """How a layer's cache is packed, or None if it is not."""
        if self.latent_cache is None:
            return None
        layers: int = self.num_hidden_layers  # type: ignore[attr-defined]  # the source family's
        return parse_latent_cache(self.latent_cache, [self.cached_sizes(index) for index in range(layers)])[layer]


class LlamaMLAConfig(MLAFields, LlamaConfig):
    """Llama with MLA (``model_type`` ``llama_mla``)."""

    model_type = "llama_mla"
    base_model_tp_plan: ClassVar[dict[str, str]] = MLA_TP_PLAN


class MistralMLAConfig(MLAFields, MistralConfig):
    """Mistral with MLA (``model_type`` ``mistral_mla``); never with an active sliding window."""

    model_type = "mistral_mla"
    base_model_tp_plan: ClassVar[dict[str, str]] = MLA_TP_PLAN
    sliding_window: int | None = None


class Qwen2MLAConfig(MLAFields, Qwen2Config):
    """Qwen2 and Qwen2.5 with MLA (``model_type`` ``qwen2_mla``)."""

    model_type = "qwen2_mla"
    base_model_tp_plan: ClassVar[dict[str, str]] = MLA_TP_PLAN
    attention_biases: ClassVar[tuple[bool, bool]] = (True, False)
    qkv_bias: bool = True  # read by vLLM's Llama layer


class Qwen3MLAConfig(MLAFields, Qwen3Config):
    """Qwen3 with MLA (``model_type`` ``qwen3_mla``)."""

    model_type = "qwen3_mla"
    base_model_tp_plan: ClassVar[None] = None
    qk_norm: ClassVar[bool] = True


class Qwen3MoeMLAConfig(MLAFields, Qwen3MoeConfig):
    """Qwen3-MoE with MLA (``model_type`` ``qwen3_moe_mla``)."""

    model_type = "qwen3_moe_mla"
    base_model_tp_plan: ClassVar[None] = None
    qk_norm: ClassVar[bool] = True


class MixtralMLAConfig(MLAFields, MixtralConfig):
    """Mixtral with MLA (``model_type`` ``mixtral_mla``); never with an active sliding window."""

    model_type = "mixtral_mla"
    base_model_tp_plan: ClassVar[None] = None
    sliding_window: int | None = None


_BY_MODEL_TYPE = {config_class.model_type: config_class for config_class in MLAFields.__subclasses__()}
CONFIG_CLASSES = tuple(_BY_MODEL_TYPE[family.mla_model_type] for family in FAMILIES.values())
"""The configuration class of every family, in the order of the table."""
