"""What a source's tensors say counts: a head of its own, each one's dtype, and both layouts of experts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.agreement import assert_agrees
from support.commands import UNPACKED, CommandLine, Refused, convert
from support.engine import run_engine
from support.files import CALIBRATION
from support.models import MIXTRAL_EXPERTS, QWEN3_EXPERTS, RandomModel, load
from transformers import AutoModelForCausalLM

WEIGHTS, HEAD, EMBEDDING = "model.safetensors", "lm_head.weight", "model.embed_tokens.weight"
EXACT = ("--method", "exact")
IDS = torch.randint(0, 199, (2, 100), generator=torch.Generator().manual_seed(1))
PROMPTS = [IDS[0, :30].tolist(), IDS[1, :50].tolist()]


@torch.inference_mode()
def logits(folder: Path, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return load(folder, dtype, experts_implementation="eager")(IDS).logits


def difference(out: Path, source: Path) -> float:
    expected = logits(source)
    return float((logits(out) - expected).norm() / expected.norm())


def add_tensors(source: Path, **tensors: torch.Tensor) -> None:
    stored = load_file(source / WEIGHTS) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(stored, source / WEIGHTS, metadata={"format": "pt"})


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    return RandomModel(tied=True).save(tmp_path / "tied")


def test_head_of_its_own(tied: Path, tmp_path: Path) -> None:
    """Tied in the configuration, another head in the file: that head is the model's, in transformers and vLLM."""
    generator = torch.Generator().manual_seed(2)
    embedding = load_file(tied / WEIGHTS)[EMBEDDING]
    add_tensors(tied, lm_head__weight=embedding + 0.3 * torch.randn(embedding.shape, generator=generator))
    out = convert(tied, tmp_path / "mla", *EXACT)
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and HEAD in load_file(out / WEIGHTS)
    assert difference(out, tied) < 1e-6
    warning, chance = json.loads((out / "conversion_report.json").read_text())["warnings"]
    assert "its weights hold another head" in warning and "no better than by guessing" in chance
    result = run_engine(out, PROMPTS, max_tokens=4, prompt_logprobs=True, engine={"max_model_len": 256})
    assert_agrees(result, load(out), PROMPTS)


