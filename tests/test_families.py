"""Real weights in every family: SmolLM2 as that architecture, its function unchanged."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CALIBRATION, convert, load, run_engine
from safetensors.torch import load_file, save_file
from test_engine import assert_agrees, text_prompts

ARCHITECTURES = {"mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}


def smollm2_as(family: str, smollm2: Path, folder: Path) -> Path:
    """SmolLM2's weights as another architecture; Qwen2 gets the biases it must have, all zero."""
    shutil.copytree(smollm2, folder)
    config = json.loads((smollm2 / "config.json").read_text())
    config |= {"architectures": [ARCHITECTURES[family]], "model_type": family, "sliding_window": None}
    (folder / "config.json").write_text(json.dumps(config))
    if family == "qwen2":
        tensors = load_file(folder / "model.safetensors")
        for name, tensor in list(tensors.items()):
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                tensors[name.replace("weight", "bias")] = torch.zeros(len(tensor))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_real_weights(family: str, smollm2: Path, half: Path, tmp_path: Path) -> None:
    """At half the cache the conversion is the one that Llama gets, in transformers and in vLLM."""
    source = smollm2_as(family, smollm2, tmp_path / "source")
    options = ("--calibration", CALIBRATION, "--calibration-tokens", 4096, "--freqfold", 2)
    out = convert(source, tmp_path / "mla", *options)
    model, llama = load(out), load(half)
    assert model.config.model_type == f"{family}_mla"
    ids = torch.tensor([text_prompts(half, 12, longest=300)[-1]])
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, llama(ids).logits, rtol=1e-4, atol=1e-4)
    prompts = text_prompts(out, 6, longest=200)
    assert_agrees(run_engine(out, prompts, max_tokens=16, prompt_logprobs=True), model, prompts)
