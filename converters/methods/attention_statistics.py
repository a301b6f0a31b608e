"""What a layer's attention reads: second moments weighted by attention, and how far back it looks.

Only moments are kept. Scores of some queries of one window and KV head at a time are materialised, ``[G, queries,
tokens]``.
"""

from dataclasses import dataclass

import torch

from mla_converters.attention import rotate
from mla_converters.layers import SourceLayer

QUERIES = 512  # evenly spread over a window


@dataclass(frozen=True)
class AttentionStatistics:
    """Of one layer over some windows; float64 and complex128 on CPU.

    A query ``t`` of head ``i`` reads key ``j`` with attention ``a``. To first order an error ``e`` of
    that score moves the layer's output by ``a e W_o (v_j - o_t)``, and an error of ``v_j`` by ``a`` times
    itself; independent errors add up in squares. So scores weigh ``(a scale |W_o (v_j - o_t)|)²`` and
    values ``a²``.

    Attributes:
        key_value: ``[2 * g * d, 2 * g * d]``, ``E [k; v][k; v]ᵀ`` over tokens weighted by how much they are read.
        query: ``[H, d, d]``, ``E q qᵀ`` over queries weighted by how much their scores matter.
        phase: ``[H, d / 2]`` complex, mean of ``exp(-i freq * distance)`` over the pairs that matter:
            the best constant in place of a rotation.
        plain_query: ``[H, d, d]``, ``E q qᵀ`` over all queries alike.
        output: ``[H, d, d]``, ``W_oᵀ W_o`` of each head, weighted like the values it reads.
    """

    key_value: torch.Tensor
    query: torch.Tensor
    phase: torch.Tensor
    plain_query: torch.Tensor
    output: torch.Tensor


def head_output(layer: SourceLayer) -> torch.Tensor:
    """``W_oᵀ W_o`` of each query head, ``[H, d, d]`` float32 on the layer's device."""
    weight = layer.attention_weights["o_proj.weight"].to(layer.device, torch.float32)
    heads = weight.unflatten(1, (layer.heads, -1)).transpose(0, 1)  # [H, D, d]
    return heads.mT @ heads


@torch.inference_mode()
def attention_statistics(layer: SourceLayer, hidden: torch.Tensor) -> AttentionStatistics:
    """Collect from the layer's inputs ``[windows, tokens, D]``."""
    heads, width, half = layer.heads, 2 * layer.kv_heads * layer.head_dim, layer.head_dim // 2
    gram = head_output(layer)
    tokens = hidden.shape[1]
    angles = torch.outer(torch.arange(tokens, device=layer.device), layer.freqs)
    turn = torch.polar(torch.ones_like(angles), angles)  # [tokens, d / 2], exp(i freq position)
    stride = -(-tokens // QUERIES)
    sampled = torch.arange(tokens - 1, -1, -stride, device=layer.device).flip(0)
    future = torch.arange(tokens, device=layer.device) > sampled[:, None]  # [queries, tokens]
    key_value = torch.zeros(width, width, dtype=torch.float64)
    query, plain_query = (torch.zeros(heads, layer.head_dim, layer.head_dim, dtype=torch.float64) for _ in "qp")
    turned = torch.zeros(heads, half, dtype=torch.complex128)
    energy = torch.zeros(heads, half, dtype=torch.float64)
    values_read = torch.zeros(heads, dtype=torch.float64)
    groups = heads // layer.kv_heads
    for window in hidden:
        q, k, v = (x.float()[0] for x in layer.project(layer.normed(window[None])))
        read = torch.zeros(tokens, device=layer.device)
        for kv_head in range(layer.kv_heads):
            mine = slice(kv_head * groups, (kv_head + 1) * groups)
            keys, values = k[kv_head], v[kv_head]  # [tokens, d]
            turned_q, plain_q = rotate(q[mine], layer.freqs)[:, sampled], q[mine][:, sampled]
            scores = turned_q @ rotate(keys, layer.freqs).mT * layer.scale
            attention = scores.masked_fill_(future, float("-inf")).softmax(-1)  # [G, queries, tokens]
            pairs = _score_weights(attention, values, gram[mine]) * layer.scale**2
            query[mine] += (plain_q * pairs.sum(2, keepdim=True)).mT.matmul(plain_q).cpu().double()
            plain_query[mine] += (plain_q.mT @ plain_q).cpu().double()

            read_by_head = attention.square_().sum(1)  # [G, tokens]
            values_read[mine] += read_by_head.sum(1).cpu().double()
            read += read_by_head.sum(0)

            q_energy, k_energy = (x[..., :half].square() + x[..., half:].square() for x in (plain_q, keys))
            seen = turn * k_energy  # [tokens, d / 2]
            seen = torch.complex(pairs @ seen.real, pairs @ seen.imag)  # [G, queries, d / 2]
            turned[mine] += (q_energy * turn[sampled].conj() * seen).sum(1).cpu()
            energy[mine] += (q_energy * (pairs @ k_energy)).sum(1).cpu()
        kv = torch.cat([x.transpose(0, 1).flatten(1) for x in (k, v)], dim=-1)  # [tokens, 2 * g * d]
        key_value += (kv.mT @ (kv * (read / read.sum())[:, None])).cpu().double()
    count = len(hidden) * len(sampled)
    return AttentionStatistics(
        key_value=key_value / len(hidden),
        query=query / count,
        phase=turned / energy.clamp(min=torch.finfo(torch.float64).tiny),
        plain_query=plain_query / count,
        output=gram.cpu().double() * (values_read / count)[:, None, None],
    )


def _score_weights(attention: torch.Tensor, values: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """``(a |W_o (v_j - o_t)|)²``, ``[G, queries, tokens]``, for a KV head's values ``[tokens, d]``."""
    outputs = attention @ values
    values_out = values @ gram  # [G, tokens, d]
    distance = -2 * (outputs @ values_out.mT)
    distance += (values_out * values).sum(-1)[:, None, :]
    distance += (outputs @ gram * outputs).sum(-1)[..., None]
    return attention.square().mul_(distance.clamp_(min=0))
