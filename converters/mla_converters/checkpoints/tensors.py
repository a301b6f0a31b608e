"""The tensors of a model, whatever format stores them."""

from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from mla_converters.errors import ConversionError

SECOND_TOKEN = ("num_nextn_predict_layers", "num_mtp_modules")
"""Keys of a configuration that count layers with which a model predicts a second token."""
SHOWN = 5  # problems that a message names


class Tensors(Protocol):
    """Tensors that are read one at a time, under the names that a Hugging Face checkpoint gives them."""

    def __contains__(self, name: str) -> bool: ...

    def files(self) -> list[Path]:
        """The files that hold them."""
        ...

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        ...

    @property
    def stored(self) -> "Tensors":
        """The tensors that OUT has where it carries these over."""
        ...

    def parts(self, name: str) -> list[str]:
        """Names in :attr:`stored` of the tensors that hold a tensor's numbers."""
        ...

    def own_name(self, name: str) -> str:
        """The format's own name of a tensor that is there or is missing, for messages."""
        ...

    def ignore(self, name: str) -> None:
        """Forget a tensor, if it is there."""
        ...

    def shape(self, name: str) -> list[int]:
        """A tensor's shape."""
        ...

    def stored_as(self, name: str) -> str:
        """How a tensor's numbers are stored, in the format's own terms, for messages."""
        ...

    def dtype(self, name: str) -> torch.dtype | None:
        """A tensor's dtype when it is read; None if it is no float of 16 bits or more."""
        ...

    def meta(self, name: str) -> torch.Tensor:
        """A tensor's shape and dtype, without reading it."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            ConversionError: it holds NaN or infinity.
            UnfinishedError: its file has gone since it was found.
        """
        ...


def check_tensors(tensors: Tensors, skeleton: PreTrainedModel, config_name: str) -> None:
    """Compare names, shapes and dtypes with those of a model (its weights on the meta device); report all at once.

    Args:
        tensors: that there are; those that the model computes itself are forgotten.
        skeleton: the model.
        config_name: where its configuration stands, for messages.

    Raises:
        ConversionError: they differ.
    """
    # Further layers, with which the model can predict a second token. transformers leaves them out, too.
    layers = skeleton.config.num_hidden_layers
    more = sum(getattr(skeleton.config, name, None) or 0 for name in SECOND_TOKEN)
    left_out = tuple(f"model.layers.{index}." for index in range(layers, layers + more))
    for name in tensors.names():
        if name.endswith("rotary_emb.inv_freq") or name.startswith(left_out):
            tensors.ignore(name)
    problems = tensor_problems(tensors, skeleton)
    if problems:
        more = f", and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ConversionError(f"The weights do not fit {config_name}: {'; '.join(problems[:SHOWN])}{more}.")


def tensor_problems(tensors: Tensors, skeleton: PreTrainedModel) -> list[str]:
    """Differences from the tensors that a model (its weights on the meta device) is saved with."""
    # transformers stacks experts when it loads them; files hold them one by one.
    stored = revert_weight_conversion(skeleton, skeleton.state_dict())
    expected = {name: list(tensor.shape) for name, tensor in stored.items()}
    if skeleton.config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    problems = [f"{tensors.own_name(name)} is missing" for name in expected if name not in tensors]
    problems += [
        f"{tensors.own_name(name)} is no part of the architecture" for name in tensors.names() if name not in expected
    ]
    for name in (name for name in expected if name in tensors):
        shape, own = tensors.shape(name), tensors.own_name(name)
        if expected[name] != shape:
            problems.append(f"{own} has shape {shape} where {expected[name]} was expected")
        elif tensors.dtype(name) is None:
            problems.append(f"{own} has dtype {tensors.stored_as(name)}, not a float of 16 bits or more")
    return list(dict.fromkeys(problems))  # stacked experts share a name


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor is free of NaN and infinity."""
    if not tensor.is_floating_point():
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.to(torch.bfloat16)  # torch does not compare floats of 8 bits
    # NaN is both the least and the greatest of what it is among: one pass, and no copy.
    return not tensor.numel() or all(torch.isfinite(extreme) for extreme in torch.aminmax(tensor))
