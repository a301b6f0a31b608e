"""``import vllm_mla_plugin.hf`` is all that TRL's trainers and PEFT need to train a converted model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import UNPACKED, convert
from support.files import CALIBRATION
from support.models import RandomModel, load
from transformers import PreTrainedTokenizerFast

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

from datasets import Dataset
from peft import LoraConfig, PeftModel
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    SFTConfig,
    SFTTrainer,
)

PROJECTIONS = ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
TEXTS = Dataset.from_dict({"text": ["the lamp had burned", "nobody walked there", "in fog", "the door"]})
PAIRS = Dataset.from_dict({"prompt": ["a: "] * 4, "chosen": ["yes it is"] * 4, "rejected": ["no"] * 4})
PROMPTS = Dataset.from_dict({"prompt": ["the lamp", "nobody", "in fog", "the door"]})
COMMON: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.01,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = RandomModel(tied=True).save(tmp_path_factory.mktemp("source") / "model")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token=chr(7), pad_token=chr(6), padding_side="left"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mla(source: Path) -> Path:
    few = ("--calibration-tokens", 1024, "--refit-steps", 0)
    return convert(source, source.with_name("mla"), "--calibration", CALIBRATION, *few, *UNPACKED)


def trained(trainer: Any, model: torch.nn.Module) -> set[str]:
    """Take two steps; the names of the weights that changed."""
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    result = trainer.train()
    assert result.global_step == 2 and result.training_loss > 0
    return {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}


def test_sft_by_name(mla: Path, tmp_path: Path) -> None:
    """All weights train, those of MLA too; what is saved can be loaded and served again."""
    trainer = SFTTrainer(str(mla), SFTConfig(str(tmp_path / "out"), max_length=32, **COMMON), train_dataset=TEXTS)
    assert type(trainer.model).__name__ == "LlamaMLAForCausalLM"
    changed = trained(trainer, trainer.model)
    assert {name for name, _ in trainer.model.named_parameters()} == changed
    trainer.save_model()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "out")(ids).logits, trainer.model(ids).logits)


def test_sft_with_peft(mla: Path, tmp_path: Path) -> None:
    """Low-rank changes of MLA's projections are trained, and merge into the weights."""
    lora = LoraConfig(r=2, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    trainer = SFTTrainer(load(mla), SFTConfig(str(tmp_path / "out"), **COMMON), train_dataset=TEXTS, peft_config=lora)
    changed = trained(trainer, trainer.model)
    assert len(changed) >= 2 * len(PROJECTIONS) and all("lora_" in name for name in changed)
    trainer.save_model()
    merged = PeftModel.from_pretrained(load(mla), str(tmp_path / "out")).merge_and_unload()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, trainer.model(ids).logits, rtol=1e-3, atol=1e-3)


def test_dpo(mla: Path, tmp_path: Path) -> None:
    model = load(mla)
    assert trained(
        DPOTrainer(
            model,
            args=DPOConfig(str(tmp_path / "out"), **COMMON),
            train_dataset=PAIRS,
            processing_class=PreTrainedTokenizerFast.from_pretrained(mla),
        ),
        model,
    )


def test_distillation(source: Path, mla: Path, tmp_path: Path) -> None:
    """The source teaches on what its conversion writes."""
    model = load(mla)
    options = DistillationConfig(str(tmp_path / "out"), max_completion_length=8, **COMMON)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(mla)
    data = {"train_dataset": PROMPTS, "processing_class": tokenizer}
    trainer = DistillationTrainer(model, load(source), options, **data)
    assert trained(trainer, model)
