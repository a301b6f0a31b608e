"""What it takes that a model writes its own calibration text."""

from mla_converters.checkpoints.shape import Shape
from mla_converters.methods.cost import RUNTIME_BYTES
from mla_converters.text.sampling import TOKENS, sampling_dtype

SAMPLING = 5e-11  # core-seconds per sampled token and parameter of the model; of an EPYC without AVX-512, in float32


def sampling_core_seconds(shape: Shape, tokens: int) -> float:
    """Core-seconds to sample ``tokens``: ``tokens * parameters * SAMPLING``."""
    return SAMPLING * tokens * shape.parameters


def sampling_memory(shape: Shape, tokens: int) -> int:
    """Peak bytes of memory on this machine: the model, and its KV cache for the texts that are written at a time."""
    cached = min(tokens, TOKENS) * shape.layers * shape.cached
    return RUNTIME_BYTES + sampling_dtype("cpu").itemsize * (shape.parameters + cached)
