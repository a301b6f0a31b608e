"""The result of every method for one layer: linear maps from the source's keys and values to MLA's.

The maps act on the keys, values and queries that the source computes before RoPE, so they do not depend on the form of
its projections. :func:`mla_weights` folds them into the projections of a layer.
"""

from dataclasses import dataclass, replace

import torch

ROTARY_MAP = "q_rope_map.weight"
"""The map from each head's query to its rotary query, by its name below ``self_attn.``."""


@dataclass(frozen=True)
class LatentMap:
    """The conversion of one layer with ``g`` KV heads of size ``d``. Tensors are float64 unless said otherwise.

    RoPE turns row ``i`` and row ``i + r / 2`` of the rope maps as one pair.

    Attributes:
        rope_freqs: ``[r / 2]`` float32, radians per position of the kept components.
        key_to_rope: ``[r, g * d]``; the shared rotary key is ``key_to_rope @ k``.
        query_to_rope: ``[g or H, r, d]``, one map per KV head or per query head; it makes the query's rotary part.
        query_to_nope: ``[g or H, n, d]``, the same for the query's part without RoPE.
        kv_to_latent: ``[R, 2 * g * d]``; the latent is ``kv_to_latent @ [k; v]``.
        latent_to_key: ``[g, n, R]``; makes the keys without RoPE that the queries of a KV head read.
        latent_to_value: ``[g, d, R]``; makes the values of each KV head.
    """

    rope_freqs: torch.Tensor
    key_to_rope: torch.Tensor
    query_to_rope: torch.Tensor
    query_to_nope: torch.Tensor
    kv_to_latent: torch.Tensor
    latent_to_key: torch.Tensor
    latent_to_value: torch.Tensor


def has_query_map(head_dim: int, hidden: int, rope: int, nope: int, normed: bool) -> bool:
    """Whether a layer stores each head's map from its own query to its rotary query, because that takes fewer numbers.

    Without the map, ``q_proj`` has ``n + r`` rows of ``D`` numbers for each head, and with QK-norm ``d + r``. With it,
    ``q_proj`` has ``d`` rows, and the map ``d * r`` numbers.

    Args:
        head_dim: ``d``.
        hidden: ``D``.
        rope: ``r``.
        nope: ``n``.
        normed: whether queries are normalised.
    """
    return head_dim * (hidden + rope) < ((head_dim if normed else nope) + rope) * hidden


def mla_weights(source: dict[str, torch.Tensor], maps: LatentMap) -> dict[str, torch.Tensor]:
    """Fold ``maps`` into the projections of one attention layer.

    Args:
        source: ``q_proj.weight`` ``[H * d, D]``, ``k_proj.weight`` and ``v_proj.weight``
            ``[g * d, D]``, ``o_proj.weight`` and possibly biases; ``q_norm.weight`` and ``k_norm.weight`` if queries
            and keys are normalised, ``[d]`` for each head or ``[H * d]`` and ``[g * d]`` for all together; any float
            dtype.
        maps: the layer's conversion.

    Returns:
        Tensors under DeepSeek's names: ``q_proj``, ``kv_a_proj_with_mqa`` (with biases if the source has them)
        and ``kv_b_proj`` in float64, ``rope_freqs`` in float32, and ``o_proj`` unchanged. Where :func:`has_query_map`
        says so, ``q_proj`` is the source's, ``q_rope_map.weight`` ``[H, d, r]`` maps queries to rotary queries, and
        ``kv_b_proj`` absorbs the map of the part without RoPE. For a layer with norms, see :func:`_qk_norm_weights`.
    """
    if "k_norm.weight" in source:
        return _qk_norm_weights(source, maps)
    kv_heads, head_dim, _ = maps.latent_to_value.shape
    heads = source["q_proj.weight"].shape[0] // head_dim
    key_up, value_up = _by_head(maps.latent_to_key, heads), _by_head(maps.latent_to_value, heads)
    mapped = _has_query_map(source, maps, heads)
    key_map = maps.kv_to_latent[:, : kv_heads * head_dim]
    value_map = maps.kv_to_latent[:, kv_heads * head_dim :]

    weights = {name: tensor for name, tensor in source.items() if name.startswith("o_proj.")}
    for kind in ("weight", "bias"):
        if f"q_proj.{kind}" not in source:
            continue
        q, k, v = (source[f"{name}_proj.{kind}"] for name in "qkv")
        k, v = k.to(key_map), v.to(key_map)
        weights[f"kv_a_proj_with_mqa.{kind}"] = torch.cat((key_map @ k + value_map @ v, maps.key_to_rope @ k))
        if not mapped:
            query_map = _by_head(torch.cat((maps.query_to_nope, maps.query_to_rope), dim=1), heads)  # [H, n + r, d]
            q = torch.einsum("hnd,hd...->hn...", query_map, q.to(query_map).unflatten(0, (heads, head_dim)))
            q = q.flatten(0, 1)
        weights[f"q_proj.{kind}"] = q.to(key_map.device)
    if mapped:
        weights[ROTARY_MAP] = _by_head(maps.query_to_rope, heads).mT.contiguous()
        key_up = _by_head(maps.query_to_nope, heads).mT @ key_up if key_up.shape[1] else key_up  # [H, d, R]
    weights["kv_b_proj.weight"] = torch.cat((key_up, value_up), dim=1).flatten(0, 1)
    weights["rope_freqs"] = maps.rope_freqs.clone()
    return weights


