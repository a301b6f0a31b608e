"""Cache formats for a number of bytes: which components get how many bits.

Bits are given out where they save most. Rounding ``n`` components that share a scale costs about
``NOISE[bits] * n * mean(sqrt(c))²``, if ``c`` is what noise as large as their own spread would cost each of them, and
if they are scaled as :mod:`mla_converters.methods.attention_aware.noise` says. A component of the latent that is not
cached costs all of its ``c``.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vllm_mla_plugin.checkpoint.cache_formats import ALIGNMENTS, CacheFormat, Segment

# Squared errors relative to the numbers' squares, in groups of 32. Measured on SmolLM2's latents.
NOISE = {2: 0.11, 3: 0.031, 4: 0.0057, 5: 0.0014, 6: 0.00035, 8: 0.00002}
ROTARY_NOISE = 4.0
"""As much dearer is noise in rotary keys: there is 1.4 times as much, because their tokens differ more in size, and a
large error of a score costs more than its square says, because attention is its exponential. At 8% to 25% of the bytes,
errors of the attention outputs are least with 2.8 to 5.6, and 4% to 60% larger with 1.4."""
GROUP = 32
GROUPS = (16, 32)
"""Components that share a scale, as searched: fewer fit the scale better, and their bits are chosen more finely."""
GROWTH = {"compact": 0.4, "asymmetric": 0.6, "symmetric": 0.6}
"""Noise grows with this power of a group's size in the latent: a compact zero is coarse, whatever the size."""
ROTARY_GROWTH = 0.7
"""The same of rotary keys, where a group has more outliers the larger it is."""
SAFE_GROUP = 64  # of 8 bits, where scales need not be fine
COMPACT_BITS = 3  # up to here, a byte for each scale is better spent on more bits
WASTED = 0.02  # share of a row that may be padding


def segment(size: int, bits: int, group: int = GROUP) -> Segment:
    """Numbers with the scaling that suits their bits."""
    if bits == 16:
        return Segment(size, 16)
    if bits == 8:
        return Segment(size, 8, min(size, SAFE_GROUP), "symmetric")
    return Segment(size, bits, min(size, group), "compact" if bits <= COMPACT_BITS else "asymmetric")


def uniform_format(latent: int, rope: int, bits: int) -> CacheFormat:
    """A format with as many bits for every number."""
    format = CacheFormat((segment(latent, bits),), (segment(rope, bits),))
    content = format.content_bytes
    fitting = (size for size in reversed(ALIGNMENTS) if -content % size <= WASTED * content)
    return replace(format, alignment=next(fitting, ALIGNMENTS[0]))


def alignment_for(row_bytes: int) -> int:
    """The widest alignment of rows that leaves few of so many bytes unused."""
    fitting = (size for size in reversed(ALIGNMENTS) if row_bytes % size <= WASTED * row_bytes)
    return next(fitting, ALIGNMENTS[0])


