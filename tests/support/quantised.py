"""Quantise a converted model, and write it as llm-compressor does."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def quantise(model: Path, out: Path, ignore: tuple[str, ...] = (), static: bool = False) -> tuple[Path, Path]:
    """Write a model whose projections have int8 weights, one scale a row, for int8 activations with a scale a token.

    Args:
        model: a folder with one safetensors file.
        out: folder to make.
        ignore: names of projections that stay as they are.
        static: give activations one scale that is in the checkpoint.

    Returns:
        The quantised model, in the layout of compressed-tensors, and its plain twin with the same numbers as weights.
    """
    folders = out / "quantised", out / "plain"
    for folder in folders:
        shutil.copytree(model, folder)
    plain = load_file(model / "model.safetensors")
    packed = dict(plain)
    for name in plain:
        projection = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if "_proj" not in projection or not name.endswith(".weight") or projection in ignore:
            continue
        scale = plain[name].abs().amax(1, keepdim=True) / 127
        packed[name] = (plain[name] / scale).round().to(torch.int8)
        packed[f"{name}_scale"] = scale
        if static:
            packed[f"{name.removesuffix('weight')}input_scale"] = torch.tensor([0.05])
        plain[name] = packed[name] * scale
    for folder, tensors in zip(folders, (packed, plain), strict=True):
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    scheme = {
        "targets": ["Linear"],
        "weights": int8 | {"strategy": "channel", "dynamic": False},
        "input_activations": int8 | {"strategy": "tensor" if static else "token", "dynamic": not static},
    }
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", *(f"re:.*{name}$" for name in ignore)],
        "config_groups": {"group_0": scheme},
    }
    (folders[0] / "config.json").write_text(json.dumps(config))
    return folders
