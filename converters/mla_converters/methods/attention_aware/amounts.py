"""How much text method ``attention-aware`` needs, and how many random tokens it adds."""

from bisect import bisect_left

WINDOW = 2048  # tokens in a window; long, because components that lose RoPE must be right at long distances too
RANDOM_SHARE = 1 / 8  # weight of the random tokens, as a share of the weight of all tokens
MIN_RANDOM = 512  # the least number of random tokens, unless a window is shorter
LEAST = 8  # tokens per number in the heads' outputs; with fewer, the fit may be noise and magnify rounding errors


def enough_tokens(tokens: int, read: int) -> bool:
    """Whether ``tokens`` are enough to fit a linear map from ``read`` numbers to an output."""
    return tokens >= LEAST * read


def random_count(tokens: int, window: int = WINDOW) -> int:
    """How many random tokens pass through the layers in addition to ``tokens`` of text.

    They are :data:`RANDOM_SHARE` of the text, but at least :data:`MIN_RANDOM`, because fewer could not tell
    a layer's directions apart, and at most one window.
    """
    return min(window, max(MIN_RANDOM, int(RANDOM_SHARE * tokens)))


def enough_text(tokens: int, read: int, window: int = WINDOW) -> bool:
    """Whether the text and its random tokens are enough to fit outputs by least squares, from ``read`` numbers each."""
    return enough_tokens(tokens + random_count(tokens, window), read)


def too_little_text(read: int) -> str:
    """The warning to give if a text is not enough, see :func:`enough_text`."""
    windows = bisect_left(range(read + 1), True, lo=1, key=lambda windows: enough_text(windows * WINDOW, read))
    return (
        "There are too few calibration tokens to fit the output projections, which then stay as they are: give "
        f"--calibration-tokens {windows * WINDOW} or more, and as much text."
    )
