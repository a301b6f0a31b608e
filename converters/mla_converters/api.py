"""The Python API: the functions behind the commands of ``vllm-mla``, and the options that they take."""

from mla_converters.bench.run import bench
from mla_converters.convert import convert
from mla_converters.errors import ConversionError, OptionError, UnfinishedError
from mla_converters.evaluation.run import evaluate
from mla_converters.heal.run import heal
from mla_converters.logits import logits
from mla_converters.options import (
    AttentionAwareOptions,
    BenchOptions,
    ConvertOptions,
    EvalOptions,
    ExactOptions,
    HealOptions,
    LogitsOptions,
    Mha2mlaOptions,
    PlanOptions,
    TransmlaOptions,
    VerifyOptions,
)
from mla_converters.planning.plan import plan
from mla_converters.verify import verify

__all__ = [
    "AttentionAwareOptions",
    "BenchOptions",
    "ConversionError",
    "ConvertOptions",
    "EvalOptions",
    "ExactOptions",
    "HealOptions",
    "LogitsOptions",
    "Mha2mlaOptions",
    "OptionError",
    "PlanOptions",
    "TransmlaOptions",
    "UnfinishedError",
    "VerifyOptions",
    "bench",
    "convert",
    "evaluate",
    "heal",
    "logits",
    "plan",
    "verify",
]
