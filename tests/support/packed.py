"""Checkpoints with a packed cache, made from others by hand; and formats of all kinds."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat, latent_cache_json

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
