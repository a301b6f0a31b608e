"""What each step of healing trains on: how long windows are, how often each is seen, and in what order."""

from itertools import count, groupby, islice

import torch

from mla_converters.options import HealOptions
from mla_converters.training_text import divided

LONGEST, SHORTEST = 1024, 256  # tokens in a window
LITTLE = 0.2  # nats per token, up to which each window is seen once, and beyond it twice


def suited_length(divergence: float) -> int:
    """Tokens in a window for a model that is so many nats per token from its source, to begin with.

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


def curriculum(windows: torch.Tensor, divergence: float, options: HealOptions) -> list[torch.Tensor]:
    """Token ids ``[windows, tokens]`` of each step of Adam.

    Windows that are short to begin with are whole when they come again: what is left by then was lost at long
    distances. Measured at 1.7 nats: 256 and then 1,024 lose 1.7% less perplexity than 256 twice, and 3.8% less in
    windows of 4,096.

    Args:
        windows: ``[windows, tokens]``, as long as they get.
        divergence: nats per token from the source, before.
        options: of ``length`` and ``steps``, either keeps all windows of one length; batch and seed.
    """
    first = windows if options.length else divided(windows, suited_length(divergence))
    if options.steps:
        endless = (batch for number in count() for batch in _shuffled(first, number, options))
        return list(islice(endless, options.steps))
    passes = [first, windows][: suited_passes(divergence)]
    return [batch for number, each in enumerate(passes) for batch in _shuffled(each, number, options)]


def _shuffled(windows: torch.Tensor, number: int, options: HealOptions) -> tuple[torch.Tensor, ...]:
    """All windows in an order that the round's number and the seed give, in batches."""
    generator = torch.Generator().manual_seed(options.seed + number)
    return windows[torch.randperm(len(windows), generator=generator)].split(options.batch_size)


def rounds(batches: list[torch.Tensor]) -> list[dict[str, int]]:
    """Runs of steps on windows of one length: how many, and tokens in a window."""
    return [
        {"steps": len(list(alike)), "window": window} for window, alike in groupby(batch.shape[1] for batch in batches)
    ]


def described(rounds: list[dict[str, int]], batch_size: int) -> str:
    """Rounds in words."""
    return ", then ".join(f"{each['steps']:,} steps of {batch_size} x {each['window']:,} tokens" for each in rounds)
