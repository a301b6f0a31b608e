"""What every method produces for a layer: linear maps from the source's keys and values to MLA's.

The maps act on keys, values and queries as the source computes them before RoPE, so they know
nothing of weights; :func:`mla_weights` folds them into a layer's projections.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LatentMap:
    """One layer's conversion, for ``g`` KV heads of size ``d``. All float64 unless said otherwise.

    RoPE pairs lie in halves: row ``i`` and row ``i + r / 2`` of the rope maps turn together.

    Attributes:
        rope_freqs: ``[r / 2]`` float32, radians per position of the kept components.
        key_to_rope: ``[r, g * d]``; the shared rotary key is ``key_to_rope @ k``.
        query_to_rope: ``[g, r, d]``; for a query head that reads KV head ``h``, ``query_to_rope[h] @ q``.
        query_to_nope: ``[g, n, d]``, likewise for the part without RoPE.
        kv_to_latent: ``[R, 2 * g * d]``; the latent is ``kv_to_latent @ [k; v]``.
        latent_to_key: ``[g, n, R]``, the keys without RoPE that KV head ``h`` shows its queries.
        latent_to_value: ``[g, d, R]``.
    """

    rope_freqs: torch.Tensor
    key_to_rope: torch.Tensor
    query_to_rope: torch.Tensor
    query_to_nope: torch.Tensor
    kv_to_latent: torch.Tensor
    latent_to_key: torch.Tensor
    latent_to_value: torch.Tensor


def mla_weights(source: dict[str, torch.Tensor], maps: LatentMap) -> dict[str, torch.Tensor]:
    """Fold ``maps`` into the projections of one attention layer.

    Args:
        source: ``q_proj.weight`` ``[H * d, D]``, ``k_proj.weight`` and ``v_proj.weight``
            ``[g * d, D]``, and possibly their biases; any float dtype.
        maps: the layer's conversion.

    Returns:
        DeepSeek's names: ``q_proj``, ``kv_a_proj_with_mqa`` (with biases if the source has them)
        and ``kv_b_proj`` in float64, and ``rope_freqs`` in float32.
    """
    kv_heads, _, head_dim = maps.query_to_rope.shape
    query_map = torch.cat((maps.query_to_nope, maps.query_to_rope), dim=1)  # [g, n + r, d]
    key_map = maps.kv_to_latent[:, : kv_heads * head_dim]
    value_map = maps.kv_to_latent[:, kv_heads * head_dim :]

    weights = {}
    for kind in ("weight", "bias"):
        if f"q_proj.{kind}" not in source:
            continue
        q, k, v = (source[f"{p}_proj.{kind}"].double().reshape(source[f"{p}_proj.{kind}"].shape[0], -1) for p in "qkv")
        q = q.view(kv_heads, -1, head_dim, q.shape[-1])  # [g, H / g, d, D], D = 1 for a bias
        q = torch.einsum("gmd,ghdD->ghmD", query_map, q)
        parts = {
            "q_proj": q.flatten(0, 2),
            "kv_a_proj_with_mqa": torch.cat((key_map @ k + value_map @ v, maps.key_to_rope @ k)),
        }
        for name, tensor in parts.items():
            weights[f"{name}.{kind}"] = tensor if kind == "weight" else tensor.squeeze(-1)

    groups = source["q_proj.weight"].shape[0] // (kv_heads * head_dim)
    up = torch.cat((maps.latent_to_key, maps.latent_to_value), dim=1)  # [g, n + d, R]
    weights["kv_b_proj.weight"] = up.repeat_interleave(groups, dim=0).flatten(0, 1)
    weights["rope_freqs"] = maps.rope_freqs.clone()
    return weights
