"""Packed formats of the latent cache: how many bits each cached number has, and where they lie in a token's row.

A layer caches ``kv_lora_rank`` numbers of the latent and ``qk_rope_head_dim`` of the rotary key for each token. A
:class:`CacheFormat` cuts both into segments; the numbers of a segment have the same number of bits, and each group of
neighbouring numbers shares a scale. Everything else follows from this description: the bytes of a token
(:attr:`CacheFormat.bytes_per_token`), the layout of its row (:attr:`CacheFormat.pieces`), the code that packs and
unpacks it, and the kernels. This module imports neither torch nor vLLM.

To build a format, list its segments::

    CacheFormat(latent=(Segment(64, bits=4), Segment(144, bits=2, group=48, scaling="compact")),
                rope=(Segment(56, bits=6, group=56),))

or write it as text, which is also its name: ``CacheFormat.parse("64x4g32+144x2g48c/56x6g56")``. A segment is
``{size}x{bits}``, then ``g{group}``, then ``s`` (symmetric) or ``c`` (compact), if it is not asymmetric.

In ``config.json``, the field ``latent_cache`` holds what
:func:`vllm_mla_plugin.checkpoint.latent_cache.latent_cache_json` returns. With a mean that is taken out (the default),
each layer has ``self_attn.cache_mean``, ``[2, kv_lora_rank + qk_rope_head_dim]`` float32: the means of what
``kv_a_proj_with_mqa`` gives (the rotary key before RoPE), of tokens at position 0 and of all others. The first token
has its own because many models attend to it from everywhere, and what it caches hardly depends on the text: on SmolLM2
with all of its cache in 4 bits, its own mean takes three quarters of the divergence from 16 bits away.

How a group of codes ``0 ... 2**bits - 1`` is read: ``scale * (code - zero)``. The scale is a float of 8 bits without a
sign: on SmolLM2's latents it costs 3% more squared error than a scale and a minimum in float16, at half the bytes.

============ ============================ =========================================== ============
scaling      scale                        zero                                        bytes
============ ============================ =========================================== ============
symmetric    e5m3, 8 bits                 the middle of the codes                     1
asymmetric   e5m3, 8 bits                 8 bits: ``byte * 2**(bits - 8)``            2
compact      e4m1, the upper 5 bits       the lower 3: ``(z + 1/2) * 2**(bits - 3)``  1
============ ============================ =========================================== ============

Squared errors relative to the numbers' squares, measured on SmolLM2's latents (208 + 56): 4 bits in groups of 32:
0.0055 asymmetric, 0.0077 symmetric, 0.0083 compact; 2 bits in groups of 32: 0.098, 0.111, 0.105. So ``asymmetric`` is
best at 4 bits and above; below, ``compact`` loses little and saves a byte a group.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self, get_args

Scaling = Literal["symmetric", "asymmetric", "compact"]
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
"""A code's bits, lowest first, in pieces that divide a byte evenly."""
ALIGNMENTS = (4, 8, 16)
"""Bytes. 16 is the widest load of a GPU; less saves bytes where rows are short."""
GROUP_BYTES = {"symmetric": 1, "asymmetric": 2, "compact": 1}
MAX_COMPACT_BITS = 4
"""A compact scale is coarse: with more bits, its rounding would be most of the error."""
_SEGMENT = re.compile(r"(\d+)x(\d+)(?:g(\d+)([sc]?))?")
_LETTERS = {"symmetric": "s", "asymmetric": "", "compact": "c"}


