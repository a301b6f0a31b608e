"""Statistics of a layer's attention: second moments weighted by attention, and the distances at which it reads.

Only moments are kept. Scores exist only for one block of queries of one window and KV head at a time, ``[G, block,
tokens]``, and only for the tokens that the block sees.
"""

from dataclasses import dataclass
from functools import partial

import torch

from mla_converters.latent.attention import rotate
from mla_converters.streaming.layers import SourceLayer, sampled_positions

QUERIES = 512  # queries that are evaluated, evenly spread over a window
BLOCK = 64  # queries in a block, because the scores of this many fit into the processor's cache


@dataclass(frozen=True)
class AttentionStatistics:
    """Statistics of one layer over some windows; float64 and complex128 on the layer's device.

    A query ``t`` of head ``i`` reads key ``j`` with attention ``a``. To first order, an error ``e`` of that score moves
    the layer's output by ``a e W_o (v_j - o_t)``. An error of ``v_j`` moves it by ``W_o`` times ``a`` times that error.
    Independent errors add up in squares. Scores therefore have the weight ``(a scale |W_o (v_j - o_t)|)²``, and values
    have the weight ``a²``.

    Attributes:
        key_value: ``[2 * g * d, 2 * g * d]``, ``E [k; v][k; v]ᵀ`` over tokens, weighted by how much they are read.
        query: ``[H, d, d]``, ``E q qᵀ`` over queries, weighted by how much their scores matter.
        phase: ``[H, d / 2]`` complex, mean of ``exp(-i freq * distance)`` over pairs of tokens, weighted by how much
            they matter. It is the best constant to replace a rotation.
        plain_query: ``[H, d, d]``, ``E q qᵀ`` where all queries count the same.
        output: ``[H, d, d]``, ``W_oᵀ W_o`` of each head, with the weight of the values that the head reads.
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
    """Collect the statistics of a layer from its inputs ``[windows, tokens, D]``."""
    heads, width, half = layer.heads, 2 * layer.kv_heads * layer.head_dim, layer.head_dim // 2
    gram = head_output(layer)
    tokens = hidden.shape[1]
    angles = torch.outer(torch.arange(tokens, device=layer.device), layer.freqs)
    turn = torch.polar(torch.ones_like(angles), angles)  # [tokens, d / 2], exp(i freq position)
    sampled = sampled_positions(tokens, QUERIES)
    zeros = partial(torch.zeros, dtype=torch.float64, device=layer.device)
    key_value = zeros(width, width)
    query, plain_query = (zeros(heads, layer.head_dim, layer.head_dim) for _ in "qp")
    turned = zeros(heads, half).to(torch.complex128)
    energy = zeros(heads, half)
    values_read = zeros(heads)
    groups = heads // layer.kv_heads
    for window in hidden:
        x = layer.normed(window[None])
        q = layer.queries(x[:, sampled])[0].float()  # [H, queries, d]
        k, v = (part[0].float() for part in layer.keys_values(x))
        read = torch.zeros(tokens, device=layer.device)
        for kv_head in range(layer.kv_heads):
            mine = slice(kv_head * groups, (kv_head + 1) * groups)
            keys, values = k[kv_head], v[kv_head]  # [tokens, d]
            turned_keys = rotate(keys, layer.freqs) * layer.scale
            values_out = values @ gram[mine]  # [G, tokens, d]
            squares = (values_out * values).sum(-1, keepdim=True)
            values_out = torch.cat((values_out, torch.ones_like(squares), squares), dim=-1)
            k_energy = keys[:, :half].square() + keys[:, half:].square()  # [tokens, d / 2]
            one = torch.ones_like(k_energy[:, :1])
            turned_energy = torch.cat((turn.real * k_energy, turn.imag * k_energy, k_energy, one), dim=1)
            plain_query[mine] += (q[mine].mT @ q[mine]).double()
            for block, plain_q in zip(sampled.split(BLOCK), q[mine].split(BLOCK, dim=1), strict=True):
                seen, positions = slice(int(block[-1]) + 1), block.to(layer.device)
                scores = rotate(plain_q, layer.freqs, positions) @ turned_keys[seen].mT
                future = torch.arange(seen.stop, device=layer.device) > positions[:, None]
                attention = scores.masked_fill_(future, float("-inf")).softmax(-1)  # [G, block, seen]
                outputs = attention @ values[seen]  # [G, block, d]
                pairs = attention.square_()
                read_by_head = pairs.sum(1)  # [G, seen]
                values_read[mine] += read_by_head.sum(1).double()
                read[seen] += read_by_head.sum(0)

                pairs *= _distances(outputs, gram[mine], values_out[:, seen])
                summed = pairs @ turned_energy[seen]
                real, imaginary, plain, weight = summed.split((half, half, half, 1), dim=-1)  # [G, block, d / 2 or 1]
                query[mine] += layer.scale**2 * (plain_q * weight).mT.matmul(plain_q).double()
                q_energy = plain_q[..., :half].square() + plain_q[..., half:].square()
                turned[mine] += (q_energy * turn[positions].conj() * torch.complex(real, imaginary)).sum(1)
                energy[mine] += (q_energy * plain).sum(1)
        kv = torch.cat([x.transpose(0, 1).flatten(1) for x in (k, v)], dim=-1)  # [tokens, 2 * g * d]
        key_value += (kv.mT @ (kv * (read / read.sum())[:, None])).double()
    count = len(hidden) * len(sampled)
    return AttentionStatistics(
        key_value=key_value / len(hidden),
        query=query / count,
        phase=turned / energy.clamp(min=torch.finfo(torch.float64).tiny),
        plain_query=plain_query / count,
        output=gram.double() * (values_read / count)[:, None, None],
    )


def _distances(outputs: torch.Tensor, gram: torch.Tensor, values_out: torch.Tensor) -> torch.Tensor:
    """``|W_o (v_j - o_t)|²`` for each query ``t`` and token ``j``, ``[G, queries, tokens]``.

    Args:
        outputs: ``o``, ``[G, queries, d]``.
        gram: ``W_oᵀ W_o`` of each head, ``[G, d, d]``.
        values_out: ``[G, tokens, d + 2]``; for each token the value times ``gram``, then 1, then ``|W_o v_j|²``.
    """
    squares = (outputs @ gram * outputs).sum(-1, keepdim=True)
    # One matrix product computes the whole sum, because each further pass over all pairs of tokens takes time here.
    return (torch.cat((-2 * outputs, squares, torch.ones_like(squares)), dim=-1) @ values_out.mT).clamp_(min=0)
