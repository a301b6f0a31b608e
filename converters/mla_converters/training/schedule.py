"""Window length, passes and learning rate for healing a model, from how much its conversion lost."""

import math

RATE = 0.002  # learning rate for a model that is 1 nat per token from its teacher, in steps of 512 tokens
SMALL = 0.16  # nats per token; with less, the root gave rates that made packed models worse
TEXT_RATE = 0.0005  # learning rate on text alone, in steps of 512 tokens
MOST_TOKENS = 8192  # in a step; the rate for more is the same
SCALES = {"attention": 1.0, "all": 0.5, "lora": 1.0}  # of the rate, by what is trained
LONGEST, SHORTEST = 1024, 256  # tokens in a window
LITTLE = 0.2  # nats per token; with at most this loss each window is seen once, and with more it is seen twice


def suited_length(divergence: float) -> int:
    """Tokens in a window for a model that is ``divergence`` nats per token from its source.

    A model that lost little lost it at long distances, so it needs long windows. A model that lost much gains more from
    more steps on fewer tokens. Measured, with each window seen once unless the table says otherwise:

    ================== ==========================================
    nats per token     window lengths, best first
    ================== ==========================================
    0.16               1,024; 512; 256
    0.48               512, each seen twice; 1,024, each seen once
    1.9                256; 512; 1,024
    ================== ==========================================
    """
    length = LONGEST
    while length > SHORTEST and length * divergence > 400:
        length //= 2
    return length


def suited_passes(divergence: float | None) -> int:
    """How often a model that is ``divergence`` nats per token from its source should see each window.

    Measured:

    ================== ==========================================================
    nats per token     perplexity after seeing windows twice instead of once
    ================== ==========================================================
    0.10               0.8% higher
    0.31               0.4% lower
    0.48               2% lower (windows of 512 seen twice, of 1,024 seen once)
    1.1                5% lower
    ================== ==========================================================

    Without a teacher (None), once.
    """
    return 2 if divergence is not None and divergence > LITTLE else 1


def suited_rate(divergence: float | None, tokens: int, train: str = "attention", on_text: bool = False) -> float:
    """A learning rate for a model that is ``divergence`` nats per token from its teacher.

    The rate grows with the root of the divergence, because weights have further to go, and below :data:`SMALL` with
    the divergence itself. It shrinks with fewer tokens in a step, because their gradient is less certain. Measured:

    ================== ============ ==============================================
    nats per token     tokens       learning rates
    ================== ============ ==============================================
    0.01 (packed)      1,024        0.0001 is better than 0.0002; 0.0004 is too much
    0.16               512          0.0006 and 0.001 equally good; 0.002 is worse
    0.16               256          0.0004 and 0.0006 equally good
    1.8                512          0.002 and 0.003 equally good; 0.001 is worse
    1.8                256          0.002 is better than 0.0014
    1.8                128          0.0014 works; 0.002 fails
    ================== ============ ==============================================

    A model may lose nothing and still learn a text, so training on text has a rate that does not need a divergence.

    Args:
        divergence: nats per token; None if there is no teacher. Rounding may leave a little less than nothing.
        tokens: in a step.
        train: the weights that are trained.
        on_text: whether the text itself is learnt, too.
    """
    lost = max(divergence or 0.0, 0.0)
    rate = max(RATE * math.sqrt(lost * min(1.0, lost / SMALL)), TEXT_RATE if on_text else 0.0)
    return SCALES[train] * rate * math.sqrt(min(tokens, MOST_TOKENS) / 512)