def widest_uniform(rope: int, bits: int, row_bytes: int, widest: int) -> CacheFormat | None:
    """The format with as many bits for every number and the widest latent that fits; None if none fits.

    Args:
        rope: width of the rotary key.
        bits: of every number.
        row_bytes: bytes of a token in a layer.
        widest: limit on the latent.
    """
    alignment = alignment_for(row_bytes)
    for latent in range(min(widest, row_bytes * 8 // bits - rope), 0, -1):
        format = replace(uniform_format(latent, rope, bits), alignment=alignment)
        if format.bytes_per_token <= row_bytes:
            return format
    return None


@dataclass(frozen=True, order=True)
class _Group:
    """Components that share a scale; of a rotary key, the same ones of both halves.

    Attributes:
        size: how many components.
        cost: what rounding them costs, for a squared error of one relative to their squares.
        dropped: what leaving them out costs; infinite for a rotary key.
        copies: 2 for a rotary key, whose halves have a group each.
        bits: what they have.
    """

    size: int
    cost: float
    dropped: float
    copies: int
    bits: int

    @property
    def bytes(self) -> float:
        if not self.bits:
            return 0
        groups = segment(self.size, self.bits, self.size)
        scale = {"compact": 1, "asymmetric": 2, "symmetric": 1}[groups.scaling] * groups.groups
        return self.copies * (self.size * self.bits / 8 + scale)

    @property
    def loss(self) -> float:
        if not self.bits:
            return self.dropped
        growth = ROTARY_GROWTH if self.copies == 2 else GROWTH[segment(self.size, self.bits, self.size).scaling]
        return self.cost * NOISE[self.bits] * (self.size / GROUP) ** growth

    def finer(self) -> list["_Group"]:
        """The same components with more bits."""
        return [replace(self, bits=bits) for bits in NOISE if bits > self.bits]


def suited_format(latent: Sequence[float], rope: Sequence[float], row_bytes: int) -> tuple[CacheFormat, float] | None:
    """The format whose rounding costs least, and what it costs; None if not even two bits fit.

    Args:
        latent: cost of each component, largest first; as many as the latent may have at most.
        rope: cost of each pair of the rotary key, largest first, in each half.
        row_bytes: bytes of a token in a layer.
    """
    found = (_with_groups(latent, rope, row_bytes, group) for group in GROUPS)
    return min((each for each in found if each is not None), key=lambda each: each[1], default=None)


def _with_groups(
    latent: Sequence[float], rope: Sequence[float], row_bytes: int, group: int
) -> tuple[CacheFormat, float] | None:
    """:func:`suited_format` with groups of about one size."""
    alignment = alignment_for(row_bytes)
    row_bytes -= row_bytes % alignment
    least = min(NOISE)
    first, *others = _cut(latent, group)
    begun = [
        _group(first, 1, least, 1.0),
        *(_group(part, 1, 0, 1.0) for part in others),
        *(_group(part, 2, least, ROTARY_NOISE) for part in _cut(rope, group)),
    ]
    limit = float(row_bytes)
    while sum(group.bytes for group in begun) <= limit:
        groups = _improved(begun, limit)
        of_latent = [group for group in groups if group.copies == 1 and group.bits]
        of_rope = [group for group in groups if group.copies == 2]
        format = CacheFormat(_segments(of_latent), _segments([*of_rope, *of_rope]), alignment=alignment)
        if format.content_bytes <= row_bytes:
            return format, sum(group.loss for group in groups)
        # The codes of a segment fill whole bytes, those of a group need not: take the next choice that is smaller.
        limit = sum(group.bytes for group in groups) - 1 / 8
    return None


def _improved(groups: Sequence[_Group], row_bytes: float) -> list[_Group]:
    """The groups with the bits that save most for so many bytes, and in each part no more than the group before."""
    groups = list(groups)
    free = row_bytes - sum(group.bytes for group in groups)
    queue: list[tuple[float, int, _Group, _Group]] = []

    def offer(index: int) -> None:
        now = groups[index]
        for finer in now.finer():
            gain = (now.loss - finer.loss) / (finer.bytes - now.bytes)
            heapq.heappush(queue, (-gain, index, now, finer))

    def follows(index: int) -> bool:
        """Whether there is a group before it in the same part."""
        return 0 < index < len(groups) and groups[index - 1].copies == groups[index].copies

    for index in range(len(groups)):
        offer(index)
    while queue:
        _, index, now, finer = heapq.heappop(queue)
        if now != groups[index] or finer.bytes - now.bytes > free:
            continue
        if follows(index) and finer.bits > groups[index - 1].bits:
            continue  # offered again when the group before has more bits
        free -= finer.bytes - now.bytes
        groups[index] = finer
        offer(index)
        if follows(index + 1):
            offer(index + 1)
    return groups


def rounding_cost(format: CacheFormat, latent: Sequence[float], rope: Sequence[float]) -> float:
    """What a format with as many bits for every number costs; arguments as for :func:`suited_format`."""
    bits, kept = format.latent[0].bits, format.sizes[0]
    groups = [
        *(_group(part, 1, bits, 1.0) for part in _cut(latent[:kept], GROUP)),
        *(_group(part, 2, bits, ROTARY_NOISE) for part in _cut(rope, GROUP)),
    ]
    return sum(group.loss for group in groups) + sum(latent[kept:])


def _group(costs: Sequence[float], copies: int, bits: int, noise: float) -> _Group:
    mean_root = sum(cost**0.5 for cost in costs) / len(costs)
    return _Group(len(costs), copies * noise * len(costs) * mean_root**2, sum(costs), copies, bits)


def _cut(costs: Sequence[float], group: int) -> list[Sequence[float]]:
    """Parts of about ``group`` components, all of one size but for the last, which may be smaller."""
    count = max(1, round(len(costs) / group))
    size = -(-len(costs) // count)
    return [costs[start : start + size] for start in range(0, len(costs), size)]


def _segments(groups: Sequence[_Group]) -> tuple[Segment, ...]:
    """Neighbouring groups with the same number of bits become one segment."""
    merged: list[Segment] = []
    for group in groups:
        new = segment(group.size, group.bits, group.size)
        if merged and _continues(merged[-1], new):
            merged[-1] = replace(merged[-1], size=merged[-1].size + new.size)
        else:
            merged.append(new)
    return tuple(merged)


def _continues(last: Segment, new: Segment) -> bool:
    """Whether two segments are one: the same bits, and no group but the last smaller than the others."""
    return last.bits == new.bits and new.size <= last.group and last.size % last.group == 0
