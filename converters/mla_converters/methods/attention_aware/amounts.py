"""How much text method ``attention-aware`` needs, and how many random tokens go beside it."""

from bisect import bisect_left

WINDOW = 2048  # tokens in a window: what loses RoPE must be right at long distances too
RANDOM_SHARE = 1 / 8  # weight of the random tokens among all tokens
MIN_RANDOM = 512  # random tokens, where a window has as many
LEAST = 8  # tokens for each number that is read; with fewer, the fit may be noise, and magnify rounding


def enough_tokens(tokens: int, read: int) -> bool:
    """Whether this many tokens can tell how an output should be made of ``read`` numbers."""
    return tokens >= LEAST * read


def random_count(tokens: int, window: int = WINDOW) -> int:
    """How many random tokens pass through the layers beside ``tokens`` of text: their share, but enough to tell a
    layer's directions apart, and no more than a window."""
    return min(window, max(MIN_RANDOM, int(RANDOM_SHARE * tokens)))


def enough_text(tokens: int, read: int, window: int = WINDOW) -> bool:
    """Whether the text and the random tokens beside it are enough for least squares of outputs that are made of
    ``read`` numbers."""
    return enough_tokens(tokens + random_count(tokens, window), read)


def too_little_text(read: int) -> str:
    """The warning for a text that is not :func:`enough_text`."""
    windows = bisect_left(range(read + 1), True, lo=1, key=lambda windows: enough_text(windows * WINDOW, read))
    return (
        "There are too few calibration tokens to fit the output projections, which then stay as they are: give "
        f"--calibration-tokens {windows * WINDOW} or more, and as much text."
    )
