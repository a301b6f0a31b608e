"""The families of models that can be converted and served: one table, which everything else reads.

Adding a row also takes a class in :mod:`vllm_mla_plugin.checkpoint.config` and one in
:mod:`vllm_mla_plugin.hf.models`; and a mixture of experts takes one in :mod:`vllm_mla_plugin.models.moe`.

This module imports neither torch nor vLLM.
"""

from dataclasses import dataclass


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
class Family:
    """A family of source models, and its counterpart with MLA.

    Attributes:
        architecture: the architecture that the source's ``config.json`` names.
        model_type: the ``model_type`` of the source.
        experts: the names of the experts' tensors; None for a family without experts.
    """

    architecture: str
    model_type: str
    experts: ExpertNames | None = None

    @property
    def mla_architecture(self) -> str:
        """The architecture of the converted checkpoint, and the name of its class in transformers."""
        return self.architecture.replace("ForCausalLM", "MLAForCausalLM")

    @property
    def mla_model_type(self) -> str:
        """The ``model_type`` of the converted checkpoint."""
        return f"{self.model_type}_mla"

    @property
    def vllm_model(self) -> str:
        """vLLM's class for the converted checkpoint, as ``"module:Class"``.

        It is a string because vLLM then imports the module only when it serves such a model. Families without experts
        share one class: they differ from Llama only in what their configuration says.
        """
        if self.experts is None:
            return "vllm_mla_plugin.models.llama:LlamaMLAForCausalLM"
        return f"vllm_mla_plugin.models.moe:{self.mla_architecture}"


FAMILIES = {
    family.architecture: family
    for family in (
        Family("LlamaForCausalLM", "llama"),
        Family("MistralForCausalLM", "mistral"),
        Family("Qwen2ForCausalLM", "qwen2"),
        Family("Qwen3ForCausalLM", "qwen3"),
        Family("Qwen3MoeForCausalLM", "qwen3_moe", ExpertNames("mlp", ("gate_proj", "up_proj", "down_proj"))),
        Family("MixtralForCausalLM", "mixtral", ExpertNames("block_sparse_moe", ("w1", "w3", "w2"))),
    )
}
"""Every family, by the architecture of its source."""
