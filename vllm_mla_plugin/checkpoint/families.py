"""The families of models that can be converted and served: one table, which everything else reads.

A family whose decoder layers are standard costs a row. A row says what differs from Llama: the names of experts and of
norms, which projections have biases, how queries and keys are normalised and turned, and vLLM's class.

This module imports neither torch nor vLLM.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

QKNorm = Literal["head", "all"]
"""How queries and keys are normalised before RoPE: each head alone, or all heads of a token together."""


@dataclass(frozen=True)
class ExpertNames:
    """The names that checkpoints give to what transformers keeps in ``mlp``, in a mixture of experts.

    Attributes:
        block: the module of the mixture, below ``model.layers.N.``.
        projections: gate, up and down projection of an expert.
    """

    block: str
    projections: tuple[str, str, str]

    def weight(self, expert: int, projection: str) -> str:
        """The name of a projection's weight, below ``model.layers.N.``."""
        return f"{self.block}.experts.{expert}.{projection}.weight"

    def is_expert(self, name: str) -> bool:
        """Whether a tensor belongs to an expert; ``name`` is its name below ``model.layers.N.``."""
        return name.startswith(f"{self.block}.experts.")


@dataclass(frozen=True)
class NormNames:
    """The names of a layer's norms, below ``model.layers.N.``; None where a layer has none.

    Attributes:
        before_attention, before_mlp: of the inputs of both halves.
        after_attention, after_mlp: of their outputs, before these are added to the residual stream.
    """

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of source models, and its counterpart with MLA.

    Attributes:
        name: the start of its classes' names in transformers.
        model_type: the ``model_type`` of the source.
        experts: the names of the experts' tensors; None for a family without experts.
        norms: the names of a layer's norms.
        biases: whether queries, keys and values have a bias, and whether the output has one; or the key of the
            configuration that says so.
        qk_norm: how queries and keys are normalised; None if they are not.
        qk_norm_key: the key of the configuration that switches the norm on; None if it is always on.
        fused_qkv: whether the source has one projection ``qkv_proj`` for queries, keys and values.
        partial_rotary: whether transformers' class can turn a part of each head only.
        interleaved: whether RoPE turns dimensions ``2 i`` and ``2 i + 1`` as a pair, not the halves of the rotary part.
        defaults: fields of the configuration that have another default with MLA, or that only vLLM reads.
        tp_plan: whether transformers can share out the converted model over ranks.
        vllm: vLLM's class whose attention MLA replaces, as ``"module:Class"`` in ``vllm.model_executor.models``; or one
            of this plugin's modules in :mod:`vllm_mla_plugin.models`.
    """

    name: str
    model_type: str
    experts: ExpertNames | None = None
    norms: NormNames = NormNames()
    biases: tuple[str | bool, str | bool] = ("attention_bias", "attention_bias")
    qk_norm: QKNorm | None = None
    qk_norm_key: str | None = None
    fused_qkv: bool = False
    partial_rotary: bool = False
    interleaved: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    tp_plan: bool = False
    vllm: str = "llama"

    @property
    def architecture(self) -> str:
        """The architecture that the source's ``config.json`` names."""
        return f"{self.name}ForCausalLM"

    @property
    def mla_architecture(self) -> str:
        """The architecture of the converted checkpoint, and the name of its class in transformers."""
        return f"{self.name}MLAForCausalLM"

    @property
    def mla_model_type(self) -> str:
        """The ``model_type`` of the converted checkpoint."""
        return f"{self.model_type}_mla"

    @property
    def vllm_model(self) -> str:
        """vLLM's class for the converted checkpoint, as ``"module:Class"``.

        It is a string because vLLM then imports the module only when it serves such a model.
        """
        if self.vllm == "llama":  # shared by all families that are a Llama to vLLM
            return "vllm_mla_plugin.models.llama:LlamaMLAForCausalLM"
        module = "replaced" if ":" in self.vllm else self.vllm
        return f"vllm_mla_plugin.models.{module}:{self.mla_architecture}"


GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")
W1_W3_W2 = ("w1", "w3", "w2")
FAMILIES = {
    family.architecture: family
    for family in (
        Family(name="Llama", model_type="llama", tp_plan=True),
        Family(name="Mistral", model_type="mistral", tp_plan=True, defaults={"sliding_window": None}),
        Family(name="Qwen2", model_type="qwen2", tp_plan=True, biases=(True, False)),
        Family(name="Qwen3", model_type="qwen3", qk_norm="head"),
        Family(
            name="Qwen3Moe",
            model_type="qwen3_moe",
            qk_norm="head",
            experts=ExpertNames("mlp", GATE_UP_DOWN),
            vllm="qwen3_moe:Qwen3MoeForCausalLM",
        ),
        Family(
            name="Mixtral",
            model_type="mixtral",
            defaults={"sliding_window": None},
            experts=ExpertNames("block_sparse_moe", W1_W3_W2),
            vllm="mixtral:MixtralForCausalLM",
        ),
        Family(name="Arcee", model_type="arcee", vllm="arcee"),
        Family(name="SeedOss", model_type="seed_oss", biases=("attention_bias", "attention_out_bias")),
        Family(
            name="Qwen2Moe",
            model_type="qwen2_moe",
            biases=("qkv_bias", False),
            defaults={"sliding_window": None},
            experts=ExpertNames("mlp", GATE_UP_DOWN),
            vllm="qwen2_moe:Qwen2MoeForCausalLM",
        ),
        Family(name="SmolLM3", model_type="smollm3"),
        Family(name="Granite", model_type="granite", vllm="granite:GraniteForCausalLM"),
        Family(
            name="Olmo2",
            model_type="olmo2",
            qk_norm="all",
            norms=NormNames(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
            vllm="olmo2",
        ),
        Family(name="Phi3", model_type="phi3", fused_qkv=True, partial_rotary=True, biases=(False, False), vllm="phi3"),
        Family(
            name="Glm4",
            model_type="glm4",
            biases=("attention_bias", False),
            norms=NormNames(
                "input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"
            ),
            partial_rotary=True,
            interleaved=True,
            vllm="glm4:Glm4ForCausalLM",
        ),
        Family(
            name="Glm4Moe",
            model_type="glm4_moe",
            biases=("attention_bias", False),
            qk_norm="head",
            qk_norm_key="use_qk_norm",
            partial_rotary=True,
            experts=ExpertNames("mlp", GATE_UP_DOWN),
            vllm="glm4_moe:Glm4MoeForCausalLM",
        ),
        Family(
            name="MiniMaxM2",
            model_type="minimax_m2",
            biases=(False, False),
            qk_norm="all",
            partial_rotary=True,
            experts=ExpertNames("block_sparse_moe", W1_W3_W2),
            # vLLM reads these, which transformers' class does not have.
            defaults={"rotary_dim": None, "scoring_func": "sigmoid", "use_routing_bias": True},
            vllm="minimax_m2:MiniMaxM2ForCausalLM",
        ),
    )
}
"""Every family, by the architecture of its source."""
