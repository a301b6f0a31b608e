"""Configurations of MLA checkpoints: the source family's fields, plus DeepSeek's names for MLA's sizes."""

from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, PretrainedConfig

from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat
from vllm_mla_plugin.checkpoint.families import FAMILIES, Family, QKNorm
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
        v_head_dim: per-head width of the values, and of the source's queries.
        rotary_query_map: whether ``q_proj`` gives only each head's query in the source, and ``q_rope_map`` makes the
            rotary query from it (:class:`~vllm_mla_plugin.checkpoint.rotary_query.RotaryQueryMap`). False: ``q_proj``
            gives both, as in all checkpoints of version 0.1.0.
        softmax_scale: factor on attention scores: ``head_dim ** -0.5`` of the source, times the
            square of its RoPE attention factor (YaRN).
        family: of the source.
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
    rotary_query_map: bool = False
    softmax_scale: float | None = None
    family: ClassVar[Family]
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
        if self.rotary_query_map:
            self.base_model_tp_plan = None  # transformers has no style that shares out the heads of such a map

    @property
    def attention_biases(self) -> tuple[bool, bool]:
        """Whether queries, keys and values have a bias, and whether the output has one."""
        inputs, output = (getattr(self, bias, False) if isinstance(bias, str) else bias for bias in self.family.biases)
        return inputs, output

    @property
    def qk_norm(self) -> QKNorm | None:
        """How queries and keys are normalised before RoPE; None if they are not."""
        key = self.family.qk_norm_key
        return self.family.qk_norm if key is None or getattr(self, key) else None

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

    @property
    def sizes_differ(self) -> bool:
        """Whether layers cache different sizes."""
        layers: int = self.num_hidden_layers  # type: ignore[attr-defined]  # the source family's
        return len({self.cached_sizes(layer) for layer in range(layers)}) > 1

    def cache_format(self, layer: int) -> CacheFormat | None:
        """How a layer's cache is packed, or None if it is not."""
        if self.latent_cache is None:
            return None
        layers: int = self.num_hidden_layers  # type: ignore[attr-defined]  # the source family's
        return parse_latent_cache(self.latent_cache, [self.cached_sizes(index) for index in range(layers)])[layer]


def _config_class(family: Family) -> type[PretrainedConfig]:
    """The configuration of a family with MLA: the source's class, with the fields of :class:`MLAFields`."""
    source = CONFIG_MAPPING[family.model_type]
    names = {
        "__module__": __name__,
        "__doc__": f"{family.name} with MLA (``model_type`` ``{family.mla_model_type}``).",
        "__annotations__": dict.fromkeys(family.defaults, Any),
        "model_type": family.mla_model_type,
        "base_model_tp_plan": MLA_TP_PLAN if family.tp_plan else None,
        "family": family,
        **family.defaults,
    }
    return type(f"{family.name}MLAConfig", (MLAFields, source), names)


CONFIG_CLASSES = {family.mla_model_type: _config_class(family) for family in FAMILIES.values()}
"""The configuration class of every family, by its ``model_type``."""
# By name too, because vLLM pickles configurations.
globals().update({config_class.__name__: config_class for config_class in CONFIG_CLASSES.values()})
