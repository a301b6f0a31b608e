"""Real weights in every family: SmolLM2 as that architecture, its function unchanged."""

import json
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import CALIBRATION, SPLIT, convert, load, run_engine
from safetensors.torch import load_file, save_file
from test_engine import assert_agrees, text_prompts
from transformers import AutoTokenizer

from mla_converters.budget import CacheBudget
from mla_converters.source import open_source
from mla_converters.transmla_run import transmla_layers

ARCHITECTURES = {"mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "mixtral": "MixtralForCausalLM"}
EXPERTS = 2  # all of which see every token, so that the mixture is a mean of equals


def smollm2_as(family: str, smollm2: Path, folder: Path) -> Path:
    """SmolLM2's weights as another architecture. Qwen2 gets the biases it must have, all zero; each of Mixtral's
    experts is the MLP."""
    shutil.copytree(smollm2, folder)
    config = json.loads((smollm2 / "config.json").read_text())
    config |= {"architectures": [ARCHITECTURES[family]], "model_type": family, "sliding_window": None}
    tensors = load_file(folder / "model.safetensors")
    if family == "qwen2":
        for name, tensor in list(tensors.items()):
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                tensors[name.replace("weight", "bias")] = torch.zeros(len(tensor))
    if family == "mixtral":
        config |= {"num_local_experts": EXPERTS, "num_experts_per_tok": EXPERTS}
        for layer in range(config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            for projection, expert_projection in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
                tensor = tensors.pop(f"{prefix}mlp.{projection}_proj.weight")
                for expert in range(EXPERTS):
                    name = f"{prefix}block_sparse_moe.experts.{expert}.{expert_projection}.weight"
                    tensors[name] = tensor.clone()
            tensors[f"{prefix}block_sparse_moe.gate.weight"] = torch.zeros(EXPERTS, config["hidden_size"])
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_real_weights(family: str, smollm2: Path, tmp_path: Path) -> None:
    """At half the cache, the conversion is the one that Llama gets; vLLM equals transformers."""
    source = smollm2_as(family, smollm2, tmp_path / "source")
    # The same tokens for both: transformers gives every Qwen2 folder Qwen2's way of cutting text.
    ids = AutoTokenizer.from_pretrained(smollm2)(CALIBRATION.read_text(), return_tensors="pt").input_ids
    windows = ids[:, :2048].view(4, 512)
    got, expected = (converted_layers(folder, windows) for folder in (source, smollm2))
    for layer, reference in zip(got, expected, strict=True):
        for name, tensor in reference.items():
            assert torch.equal(layer[name], tensor), name
        assert all(not layer[name].any() for name in layer.keys() - reference.keys()), "a bias out of nothing"

    options = ("--calibration", CALIBRATION, "--calibration-tokens", 2048, "--refit-steps", 0, *SPLIT)
    out = convert(source, tmp_path / "mla", *options)
    model = load(out)
    assert model.config.model_type == f"{family}_mla"
    prompts = text_prompts(out, 6, longest=200)
    assert_agrees(run_engine(out, prompts, max_tokens=16, prompt_logprobs=True), model, prompts)


def converted_layers(folder: Path, windows: torch.Tensor, count: int = 4) -> list[dict[str, torch.Tensor]]:
    """The first layers of a half-cache conversion."""
    with open_source(str(folder)) as source:
        layers = transmla_layers(source, windows, CacheBudget(128, 64), freqfold=2, device="cpu")
        return list(islice(layers, count))
