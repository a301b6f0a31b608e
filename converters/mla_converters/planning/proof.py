"""What the proof of a converted model takes, see :mod:`mla_converters.proof`."""

from mla_converters.checkpoints.shape import Shape

PROOF = 1.8e-8  # core-seconds per parameter, of reading and running both models; 2.4 for 135 million, one EPYC core


def proof_core_seconds(shape: Shape) -> float:
    """Core-seconds of the proof: ``PROOF * parameters``. Its memory is less than the conversion's."""
    return PROOF * shape.parameters
