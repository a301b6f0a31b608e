"""The keys of a GGUF model's architecture, read by type. Keys that nobody reads are refused or reported."""

from typing import Any

import numpy as np

from mla_converters.checkpoints.gguf.parts import Gguf
from mla_converters.errors import ConversionError

ARCHITECTURE = "general.architecture"
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "activation_sparsity_scale": (),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.output_scale": (1.0,),
    "attention.scale": (0.0,),
    "attention.shared_kv_layers": (0,),
    "attention.sliding_window_pattern": (),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_gating_func": (0, 1),  # not given, softmax
    "expert_group_count": (0, 1),
    "expert_group_scale": (),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "interleave_moe_layer_step": (0, 1),
    "leading_dense_block_count": (0,),
    "logit_scale": (0.0, 1.0),
    "moe_every_n_layers": (0, 1),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.dimension_count_swa": (),
    "rope.dimension_sections": (),
    "rope.freq_base_swa": (),
    "rope.scaling.alpha": (0.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "router_logit_softcapping": (0.0,),
    "swin_norm": (False,),
    "use_parallel_residual": (False,),
}
"""Keys that can change the computation in ways that no family here has, each with the values that leave it unchanged.
A model with any other value is refused."""
WITHOUT_EFFECT = (
    "attention.layer_norm_epsilon",  # of another norm than RMSNorm
    "rope.scaling.finetuned",  # how the model was trained
    "tensor_data_layout",  # the name of the layout that all files have
    "vocab_size",  # the embedding has as many rows
)


class Keys:
    """Typed access to the keys that begin with the architecture's name.

    Args:
        gguf: the model.

    Raises:
        ConversionError: the model names no architecture.
    """

    def __init__(self, gguf: Gguf) -> None:
        self.path = gguf.path
        self._keys = gguf.keys
        self._read: set[str] = set()
        self.architecture = self.text(ARCHITECTURE)

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 1, the same for all layers; required without a default."""
        value = self._value(name, default)
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]
        if type(value) is not int or (value < 1 and value != default):
            raise self._unusable(name, value, "a whole number from 1 on, the same for all layers")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number of at least 0; required without a default. Returns the shortest decimal of a float32."""
        value = self._value(name, default)
        if type(value) not in (int, float) or not 0 <= value <= np.finfo(np.float32).max:
            raise self._unusable(name, value, "a finite number of at least 0")
        return float(str(np.float32(value)))

    def text(self, name: str, default: str | None = None) -> str:
        """A string; required without a default."""
        value = self._value(name, default)
        if type(value) is not str:
            raise self._unusable(name, value, "text")
        return value

    def truth(self, name: str, default: bool) -> bool:
        """A truth value."""
        value = self._value(name, default)
        if type(value) is not bool:
            raise self._unusable(name, value, "true or false")
        return value

    def has(self, name: str) -> bool:
        """Whether the header has the key."""
        return self._full(name) in self._keys

    def rest(self) -> list[str]:
        """Keys of the architecture that were not read and are not known to be without effect, by their full names.

        Raises:
            ConversionError: one is known to change what the model computes.
        """
        unread = [name for name in self._keys if name.startswith(f"{self.architecture}.") and name not in self._read]
        unknown = []
        for name in unread:
            short, value = name.removeprefix(f"{self.architecture}."), self._keys[name]
            if short in NEUTRAL and value not in NEUTRAL[short]:
                raise ConversionError(
                    f"{self.path} has {name} {shown(value)}, which changes what the model computes in a way that is "
                    "not known here: convert the model that the file was made from."
                )
            if short not in NEUTRAL and short not in WITHOUT_EFFECT:
                unknown.append(name)
        return sorted(unknown)

    def _value(self, name: str, default: Any) -> Any:
        full = self._full(name)
        if full not in self._keys and default is None:
            raise ConversionError(f"{self.path} lacks {full}, without which its model cannot be read.")
        self._read.add(full)
        return self._keys.get(full, default)

    def _full(self, name: str) -> str:
        return name if name.startswith(("general.", "tokenizer.")) else f"{self.architecture}.{name}"

    def _unusable(self, name: str, value: Any, expected: str) -> ConversionError:
        return ConversionError(f"{self.path} has {self._full(name)} {shown(value)}, where {expected} was expected.")


def shown(value: Any) -> str:
    """A key's value, cut short for a message."""
    text = repr(value)
    return text if len(text) < 60 else f"{text[:60]}…"
