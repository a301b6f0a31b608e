"""Checkpoints with a packed cache, made from others by hand; and formats of all kinds."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from vllm_mla_plugin.backends.cpu_packed import PackedCPUMLAImpl
from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat
from vllm_mla_plugin.checkpoint.latent_cache import latent_cache_json
from vllm_mla_plugin.latent_packing import dequantise, mean_at, quantise
from vllm_mla_plugin.testing.layer import Projection, Sizes, cached_tokens, impl_arguments, make_cache

SPECS = (
    "128x8g64s/64x8g64s",
    "128x8g128/64x6g64",
    "128x4g32/64x4g32",
    "128x4g48s/64x5g16/a4",
    "128x4g32c/64x6g32s/nomean",
    "128x3g32/64x5g64s",
    "128x3g16c/64x4g16c/a8",
    "128x3g40s/64x3g20s",
    "128x2g32/64x16",
    "128x2g24c/64x8g32/nomean",
    "128x2g64s/64x2g16c",
    "128x16/64x16/a8",
    "33x5g17+7x16+40x4g16+48x2g48c/10x3g7+54x6g27/a4",
)
"""For 128 + 64 numbers: every number of bits, every scaling, groups that fill vectors and groups that do not."""


@contextmanager
def collected(model: torch.nn.Module) -> Iterator[list[list[torch.Tensor]]]:
    """What each layer's ``kv_a_proj_with_mqa`` gives, call by call."""
    outputs: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        layer.self_attn.kv_a_proj_with_mqa.register_forward_hook(lambda _, args, result, own=own: own.append(result))
        for layer, own in zip(model.model.layers, outputs, strict=True)
    ]
    yield outputs
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def cache_means(model: torch.nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """Each layer's ``cache_mean`` ``[2, latent + rope]`` over the windows ``ids``."""
    with collected(model) as outputs:
        model(ids, use_cache=False)
    return [torch.stack((x[:, 0].mean(0), x[:, 1:].mean((0, 1)))) for (x,) in outputs]


def pack_checkpoint(model: Path, out: Path, formats: list[CacheFormat], ids: torch.Tensor) -> Path:
    """The checkpoint with its cache packed; means are measured on the windows ``ids``."""
    shutil.copytree(model, out)
    config = json.loads((out / "config.json").read_text())
    config["latent_cache"] = latent_cache_json(formats)
    (out / "config.json").write_text(json.dumps(config))
    weights = load_file(out / "model.safetensors")
    means = cache_means(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), ids)
    for layer, (mean, format) in enumerate(zip(means, formats * (len(means) // len(formats)), strict=True)):
        if format.mean:
            weights[f"model.layers.{layer}.self_attn.cache_mean"] = mean
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def random_layer(spec: str) -> tuple[CacheFormat, torch.Tensor | None, torch.Tensor]:
    """A format, and a mean (None, if it takes none out) and RoPE frequencies for it."""
    format = CacheFormat.parse(spec)
    latent, rope = format.sizes
    mean = 3 * torch.randn(2, latent + rope) if format.mean else None
    return format, mean, torch.rand(rope // 2)


def make_packed_impl(
    sizes: Sizes, dtype: torch.dtype, format: CacheFormat, mean: torch.Tensor | None, freqs: torch.Tensor
) -> PackedCPUMLAImpl:
    """As :func:`vllm_mla_plugin.testing.cpu.make_impl`, for packed rows."""
    kv_b_proj = Projection(sizes.latent, sizes.heads * (sizes.nope + sizes.v), bias=False, dtype=dtype)
    kv_b_proj.weight.data.normal_(std=sizes.latent**-0.5)
    packing = {"cache_format": format, "cache_mean": mean, "rope_freqs": freqs, "max_position": 4096}
    parameters = {name: torch.nn.Parameter(x, False) if torch.is_tensor(x) else x for name, x in packing.items()}
    impl = PackedCPUMLAImpl(**impl_arguments(sizes, kv_b_proj), **parameters)
    impl.process_weights_after_loading(dtype)
    return impl


def fill_cache(
    impl: Any, sizes: Sizes, lengths: list[int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """A cache whose pages lie in random order, written by the implementation.

    Returns:
        The cache ``[blocks, block_size, bytes]``, the block table, and of each sequence what was packed
        ``[length, latent + rope]``, without the mean.
    """
    cache, table = make_cache(sizes, lengths, dtype)
    rows = torch.full((*cache.shape[:2], impl.cache_format.bytes_per_token), 255, dtype=torch.uint8)
    sequences = []
    for blocks, length in zip(table, lengths, strict=True):
        new = cached_tokens(cache, blocks, length).to(dtype)
        latent, k_rope = new.split([sizes.latent, sizes.rope], dim=-1)
        slots = (blocks.long()[:, None] * sizes.block + torch.arange(sizes.block)).flatten()[: length + 1]
        slots[length:] = -1  # padding, which is not written
        padded = (torch.nn.functional.pad(x, (0, 0, 0, len(slots) - length)) for x in (latent, k_rope))
        latent, k_rope = padded
        impl.do_kv_cache_update(latent, k_rope[:, None], rows, slots, "auto", torch.ones(()), False)
        sequences.append(new)
    return rows, table, sequences


def as_read(impl: Any, new: torch.Tensor) -> torch.Tensor:
    """Tokens of a sequence as attention is to see them, in float64."""
    numbers = dequantise(quantise(new, impl.cache_format), impl.cache_format)
    if impl.cache_mean is not None:
        numbers += mean_at(impl.cache_mean, impl.rope_freqs, torch.arange(len(new)))
    return numbers.double()
