"""Choosing FreqFold on calibration text, by the error it makes in the attention's outputs."""

import torch
import torch.nn.functional as F
from rich.progress import Progress

from mla_converters.budget import CacheBudget
from mla_converters.errors import ConversionError
from mla_converters.latent_map import LatentMap
from mla_converters.layers import run_layers
from mla_converters.methods.transmla import fits_freqfold, transmla_map
from mla_converters.source import Source

SEARCH_WINDOWS = 8  # whose moments the candidates are built from
ERROR_WINDOWS = 4  # of these, on how many their errors are measured


def rotate(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """RoPE on ``x`` ``[..., tokens, 2 * len(freqs)]`` at positions 0, 1, ...; pairs in halves."""
    angles = torch.outer(torch.arange(x.shape[-2], dtype=freqs.dtype), freqs)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def gqa_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, freqs: torch.Tensor, scale: float
) -> torch.Tensor:
    """The source's causal attention.

    Args:
        q: ``[windows, H, tokens, d]``; k, v: ``[windows, g, tokens, d]``, all before RoPE.
        freqs: ``[d / 2]``.

    Returns:
        ``[windows, H, tokens, d]``.
    """
    return F.scaled_dot_product_attention(
        rotate(q, freqs), rotate(k, freqs), v, is_causal=True, scale=scale, enable_gqa=True
    )


def mla_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, maps: LatentMap, scale: float
) -> torch.Tensor:
    """What the source's attention becomes under ``maps``; same shapes as :func:`gqa_attention`."""
    groups = q.shape[1] // k.shape[1]
    cast = {name: value.to(q.dtype) for name, value in vars(maps).items() if name != "rope_freqs"}
    flat_k, flat_v = (x.transpose(1, 2).flatten(2) for x in (k, v))  # [windows, tokens, g * d]
    latent = torch.cat((flat_k, flat_v), dim=-1) @ cast["kv_to_latent"].mT
    k_rope = rotate(flat_k @ cast["key_to_rope"].mT, maps.rope_freqs)[:, None]
    k_nope, values = (
        torch.einsum("gmr,wtr->wgtm", cast[name], latent) for name in ("latent_to_key", "latent_to_value")
    )
    keys = torch.cat((k_nope, k_rope.expand(-1, k_nope.shape[1], -1, -1)), dim=-1)
    grouped = q.unflatten(1, (k.shape[1], groups))
    q_nope, q_rope = (
        torch.einsum("gmd,wghtd->wghtm", cast[name], grouped).flatten(1, 2)
        for name in ("query_to_nope", "query_to_rope")
    )
    queries = torch.cat((q_nope, rotate(q_rope, maps.rope_freqs)), dim=-1)
    return F.scaled_dot_product_attention(
        queries, keys, values, is_causal=True, scale=scale, enable_gqa=True
    )


def freqfold_candidates(head_dim: int, rope_dim: int) -> list[int]:
    """Powers of two that fit the sizes.

    Raises:
        ConversionError: none does.
    """
    folds = [2**i for i in range((head_dim // 2).bit_length()) if fits_freqfold(2**i, rope_dim, head_dim)]
    if not folds:
        raise ConversionError(
            f"--qk-rope-head-dim {rope_dim} cannot be spread over the source's {head_dim // 2} frequencies with "
            f"any FreqFold: choose a multiple or a power-of-two fraction of the head size {head_dim}."
        )
    return folds


def search_freqfold(
    source: Source,
    windows: torch.Tensor,
    budget: CacheBudget,
    freqs: torch.Tensor,
    scale: float,
    device: str,
    progress: Progress,
) -> tuple[int, dict[int, float]]:
    """The FreqFold with the smallest error of the attention outputs, summed over layers.

    Returns:
        The winner, and every candidate's mean relative squared error.
    """
    candidates = freqfold_candidates(source.config.head_dim, budget.qk_rope_head_dim)
    if len(candidates) == 1:
        return candidates[0], {}
    errors = dict.fromkeys(candidates, 0.0)
    layers = source.config.num_hidden_layers
    head_dim = source.config.head_dim
    windows = windows[:SEARCH_WINDOWS]
    running = run_layers(source, windows, device, keep=min(ERROR_WINDOWS, len(windows)))
    for layer in progress.track(running, total=layers, description="Searching freqfold"):
        q, k, v = (
            x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in (layer.queries, layer.keys, layer.values)
        )
        reference = gqa_attention(q, k, v, freqs, scale)
        for fold in candidates:
            maps = transmla_map(layer.moments, freqs, budget.kv_lora_rank, budget.qk_rope_head_dim, fold)
            error = (mla_attention(q, k, v, maps, scale) - reference).square().sum() / reference.square().sum()
            errors[fold] += error.item() / layers
    return min(errors, key=errors.__getitem__), errors
