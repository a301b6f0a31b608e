"""LoRA adapters on converted models."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.agreement import MAX_LOGPROB_ERROR, hf_logprobs
from support.commands import convert
from support.engine import run_engine
from support.models import RandomModel, load

pytestmark = pytest.mark.engine

RANK = 4
PROMPTS = [list(range(5, 45)), [7], list(range(100, 117))]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("lora")
    random = {
        "llama": RandomModel(heads=6, kv_heads=3, hidden=96),
        "qwen3": RandomModel("qwen3", heads=6, kv_heads=3, head_dim=32),
    }
    sources = {family: model.save(folder / family) for family, model in random.items()}
    return {
        family: convert(source, folder / f"{family}-mla", "--method", "exact") for family, source in sources.items()
    }


def adapter(model: torch.nn.Module, projections: tuple[str, ...], folder: Path) -> Path:
    """Write a random adapter in PEFT's format, and add its product to the weights of ``model``."""
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
    # Prompts' log-probabilities are not requested, because vLLM 0.32's CPU adapters mix up tokens and requests in them.
    return run_engine(mla, PROMPTS, lora=str(lora), engine=engine, max_tokens=16, no_tokenizer=True)


EVERYTHING = ("q_proj", "k_proj", "kv_a_proj_with_mqa", "o_proj", "up_proj", "down_proj")
CASES = {
    "everything": ("qwen3", EVERYTHING),
    "all-of-a-product": ("llama", ("q_proj", "kv_a_proj_with_mqa")),
    "first-of-a-product": ("qwen3", ("q_proj",)),
    "second-of-a-product": ("llama", ("kv_a_proj_with_mqa",)),
}


@pytest.mark.parametrize("case", CASES)
def test_adapter(models: dict[str, Path], case: str, tmp_path: Path) -> None:
    """vLLM with the adapter agrees with transformers whose weights have the adapter's product added."""
    family, projections = CASES[case]
    model = load(models[family])
    lora = adapter(model, projections, tmp_path / "lora")
    result = run(models[family], lora)
    for prompt, tokens, logprobs in zip(PROMPTS, result["tokens"], result["logprobs"], strict=True):
        expected = hf_logprobs(model, prompt + tokens)[-len(tokens) :]
        assert logprobs == pytest.approx(expected, abs=MAX_LOGPROB_ERROR)


def test_adapter_of_kv_b_proj_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    """Such an adapter is refused because it would have no effect: MLA uses the two parts of the projection."""
    lora = adapter(load(models["qwen3"]), ("q_proj", "kv_b_proj"), tmp_path / "lora")
    with pytest.raises(AssertionError, match="kv_b_proj_takes_no_lora_with_mla"):
        run(models["qwen3"], lora)
