"""The names and layouts of GGUF's tensors, translated to those of a Hugging Face checkpoint."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from mla_converters.checkpoints.gguf.header import StoredTensor
from mla_converters.checkpoints.gguf.rope import FACTORS
from mla_converters.errors import ConversionError
from vllm_mla_plugin.checkpoint.families import Family

WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
EXPERTS = ("ffn_gate", "ffn_up", "ffn_down")  # in the order of ExpertNames.projections
ROUTER = "ffn_gate_inp"
UNKNOWN = "unknown: "  # so that no unknown name can be that of a tensor of the model
IN_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
ONE_EXPERT = re.compile(rf"({'|'.join(EXPERTS)})\.(\d+)\.weight")
ALL_EXPERTS = re.compile(rf"({'|'.join(EXPERTS)})_exps\.weight")


@dataclass(frozen=True)
class Place:
    """Where a tensor of the model is.

    Attributes:
        name: the name that the file gives it.
        stored: the file's tensor of that name.
        expert: its number, where the file's tensor stacks all experts; None where it is the whole tensor.
        heads: number of heads, where llama.cpp's converter reordered the rows of each; None where it did not.
    """

    name: str
    stored: StoredTensor
    expert: int | None = None
    heads: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the model's tensor."""
        return self.stored.shape if self.expert is None else self.stored.shape[1:]


class Names:
    """A family's tensor names, in both directions.

    Args:
        family: of the model.
    """

    def __init__(self, family: Family) -> None:
        self._experts = family.experts
        self._layer = LAYER | ({ROUTER: f"{family.experts.block}.gate"} if family.experts else {})
        self._whole_back = {translated: own for own, translated in WHOLE.items()}
        self._layer_back = {translated: own for own, translated in self._layer.items()}

    def places(self, tensors: dict[str, StoredTensor], heads: dict[str, int]) -> dict[str, Place]:
        """Where each tensor of the model is, by the name that it has in a Hugging Face checkpoint.

        Args:
            tensors: of the file, by its names. A tensor with an unknown name is kept as :data:`UNKNOWN` and that name.
            heads: heads of the projections whose rows are to be put back into order, by ``attn_q`` or ``attn_k``.

        Raises:
            ConversionError: two tensors of the file are the same tensor of the model.
        """
        found: dict[str, Place] = {}
        for name, stored in tensors.items():
            if name != FACTORS:  # read into the configuration
                for expert, translated in self._translated(name, stored):
                    if translated in found:
                        raise ConversionError(
                            f"{stored.path} holds {found[translated].name} and, for the same, {name}."
                        )
                    part = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
                    found[translated] = Place(name, stored, expert, heads.get(part))
        return found

    def own(self, translated: str) -> str:
        """The name that a GGUF file gives a tensor of the model."""
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", translated)
        if match is None:
            return _renamed(translated, self._whole_back)
        inner = match[2]
        if self._experts and self._experts.is_expert(inner):
            projection = self._experts.projections.index(inner.split(".")[-2])
            return f"blk.{match[1]}.{EXPERTS[projection]}_exps.weight"
        return f"blk.{match[1]}.{_renamed(inner, self._layer_back)}"

    def _translated(self, name: str, stored: StoredTensor) -> Iterator[tuple[int | None, str]]:
        """The model's tensors that a tensor of the file holds: names, each with its number among stacked experts."""
        match = IN_LAYER.fullmatch(name)
        if match is None:
            translated = _renamed(name, WHOLE)
            yield None, UNKNOWN + name if translated == name else translated
            return
        layer, inner = f"model.layers.{match[1]}.", match[2]
        if self._experts and (stacked := ALL_EXPERTS.fullmatch(inner)):
            projection = self._experts.projections[EXPERTS.index(stacked[1])]
            for expert in range(stored.shape[0]):
                yield expert, layer + self._experts.weight(expert, projection)
        elif self._experts and (single := ONE_EXPERT.fullmatch(inner)):
            projection = self._experts.projections[EXPERTS.index(single[1])]
            yield None, layer + self._experts.weight(int(single[2]), projection)
        elif (translated := _renamed(inner, self._layer)) != inner:
            yield None, layer + translated
        else:
            yield None, UNKNOWN + name


def _renamed(name: str, table: dict[str, str]) -> str:
    """The name with its module translated; the name itself where the table does not have it."""
    module, _, kind = name.rpartition(".")
    return f"{table[module]}.{kind}" if module in table and kind in ("weight", "bias") else name
