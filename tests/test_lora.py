"""LoRA adapters on converted models."""

import json
from pathlib import Path

import pytest
import torch
from conftest import RandomModel, convert, load, run_engine
from safetensors.torch import save_file
from test_engine import MAX_LOGPROB_ERROR, hf_logprobs

RANK = 4
PROMPTS = [list(range(5, 45)), [7], list(range(100, 117))]


@pytest.fixture(scope="module")
def mla(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    source = RandomModel("qwen3", heads=6, kv_heads=3, head_dim=32).save(folder / "source")
    return convert(source, folder / "mla", "--method", "exact")


def adapter(model: torch.nn.Module, projections: tuple[str, ...], folder: Path) -> Path:
    """A random adapter in PEFT's format; what it adds is added to ``model`` too."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, module in model.named_modules():
        if name.endswith(projections):
            rows, columns = module.weight.shape
            down, up = (torch.randn(shape, generator=generator) / 4 for shape in ((RANK, columns), (rows, RANK)))
            prefix = f"base_model.model.{name}"
            tensors |= {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
            module.weight.data += up @ down
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(projections)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def run(mla: Path, lora: Path) -> dict:
    engine = {"max_model_len": 256, "enable_lora": True, "max_lora_rank": 8}
    # Without log-probabilities of prompts: for these, vLLM 0.32's adapters on CPU mix tokens up with requests.
    return run_engine(mla, PROMPTS, lora=str(lora), engine=engine, max_tokens=16, no_tokenizer=True)


def test_adapter_on_attention_and_mlp(mla: Path, tmp_path: Path) -> None:
    """vLLM with the adapter computes what transformers computes with its product added to the weights."""
    model = load(mla)
    projections = ("q_proj", "k_proj", "kv_a_proj_with_mqa", "o_proj", "up_proj", "down_proj")
    lora = adapter(model, projections, tmp_path / "lora")
    result = run(mla, lora)
    for prompt, tokens, logprobs in zip(PROMPTS, result["tokens"], result["logprobs"], strict=True):
        expected = hf_logprobs(model, prompt + tokens)[-len(tokens) :]
        assert logprobs == pytest.approx(expected, abs=MAX_LOGPROB_ERROR)


def test_adapter_of_kv_b_proj_is_refused(mla: Path, tmp_path: Path) -> None:
    """It would have no effect, for MLA takes the projection apart."""
    lora = adapter(load(mla), ("q_proj", "kv_b_proj"), tmp_path / "lora")
    with pytest.raises(AssertionError, match="kv_b_proj_takes_no_lora_with_mla"):
        run(mla, lora)
