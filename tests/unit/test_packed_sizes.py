"""Which components get how many bits: never more bytes than asked for, and no choice much better than the one made."""

from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_converters.latent import packed_sizes
from mla_converters.latent.packed_sizes import (
    GROWTH,
    NOISE,
    ROTARY_GROWTH,
    ROTARY_NOISE,
    WASTED,
    alignment_for,
    rounding_cost,
    segment,
    suited_format,
    uniform_format,
    widest_uniform,
)
from vllm_mla_plugin.checkpoint.cache_formats import ALIGNMENTS, PLANES, CacheFormat, Segment

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
PACKED = tuple(sorted(PLANES))


@st.composite
def costs(draw: st.DrawFn, least: int = 1, most: int = 200) -> list[float]:
    """Costs of components, largest first: falling slowly or fast, with steps, or all the same."""
    size = draw(st.integers(least, most))
    fall, step = draw(st.floats(0, 12)), draw(st.integers(1, 40))
    scale = 10.0 ** draw(st.integers(-6, 3))
    return [scale * 2.0 ** (-fall * (i // step * step) / size) for i in range(size)]


def groups(count: int) -> list[int]:
    """Sizes of the groups of ``count`` components: about 32, all the same but for the last."""
    size = -(-count // max(1, round(count / 32)))
    return [min(size, count - start) for start in range(0, count, size)]


ROWS = st.integers(1, 400)


@SETTINGS
@given(latent=costs(), rope=costs(most=70), row=ROWS)
def test_rows_hold_no_more_bytes_than_asked_for(latent: list[float], rope: list[float], row: int) -> None:
    """What is left out are the last components, and earlier ones never have fewer bits than later ones."""
    found = suited_format(latent, rope, row)
    if found is None:  # not even with two bits for each pair and for the first group of the latent
        halves = [segment(size, 2, size) for size in groups(len(rope))] * 2
        (first, *_) = groups(len(latent))
        assert CacheFormat((segment(first, 2, first),), tuple(halves)).content_bytes > row - row % alignment_for(row)
        return
    format, cost = found
    kept, rotary = format.sizes
    assert format.bytes_per_token <= row
    assert 1 <= kept <= len(latent) and rotary == 2 * len(rope)
    bits = [part.bits for part in format.latent]
    assert bits == sorted(bits, reverse=True)
    assert sum(latent[kept:]) <= cost * (1 + 1e-9) <= (sum(latent) + sum(rope)) * 2
    half = [b for part in format.rope for b in [part.bits] * part.size]
    assert half[: len(rope)] == half[len(rope) :] and half[: len(rope)] == sorted(half[: len(rope)], reverse=True)


@SETTINGS
@given(latent=costs(), rope=costs(most=70), row=st.integers(60, 400), more=st.integers(1, 100))
def test_more_bytes_never_cost_more(latent: list[float], rope: list[float], row: int, more: int) -> None:
    fewer, richer = suited_format(latent, rope, row), suited_format(latent, rope, row + more)
    if fewer is not None:
        assert richer is not None
        assert richer[1] <= fewer[1] * (1 + 1e-9)


def all_choices(latent: list[float], rope: list[float], size: int) -> list[tuple[int, float]]:
    """Bytes of a row and cost of every way to give bits to groups of ``size`` components, by the module's formulas."""

    def lost(costs: list[float], bits: int, noise: float, growth: float | None = None) -> float:
        if not bits:
            return sum(costs)
        mean_root = sum(cost**0.5 for cost in costs) / len(costs)
        growth = growth or GROWTH[segment(len(costs), bits, size).scaling]
        return noise * len(costs) * mean_root**2 * NOISE[bits] * (len(costs) / size) ** growth

    parts = [latent[start : start + size] for start in range(0, len(latent), size)]
    found = []
    for bits in product((0, *PACKED), repeat=len(parts)):
        kept = [segment(size, b, size) for b in bits if b]
        if not bits[0] or list(bits) != sorted(bits, reverse=True):
            continue
        for rotary in PACKED:
            both = segment(len(rope), rotary, len(rope))
            row = CacheFormat(tuple(kept), (both, both), alignment=4).content_bytes
            cost = sum(lost(part, b, 1.0) for part, b in zip(parts, bits, strict=True))
            found.append((row, cost + lost(rope, rotary, 2 * ROTARY_NOISE, ROTARY_GROWTH)))
    return found


@settings(max_examples=25, deadline=None, derandomize=True)
@given(latent=costs(24, 24), rope=costs(8, 8), row=st.integers(4, 22).map(lambda quarter: 4 * quarter))
def test_no_choice_is_better_by_more_than_a_step(latent: list[float], rope: list[float], row: int) -> None:
    """Of all choices, none with fewer bytes by the largest step (8 bits of a group and its scale) costs less; and none
    with the same bytes costs less than two thirds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_sizes, "GROUP", 8)
        patch.setattr(packed_sizes, "GROUPS", (8,))
        found = suited_format(latent, rope, row)
    choices = all_choices(latent, rope, 8)
    usable = row - row % alignment_for(row)
    best = min((cost for size, cost in choices if size <= usable), default=None)
    assert (found is None) == (best is None)
    if found is None or best is None:
        return
    format, cost = found
    assert any(size == format.content_bytes and chosen == pytest.approx(cost) for size, chosen in choices)
    assert cost <= 1.5 * best
    assert cost <= min((chosen for size, chosen in choices if size <= usable - 9), default=cost) * (1 + 1e-9)


def test_neighbours_with_the_same_bits_are_one_segment() -> None:
    """96 equal components, in three groups; 20 pairs whose halves have a group each."""
    found = suited_format([1.0] * 96, [1.0] * 20, 96)
    assert found is not None
    assert found[0].spec == "96x5g32/40x5g20"
    steep = suited_format([2.0 ** (-i // 2) for i in range(96)], [1.0] * 20, 64)
    assert steep is not None
    assert all(one.bits != other.bits for one, other in pairwise(steep[0].latent))


def test_segments_of_each_number_of_bits() -> None:
    """Scales are as fine as the bits deserve."""
    assert [str(segment(100, bits)) for bits in (2, 3, 4, 5, 6, 8, 16)] == [
        "100x2g32c",
        "100x3g32c",
        "100x4g32",
        "100x5g32",
        "100x6g32",
        "100x8g64s",
        "100x16",
    ]
    assert segment(5, 4) == Segment(5, 4, 5)


@SETTINGS
@given(latent=st.integers(1, 600), rope=st.integers(1, 100), bits=st.sampled_from((*PACKED, 16)))
def test_uniform_formats_waste_little(latent: int, rope: int, bits: int) -> None:
    format = uniform_format(latent, 2 * rope, bits)
    assert format.sizes == (latent, 2 * rope)
    assert {part.bits for part in (*format.latent, *format.rope)} == {bits}
    padding = format.bytes_per_token - format.content_bytes
    assert format.alignment == ALIGNMENTS[0] or padding <= WASTED * format.content_bytes


@SETTINGS
@given(rope=st.integers(1, 40), bits=st.sampled_from(PACKED), row=ROWS, widest=st.integers(1, 400))
def test_widest_uniform_is_the_widest(rope: int, bits: int, row: int, widest: int) -> None:
    """One component more would not fit."""
    format = widest_uniform(2 * rope, bits, row, widest)
    kept = 0 if format is None else format.sizes[0]
    if format is not None:
        assert format.bytes_per_token <= row and kept <= widest and format.sizes[1] == 2 * rope
    if kept < widest:
        wider = uniform_format(kept + 1, 2 * rope, bits)
        assert wider.content_bytes > row - row % alignment_for(row)


@SETTINGS
@given(row=st.integers(1, 5000))
def test_alignment(row: int) -> None:
    """As wide as wastes at most a fiftieth; more bytes never leave fewer to use."""
    alignment = alignment_for(row)
    assert alignment == ALIGNMENTS[0] or row % alignment <= WASTED * row
    for wider in (size for size in ALIGNMENTS if size > alignment):
        assert row % wider > WASTED * row
    assert row - row % alignment <= row + 1 - (row + 1) % alignment_for(row + 1)


@SETTINGS
@given(latent=costs(least=40), rope=costs(most=40), bits=st.sampled_from(PACKED))
def test_cost_of_uniform_formats(latent: list[float], rope: list[float], bits: int) -> None:
    """More bits cost less, and so do more components; with the same bits and bytes, chosen bits cost no more."""
    format = uniform_format(len(latent), 2 * len(rope), bits)
    cost = rounding_cost(format, latent, rope)
    narrower = rounding_cost(uniform_format(len(latent) - 8, 2 * len(rope), bits), latent, rope)
    assert cost <= narrower * 1.05
    for fewer in (b for b in PACKED if b < bits):
        assert cost < rounding_cost(uniform_format(len(latent), 2 * len(rope), fewer), latent, rope)
    chosen = suited_format(latent, rope, format.bytes_per_token + 16)
    assert chosen is not None and chosen[1] <= cost * 1.05


def test_nothing_fits() -> None:
    assert suited_format([1.0] * 32, [1.0] * 16, 8) is None
    assert suited_format([1.0] * 32, [1.0] * 16, 3) is None
    assert widest_uniform(32, 4, 16, 100) is None