def _qk_norm_weights(source: dict[str, torch.Tensor], maps: LatentMap) -> dict[str, torch.Tensor]:
    """Fold ``maps`` into a layer that normalises queries and keys (QK-norm).

    The norm is not linear, but folding approximates nothing, because the norm comes before the cache:

    - Keys: the source's projection to keys and its norm stay. The cached numbers are a linear map of the normalised
      keys and the layer's input.
    - Rotary queries: a rotary query is a linear map of the normalised query. Where :func:`has_query_map` says so,
      ``q_rope_map`` is that map, and the weight of the norm is folded into it. Elsewhere the rotary query is computed
      as a linear map of the layer's input, divided by the query's root mean square: in ``q_proj``, its rows follow the
      source's in each head.
    - Queries without RoPE: ``q_proj`` needs no rows for them, because ``kv_b_proj`` absorbs their map and the weight
      of their norm.

    Returns:
        The source's ``k_proj``, ``k_norm`` and ``o_proj``, and ``q_proj`` if ``q_rope_map.weight`` ``[H, d, r]`` is
        there; in float64 that, or else ``q_proj`` ``[H * (d + r), D]``; ``kv_a_proj_with_mqa`` ``[R + r, g * d + D]``,
        which acts on ``[k; x]``, and ``kv_b_proj.weight``; biases if the source has them; ``rope_freqs`` in float32.
    """
    kv_heads, head_dim, _ = maps.latent_to_value.shape
    heads = source["q_proj.weight"].shape[0] // head_dim
    key_map, value_map = maps.kv_to_latent.split(kv_heads * head_dim, dim=1)
    norm = source["q_norm.weight"].to(value_map).view(-1, 1, head_dim)  # [1 or H, 1, d]
    query_to_rope = _by_head(maps.query_to_rope, heads) * norm  # [H, r, d]
    key_up, value_up = _by_head(maps.latent_to_key, heads), _by_head(maps.latent_to_value, heads)
    if key_up.shape[1]:
        key_up = norm.mT * (_by_head(maps.query_to_nope, heads).mT @ key_up)  # [H, d, R]
    kept = ("k_proj.", "k_norm.", "o_proj.")
    weights = {name: tensor for name, tensor in source.items() if name.startswith(kept)} | {
        "kv_b_proj.weight": torch.cat((key_up, value_up), dim=1).flatten(0, 1),
        "rope_freqs": maps.rope_freqs.clone(),
    }
    mapped = _has_query_map(source, maps, heads)
    if mapped:
        weights[ROTARY_MAP] = query_to_rope.mT.contiguous()
        weights |= {name: tensor.to(norm.device) for name, tensor in source.items() if name.startswith("q_proj.")}
    for kind in ("weight", "bias"):
        if f"q_proj.{kind}" in source and not mapped:
            queries = source[f"q_proj.{kind}"].to(norm).unflatten(0, (heads, head_dim))  # [H, d, D], or [H, d]
            rotary = torch.einsum("hrd,hd...->hr...", query_to_rope, queries)
            weights[f"q_proj.{kind}"] = torch.cat((queries, rotary), dim=1).flatten(0, 1)
        if f"v_proj.{kind}" in source:
            values = value_map @ source[f"v_proj.{kind}"].to(value_map)
            none = values.new_zeros(len(maps.key_to_rope), *values.shape[1:])  # the rotary key reads no values
            weights[f"kv_a_proj_with_mqa.{kind}"] = torch.cat((values, none))
    name = "kv_a_proj_with_mqa.weight"
    weights[name] = torch.cat((torch.cat((key_map, maps.key_to_rope)), weights[name]), dim=1)
    return weights


def _has_query_map(source: dict[str, torch.Tensor], maps: LatentMap, heads: int) -> bool:
    rows, hidden = source["q_proj.weight"].shape
    rope, nope = len(maps.key_to_rope), maps.query_to_nope.shape[1]
    return has_query_map(rows // heads, hidden, rope, nope, "k_norm.weight" in source)


def _by_head(maps: torch.Tensor, heads: int) -> torch.Tensor:
    """Repeat maps of KV heads ``[g, ...]`` to maps of query heads ``[H, ...]``; leave maps of query heads alone."""
    return maps.repeat_interleave(heads // len(maps), dim=0)


def balanced(maps: LatentMap, key_value: torch.Tensor) -> LatentMap:
    """The same function, with every cached component scaled to a mean square of one.

    An invertible map of the latent does not change the function, so its scale is free. At this scale a cache of 8-bit
    floats (e4m3, scale 1) neither overflows nor underflows, and one step size fits all components when the layer is
    refitted.

    Args:
        maps: a layer's conversion.
        key_value: ``[2 * g * d, 2 * g * d]`` second moments of ``[k; v]``.
    """
    width = maps.key_to_rope.shape[1]
    pairs = len(maps.rope_freqs)
    latent = _rms(maps.kv_to_latent, key_value)
    rope = _rms(maps.key_to_rope, key_value[:width, :width])
    rope = rope.view(2, pairs).square().mean(0).sqrt().repeat(2)  # one scale for both halves of a pair
    return replace(
        maps,
        key_to_rope=maps.key_to_rope / rope[:, None],
        query_to_rope=maps.query_to_rope * rope[:, None],
        kv_to_latent=maps.kv_to_latent / latent[:, None],
        latent_to_key=maps.latent_to_key * latent,
        latent_to_value=maps.latent_to_value * latent,
    )


def _rms(rows: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """Root mean square of ``rows @ x`` where ``E x xᵀ = moments``; clamped, so that dividing by it cannot blow up."""
    squares = ((rows @ moments) * rows).sum(-1).clamp(min=0)
    squares = squares.clamp(min=1e-12 * squares.max())
    return torch.where(squares.any(), squares, 1.0).sqrt()  # all inputs may be zero
