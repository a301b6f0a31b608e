"""What the proof of a converted model and the measurement of its loss take.

See :mod:`mla_converters.proof` and :mod:`mla_converters.streaming.loss`.
"""

from mla_converters.checkpoints.shape import Shape
from mla_converters.text.held_out import LENGTH, WINDOWS

PROOF = 1.8e-8  # core-seconds per parameter, of reading and running both models; 2.4 for 135 million, one EPYC core
LOSS = 2.2e-11  # core-seconds per parameter and token of each of the two models, in float32


def proof_core_seconds(shape: Shape) -> float:
    """Core-seconds: ``(PROOF + 2 * LOSS * tokens held out) * parameters``. The memory is less than the conversion's."""
    return (PROOF + 2 * LOSS * WINDOWS * LENGTH) * shape.parameters
