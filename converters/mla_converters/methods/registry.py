"""Every conversion method: its options, and where the method itself is. Nothing here imports torch.

To add a method, register its options and the place of its class, which is imported when the method is used.
"""

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mla_converters.options import (
    AttentionAwareOptions,
    ExactOptions,
    MethodOptions,
    Mha2mlaOptions,
    TransmlaOptions,
)

if TYPE_CHECKING:
    from mla_converters.methods.base import Method


@dataclass(frozen=True)
class Entry:
    """A registered method.

    Attributes:
        options: the model of its options.
        location: ``module:Class`` of the method, which is made with its options.
    """

    options: type[MethodOptions]
    location: str


METHODS: dict[str, Entry] = {}


def register(options: type[MethodOptions], location: str) -> None:
    """Add a method under the name that its options have."""
    METHODS[options.name] = Entry(options, location)


register(ExactOptions, "mla_converters.methods.exact:Exact")
register(TransmlaOptions, "mla_converters.methods.transmla.method:Transmla")
register(Mha2mlaOptions, "mla_converters.methods.mha2mla.method:Mha2mla")
register(AttentionAwareOptions, "mla_converters.methods.attention_aware.method:AttentionAware")


def method_of(options: MethodOptions) -> "Method":
    """The method that these options ask for."""
    module, name = METHODS[options.name].location.split(":")
    return getattr(importlib.import_module(module), name)(options)