def test_head_of_its_own_while_calibrating(tied: Path, tmp_path: Path) -> None:
    """The same bytes as from a source that says that it does not tie."""
    add_tensors(tied, lm_head__weight=load_file(tied / WEIGHTS)[EMBEDDING].flip(0))
    untied = Path(shutil.copytree(tied, tmp_path / "untied"))
    config = json.loads((untied / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    few = ("--calibration-tokens", 1024, "--refit-steps", 2, *UNPACKED)  # on text that the model writes, with its head
    one, other = (convert(source, tmp_path / f"{source.name}-mla", *few) for source in (tied, untied))
    assert (one / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()


def test_head_that_is_the_embedding(tied: Path, tmp_path: Path) -> None:
    """Stays tied, in half the bytes."""
    expected = convert(tied, tmp_path / "expected", *EXACT)
    add_tensors(tied, lm_head__weight=load_file(tied / WEIGHTS)[EMBEDDING].clone())
    out = convert(tied, tmp_path / "mla", *EXACT)
    assert (out / WEIGHTS).read_bytes() == (expected / WEIGHTS).read_bytes()
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True


def test_head_of_another_shape(tied: Path, refusal: Refused, tmp_path: Path) -> None:
    add_tensors(tied, lm_head__weight=torch.zeros(100, 64))
    line = refusal("convert", tied, tmp_path / "mla", *EXACT)
    assert "lm_head.weight has shape [100, 64] where [199, 64] was expected" in line


def mixed(folder: Path, family: str = "llama") -> Path:
    """A bfloat16 model with some tensors in other dtypes, as training tools leave them."""
    source = RandomModel(family, dtype=torch.bfloat16).save(folder)
    tensors = load_file(source / WEIGHTS)
    for name in tensors:
        if name == EMBEDDING or "norm" in name or ".1.self_attn.v_proj" in name:
            tensors[name] = tensors[name].float() * 1.001
        elif ".1.self_attn.o_proj" in name:
            tensors[name] = (tensors[name] * 0.5).half()
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})
    return source


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_each_keeps_its_dtype(family: str, tmp_path: Path) -> None:
    """A projection that is converted has that of those it is made of; frequencies are always float32."""
    source = mixed(tmp_path / "source", family)
    out = convert(source, tmp_path / "mla", *EXACT)
    before, after = load_file(source / WEIGHTS), load_file(out / WEIGHTS)
    for name in before.keys() & after.keys():
        assert after[name].dtype == before[name].dtype, name
    for name in before.keys() & after.keys() - {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}:
        assert torch.equal(after[name], before[name]), name
    for part in ("kv_a_proj_with_mqa", "kv_b_proj"):
        assert after[f"model.layers.0.self_attn.{part}.weight"].dtype == torch.bfloat16
        assert after[f"model.layers.1.self_attn.{part}.weight"].dtype == torch.float32
    assert after["model.layers.1.self_attn.o_proj.weight"].dtype == torch.float16
    assert after["model.layers.0.self_attn.rope_freqs"].dtype == torch.float32
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert difference(out, source) < (1e-6 if family == "llama" else 5e-3)  # a query norm is folded in bfloat16


def test_asked_dtype(tmp_path: Path) -> None:
    """--dtype holds for all."""
    out = convert(mixed(tmp_path / "source"), tmp_path / "mla", *EXACT, "--dtype", "float16")
    dtypes = {name.rpartition(".")[2]: tensor.dtype for name, tensor in load_file(out / WEIGHTS).items()}
    assert dtypes == {"weight": torch.float16, "rope_freqs": torch.float32}
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"


EXPERTS = {
    "qwen3": RandomModel("qwen3_moe", head_dim=32, layers=3, experts=QWEN3_EXPERTS),
    "mixtral": RandomModel("mixtral", experts=MIXTRAL_EXPERTS),
    "mixtral-bfloat16": RandomModel("mixtral", experts=MIXTRAL_EXPERTS, dtype=torch.bfloat16),
}


@pytest.fixture(params=EXPERTS)
def layouts(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """The same mixture of experts in both layouts: one tensor a projection of an expert, and stacks of all experts."""
    apart = EXPERTS[request.param].save(tmp_path / "apart")
    stacked = Path(shutil.copytree(apart, tmp_path / "stacked"))
    model = AutoModelForCausalLM.from_pretrained(apart)
    model.save_pretrained(stacked, save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in load_file(stacked / WEIGHTS))
    return apart, stacked


@pytest.mark.parametrize(
    "options",
    [EXACT, ("--method", "attention-aware", "--calibration", CALIBRATION, "--calibration-tokens", 512, *UNPACKED)],
    ids=["exact", "calibrated"],
)
def test_stacked_experts(layouts: tuple[Path, Path], options: tuple, command_line: CommandLine, tmp_path: Path) -> None:
    """The same bytes, calibrated or not; the source's function; and whole, with either source beside it."""
    apart, stacked = layouts
    out, other = (convert(source, tmp_path / f"{source.name}-mla", *options) for source in (stacked, apart))
    assert (out / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()
    if options == EXACT:
        assert difference(out, stacked) < (
            1e-4 if "bfloat16" not in str(load_file(out / WEIGHTS)[HEAD].dtype) else 0.02
        )
        assert command_line("verify", out, "--source", stacked)[0] == 0


def test_stacked_experts_in_vllm(tmp_path: Path) -> None:
    source = EXPERTS["qwen3"].save(tmp_path / "source")
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(source, save_original_format=False)
    out = convert(source, tmp_path / "mla", *EXACT)
    result = run_engine(out, PROMPTS, max_tokens=4, prompt_logprobs=True, engine={"max_model_len": 256})
    assert_agrees(result, load(source, experts_implementation="eager"), PROMPTS)


def test_damaged_stacks(refusal: Refused, tmp_path: Path) -> None:
    """Named by the tensor that is wrong."""
    source = EXPERTS["mixtral"].save(tmp_path / "source")
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(source, save_original_format=False)
    stored = load_file(source / WEIGHTS)
    gate_up, down = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"
    for changed, reason in (
        (stored | {gate_up: stored[gate_up][0]}, f"{gate_up} has shape"),
        (stored | {gate_up: stored[gate_up][:, :-1].contiguous()}, f"{gate_up} has shape"),
        (
            stored | {down: stored[down][:-1].contiguous()},
            "model.layers.0.block_sparse_moe.experts.2.w2.weight is miss",
        ),
        (stored | {down: stored[down].mT.contiguous()}, "block_sparse_moe.experts.0.w2.weight has shape"),
        ({name: tensor for name, tensor in stored.items() if name != down}, "experts.0.w2.weight is missing"),
    ):
        save_file(changed, source / WEIGHTS, metadata={"format": "pt"})
        assert reason in refusal("convert", source, tmp_path / "mla", *EXACT)
