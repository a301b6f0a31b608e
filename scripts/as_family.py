"""Turns a pretrained model into one of another family that computes the same.

Tests convert both, because the layout of a family must not change a conversion.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vllm_mla_plugin.checkpoint.families import FAMILIES

FIELDS = {
    "granite": {
        "embedding_multiplier": 1.0,
        "attention_multiplier": 64**-0.5,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    "smollm3": {"no_rope_layers": [1] * 30},
    "seed_oss": {"attention_bias": False, "attention_out_bias": False},
}
"""With which families compute what SmolLM2 does."""


def as_family(source: Path, model_type: str, folder: Path, experts: int = 2, gate_scale: float = 0.0) -> Path:
    """Copy a model's folder and make the copy a model of another family.

    Args:
        source: a Llama, or a Qwen3 for a Qwen3 mixture; its weights are in one file.
        model_type: of the copy. Qwen2 gets its biases, all zero. Every expert of a mixture is the source's MLP.
        folder: to create.
        experts: number of experts of a mixture; each token is seen by two of them.
        gate_scale: standard deviation of the random weights that choose experts; with 0, all have equal weight.
    """
    (family,) = (family for family in FAMILIES.values() if family.model_type == model_type)
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": [family.architecture], "model_type": model_type, "sliding_window": None}
    config |= FIELDS.get(model_type, {})
    tensors = load_file(folder / "model.safetensors")
    if model_type == "qwen2":
        for name, tensor in list(tensors.items()):
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                tensors[name.replace("weight", "bias")] = torch.zeros(len(tensor))
    if family.fused_qkv:
        for name in [name for name in tensors if name.endswith(("q_proj.weight", "gate_proj.weight"))]:
            whole, parts = ("qkv", "qkv") if "q_proj" in name else ("gate_up", ("gate", "up"))
            start = name[: name.rindex(".", 0, -len(".weight")) + 1]
            tensors[f"{start}{whole}_proj.weight"] = torch.cat(
                [tensors.pop(f"{start}{part}_proj.weight") for part in parts]
            )
    if family.experts is not None:
        # Families call the same fields by different names. Mixtral always does what norm_topk_prob asks for.
        if model_type == "mixtral":
            config |= {"num_local_experts": experts, "num_experts_per_tok": 2}
        else:
            config |= {"num_experts": experts, "num_experts_per_tok": 2, "norm_topk_prob": True}
            config["moe_intermediate_size"] = config["intermediate_size"]
        for layer in range(config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            for part, projection in zip(("gate", "up", "down"), family.experts.projections, strict=True):
                tensor = tensors.pop(f"{prefix}mlp.{part}_proj.weight")
                for expert in range(experts):
                    tensors[prefix + family.experts.weight(expert, projection)] = tensor.clone()
            gate = gate_scale * torch.randn(experts, config["hidden_size"])
            tensors[f"{prefix}{family.experts.block}.gate.weight"] = gate
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
