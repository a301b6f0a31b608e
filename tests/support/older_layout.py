"""Converted checkpoints as version 0.1.0 wrote them: ``q_proj`` also gives rotary queries, and there is no map."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def without_query_map(weights: dict[str, torch.Tensor], own_queries: bool) -> dict[str, torch.Tensor]:
    """One layer's projections, named as below ``self_attn.``, with the map multiplied into ``q_proj``; in float64.

    Args:
        weights: with ``q_rope_map.weight``.
        own_queries: whether the attention also reads the source's queries: not if ``qk_nope_head_dim`` is 0, unless
            they are normalised.
    """
    older = dict(weights)
    maps = older.pop("q_rope_map.weight").double()
    for name in {"q_proj.weight", "q_proj.bias"} & older.keys():
        queries = weights[name].double().unflatten(0, maps.shape[:2])
        rotary = torch.einsum("hdr,hd...->hr...", maps, queries)
        older[name] = torch.cat((queries, rotary) if own_queries else (rotary,), dim=1).flatten(0, 1)
    return older


def older_checkpoint(folder: Path, out: Path) -> Path:
    """Write such a checkpoint of the one in ``folder``; ``q_proj`` is in float64, so that nothing is rounded again."""
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    assert config.pop("rotary_query_map")
    tensors = load_file(out / "model.safetensors")
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.self_attn."
        own = {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
        older = without_query_map(own, bool(config["qk_nope_head_dim"]) or "k_norm.weight" in own)
        tensors |= {prefix + name: tensor.contiguous() for name, tensor in older.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    return out