@dataclass(frozen=True)
class Segment:
    """Neighbouring numbers with the same number of bits.

    Attributes:
        size: how many numbers.
        bits: of each: 2, 3, 4, 5, 6, 8; or 16 for float16, which has no groups.
        group: how many neighbours share a scale; the last group may be smaller.
        scaling: how a group's scale and zero are kept; see the module's table.

    Raises:
        ValueError: the numbers contradict each other.
    """

    size: int
    bits: int = 4
    group: int = 32
    scaling: Scaling = "asymmetric"

    def __post_init__(self) -> None:
        for name in ("size", "bits", "group"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"A segment's {name} is {value!r}, but must be a whole number of at least 1.")
        if self.bits not in (*PLANES, 16):
            raise ValueError(
                f"A segment has {self.bits} bits a number, but can have {', '.join(map(str, PLANES))} or 16."
            )
        if self.scaling not in get_args(Scaling):
            raise ValueError(f"A segment's scaling is {self.scaling!r}, but must be {', '.join(get_args(Scaling))}.")
        if self.scaling == "compact" and self.bits > MAX_COMPACT_BITS:
            raise ValueError(
                f"A compact scale is too coarse for {self.bits} bits a number: give at most {MAX_COMPACT_BITS}, or "
                "another scaling."
            )

    @property
    def groups(self) -> int:
        """How many scales the segment has."""
        return 0 if self.bits == 16 else -(-self.size // self.group)

    def __str__(self) -> str:
        groups = "" if self.bits == 16 else f"g{self.group}{_LETTERS[self.scaling]}"
        return f"{self.size}x{self.bits}{groups}"


@dataclass(frozen=True)
class Plane:
    """Some bits of all codes of a segment, packed densely.

    Byte ``i`` of the plane holds numbers ``i``, ``i + stride``, ``i + 2 * stride`` ..., the first in its lowest bits:
    a vector of bytes becomes vectors of neighbouring numbers by shifts alone.

    Attributes:
        bits: of each number here: 1, 2, 4, 8; or 16 for float16 (then ``stride`` is the number of bytes).
        shift: where they belong in the code.
        offset: of the plane's first byte in the row.
        stride: bytes of the plane.
    """

    bits: int
    shift: int
    offset: int
    stride: int


@dataclass(frozen=True)
class Piece:
    """Where a segment lies in a row.

    Attributes:
        segment: what lies there.
        first: index of its first number in ``[latent | rotary key]``.
        planes: its codes.
        scales: offset of the bytes with scales, one for each group.
        zeros: offset of the bytes with zeros; used by asymmetric groups only.
    """

    segment: Segment
    first: int
    planes: tuple[Plane, ...]
    scales: int
    zeros: int


@dataclass(frozen=True)
class CacheFormat:
    """How one layer's cache is packed.

    Attributes:
        latent: segments of the latent, ``kv_lora_rank`` numbers in all.
        rope: segments of the rotary key after RoPE, ``qk_rope_head_dim`` numbers in all.
        mean: whether the layer's mean is taken out before packing. It costs no cache: of the latent it is a constant,
            of the rotary key a constant turned by the token's position. Keys have large means; without them, 6 bits
            lose nothing, and 5 bits half as much.
        alignment: rows are padded to a multiple of so many bytes.

    Raises:
        ValueError: there are no segments, or the alignment is none of ``ALIGNMENTS``.
    """

    latent: tuple[Segment, ...]
    rope: tuple[Segment, ...]
    mean: bool = True
    alignment: int = 16

    def __post_init__(self) -> None:
        for name in ("latent", "rope"):
            if not getattr(self, name):
                raise ValueError(f"A cache format needs at least one segment for its {name!r} part.")
        if not isinstance(self.mean, bool):
            raise ValueError(f"A cache format's mean is {self.mean!r}, but must be true or false.")
        if self.alignment not in ALIGNMENTS:
            raise ValueError(
                f"Rows are to be padded to multiples of {self.alignment!r} bytes, but can be to "
                f"{', '.join(map(str, ALIGNMENTS))}."
            )

    @property
    def sizes(self) -> tuple[int, int]:
        """``(kv_lora_rank, qk_rope_head_dim)``."""
        return sum(segment.size for segment in self.latent), sum(segment.size for segment in self.rope)

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """Where each segment lies in a row: the codes of all, then the scales and zeros of all."""
        segments = (*self.latent, *self.rope)
        offset, planes = 0, []
        for segment in segments:
            offset, own = _place(segment, offset)
            planes.append(own)
        pieces, first = [], 0
        for segment, own in zip(segments, planes, strict=True):
            zeros = offset + segment.groups
            pieces.append(Piece(segment, first, own, offset, zeros))
            offset += segment.groups * GROUP_BYTES[segment.scaling]
            first += segment.size
        return tuple(pieces)

    @property
    def content_bytes(self) -> int:
        """Bytes of a token's row without padding."""
        last = self.pieces[-1]
        return last.scales + last.segment.groups * GROUP_BYTES[last.segment.scaling]

    @property
    def bytes_per_token(self) -> int:
        """Bytes that a token takes in a layer, padded to ``alignment``: what vLLM allocates."""
        return -(-self.content_bytes // self.alignment) * self.alignment

    @property
    def spec(self) -> str:
        """The format as :meth:`parse` reads it."""
        parts = ("+".join(map(str, self.latent)), "+".join(map(str, self.rope)))
        options = [*([] if self.mean else ["nomean"]), *([] if self.alignment == 16 else [f"a{self.alignment}"])]
        return "/".join((*parts, *options))

    @property
    def name(self) -> str:
        """A short name, such as ``mla_128x4g32_64x8g64``; different formats have different names."""
        return f"mla_{self.spec.replace('/', '_')}"

    @classmethod
    def parse(cls, spec: str) -> Self:
        """The format of a text such as ``64x4g32+144x2g48c/56x6g56``.

        After the segments of latent and rotary key may follow ``/nomean`` and ``/a4`` (rows padded to 4 bytes).

        Raises:
            ValueError: the text is no format.
        """
        parts = spec.split("/")
        options: dict[str, Any] = {}
        for option in parts[2:]:
            if option == "nomean" and "mean" not in options:
                options["mean"] = False
            elif re.fullmatch(r"a\d+", option) and "alignment" not in options:
                options["alignment"] = int(option[1:])
            else:
                raise ValueError(f"Cache format {spec!r} ends in {option!r}, but only 'nomean' or 'a4' can follow.")
        if len(parts) < 2:
            raise ValueError(
                f"Cache format {spec!r} needs two parts, latent/rotary key, such as '64x4g32+144x2g48c/56x6g56'."
            )
        latent, rope = (tuple(_parse_segment(text, spec) for text in part.split("+")) for part in parts[:2])
        return cls(latent, rope, **options)


def _place(segment: Segment, offset: int) -> tuple[int, tuple[Plane, ...]]:
    """The planes of a segment from ``offset`` on, and where they end."""
    if segment.bits == 16:
        offset += offset % 2
        return offset + 2 * segment.size, (Plane(16, 0, offset, 2 * segment.size),)
    planes, shift = [], 0
    for bits in PLANES[segment.bits]:
        stride = -(-segment.size * bits // 8)
        planes.append(Plane(bits, shift, offset, stride))
        offset, shift = offset + stride, shift + bits
    return offset, tuple(planes)


def _parse_segment(text: str, spec: str) -> Segment:
    match = _SEGMENT.fullmatch(text)
    if match is None:
        raise ValueError(f"Segment {text!r} of cache format {spec!r} is not like '64x4g32' (size x bits, group).")
    size, bits, group, letter = match.groups()
    if (bits == "16") == (group is not None):
        raise ValueError(f"Segment {text!r} of cache format {spec!r} needs a group, unless it has 16 bits.")
    if group is None:
        return Segment(int(size), 16)
    scaling = next(name for name, known in _LETTERS.items() if known == letter)
    return Segment(int(size), int(bits), int(group), scaling)  # type: ignore[arg-type]  # a key of _LETTERS
