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
from support.older_layout import older_checkpoint

pytestmark = pytest.mark.engine

RANK = 4
OLDER = ("llama", "odd")  # also as version 0.1.0 wrote them
TENSOR_PARALLEL = {"tensor_parallel_size": 2, "environment": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}}
PROMPTS = [list(range(5, 45)), [7], list(range(100, 117))]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("lora")
    random = {
        "llama": RandomModel(heads=6, kv_heads=3, hidden=96),
        "qwen3": RandomModel("qwen3", heads=6, kv_heads=3, head_dim=32),
        "odd": RandomModel(heads=6, kv_heads=3, head_dim=18, hidden=96),  # its input projections stay apart
    }
    sources = {family: model.save(folder / family) for family, model in random.items()}
    converted = {
        family: convert(source, folder / f"{family}-mla", "--method", "exact") for family, source in sources.items()
    }
    older = {f"{family}-older": older_checkpoint(converted[family], folder / f"{family}-older") for family in OLDER}
    return converted | older


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


def run(mla: Path, lora: Path, environment: dict | None = None, **engine: int) -> dict:
    engine = {"max_model_len": 256, "enable_lora": True, "max_lora_rank": 8} | engine
    # Prompts' log-probabilities are not requested, because vLLM 0.32's CPU adapters mix up tokens and requests in them.
    job = {"lora": str(lora), "max_tokens": 16, "no_tokenizer": True}
    return run_engine(mla, PROMPTS, engine=engine, environment=environment or {}, **job)


EVERYTHING = ("q_proj", "k_proj", "kv_a_proj_with_mqa", "o_proj", "up_proj", "down_proj")
CASES = {
    "everything": ("qwen3", EVERYTHING),
    "all-of-a-product": ("llama-older", ("q_proj", "kv_a_proj_with_mqa")),
    "first-of-a-product": ("qwen3", ("q_proj",)),
    "second-of-a-product": ("llama", ("kv_a_proj_with_mqa",)),
}


@pytest.mark.parametrize("case", CASES)
def test_adapter(models: dict[str, Path], case: str, tmp_path: Path) -> None:
    """vLLM with the adapter agrees with transformers whose weights have the adapter's product added."""
    family, projections = CASES[case]
    model = load(models[family])
    lora = adapter(model, projections, tmp_path / "lora")
    assert_adapted(run(models[family], lora), model)


def assert_adapted(result: dict, model: torch.nn.Module) -> None:
    for prompt, tokens, logprobs in zip(PROMPTS, result["tokens"], result["logprobs"], strict=True):
        expected = hf_logprobs(model, prompt + tokens)[-len(tokens) :]
        assert logprobs == pytest.approx(expected, abs=MAX_LOGPROB_ERROR)


REFUSED = {
    "packed": (
        "llama-older",
        {},
        ("q_proj",),
        r"layers\.0\.self_attn\.q_proj maps 96 numbers to 288 here, and .* 96 to 96:",
    ),
    "separate": (
        "odd-older",
        {},
        ("q_proj",),
        r"layers\.0\.self_attn\.q_proj maps 96 numbers to 324 here, and .* 96 to 108:",
    ),
    "removed": ("qwen3", {}, ("k_proj", "v_proj"), r"layers\.0\.self_attn\.v_proj does not exist here:"),
    "parallel": ("llama-older", TENSOR_PARALLEL, ("q_proj",), r"self_attn\.q_proj maps 96 numbers to 288 here"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_adapter_of_the_source_is_refused(models: dict[str, Path], case: str, tmp_path: Path) -> None:
    """One sentence says what does not fit, and what to do."""
    family, engine, projections, reason = REFUSED[case]
    source = load(models[family].with_name(family.removesuffix("-older")))
    lora = adapter(source, projections, tmp_path / "lora")
    with pytest.raises(AssertionError, match=reason) as refusal:
        run(models[family], lora, **engine)
    assert "merge it into the source with PEFT and convert again" in str(refusal.value)


def test_adapter_with_several_ranks(models: dict[str, Path], tmp_path: Path) -> None:
    """Each rank takes its share of an adapter that fits."""
    model = load(models["llama"])
    lora = adapter(model, ("q_proj", "kv_a_proj_with_mqa", "o_proj"), tmp_path / "lora")
    assert_adapted(run(models["llama"], lora, **TENSOR_PARALLEL), model)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_adapter_of_the_source_that_fits(models: dict[str, Path], family: str, tmp_path: Path) -> None:
    """Adapters for q_proj, o_proj and the MLP, and with QK-norm for k_proj, do in the exact conversion what they did
    before."""
    source = load(models[family].with_name(family))
    names = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj", *(["k_proj"] if family == "qwen3" else []))
    lora = adapter(source, names, tmp_path / "lora")
    assert_adapted(run(models[family], lora), source)


def test_adapter_of_kv_b_proj_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    """Such an adapter is refused because it would have no effect: MLA uses the two parts of the projection."""
    lora = adapter(load(models["qwen3"]), ("q_proj", "kv_b_proj"), tmp_path / "lora")
    with pytest.raises(AssertionError, match=r"train an adapter without kv_b_proj\."):
        run(models["qwen3"], lora)
