"""The options of every command, one pydantic model for each. These modules do not import torch.

The command line makes its flags, defaults, help texts and bounds from these models. The Python API takes the same
objects. A wrong value raises :class:`mla_converters.errors.OptionError`, and its text is one sentence.
"""

from mla_converters.options.base import OptionsModel, given_options, option_name
from mla_converters.options.bench import MOST, BenchOptions, Workload
from mla_converters.options.convert import CacheSizes, ConvertOptions, MethodChoice, command_line
from mla_converters.options.evaluate import Engine, EvalOptions, TextProtocol
from mla_converters.options.heal import HealOptions
from mla_converters.options.logits import LogitsOptions
from mla_converters.options.methods import (
    AttentionAwareOptions,
    ExactOptions,
    Ingredient,
    Keep,
    LayerSizes,
    MethodOptions,
    Mha2mlaOptions,
    Svd,
    TransmlaOptions,
)
from mla_converters.options.plan import PlanOptions, PlanTraining, parse_memory
from mla_converters.options.text import CHAT, SELF, WINDOW, WRITTEN
from mla_converters.options.verify import VerifyOptions

__all__ = [
    "CHAT",
    "MOST",
    "SELF",
    "WINDOW",
    "WRITTEN",
    "AttentionAwareOptions",
    "BenchOptions",
    "CacheSizes",
    "ConvertOptions",
    "Engine",
    "EvalOptions",
    "ExactOptions",
    "HealOptions",
    "Ingredient",
    "Keep",
    "LayerSizes",
    "LogitsOptions",
    "MethodChoice",
    "MethodOptions",
    "Mha2mlaOptions",
    "OptionsModel",
    "PlanOptions",
    "PlanTraining",
    "Svd",
    "TextProtocol",
    "TransmlaOptions",
    "VerifyOptions",
    "Workload",
    "command_line",
    "given_options",
    "option_name",
    "parse_memory",
]
