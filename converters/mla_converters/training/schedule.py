"""Length, passes and learning rate that suit a model, by how much its conversion lost."""

import math

RATE = 0.002  # of a model that is 1 nat per token from its source, in steps of 512 tokens
LONGEST, SHORTEST = 1024, 256  # tokens in a window
LITTLE = 0.2  # nats per token, up to which each window is seen once, and beyond it twice


def suited_length(divergence: float) -> int:
    """Tokens in a window for a model that is so many nats per token from its source.

    Where little was lost, it was lost at long distances; where much was, more steps on fewer tokens bring more.
    Measured, each window once, at 0.16 nats (1,024 better than 512, and that than 256) and at 1.9 (256 better than 512,
    and that than 1,024); at 0.48, 512 twice is better than 1,024 once."""
    length = LONGEST
    while length > SHORTEST and length * divergence > 400:
        length //= 2
    return length


def suited_passes(divergence: float) -> int:
    """How often a model that is so many nats per token from its source should see each window.

    Measured at 0.10 nats (twice loses 0.8% more perplexity than once), at 0.31 (0.4% less), at 0.48 (2% less, in
    windows of 512 for 1,024) and at 1.1 (5% less)."""
    return 2 if divergence > LITTLE else 1


def suited_rate(divergence: float, tokens: int) -> float:
    """A learning rate for a model that is so many nats per token from its source, in steps of so many tokens.

    The more was lost, the further have weights to go; the fewer tokens in a step, the less is known of where to.
    Measured at 0.16 nats (512 tokens: 0.0006 and 0.001 alike, 0.002 worse; 256: 0.0004 and 0.0006 alike) and at 1.8
    (512: 0.002 and 0.003 alike, 0.001 worse; 256: 0.002 better than 0.0014; 128: 0.002 fails, 0.0014 does not)."""
    return RATE * math.sqrt(divergence * tokens / 512)
