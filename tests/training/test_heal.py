"""Healing trains the attentions of a converted model to give its source's predictions, and trains nothing else."""

import json
import math
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.commands import (
    UNPACKED,
    CommandLine,
    Refused,
    contents,
    convert,
    heal,
    running,
    wait_for,
    without_progress,
)
from support.disk import fill
from support.files import CALIBRATION, ROOT
from support.models import MIXTRAL_EXPERTS, QWEN3_EXPERTS, RandomModel, load

from mla_converters.checkpoints.models import Model, find_model
from mla_converters.checkpoints.source import open_source
from mla_converters.evaluation.hf_engine import kl_per_token
from mla_converters.heal import run as healing
from mla_converters.options import HealOptions
from mla_converters.streaming import layers
from mla_converters.support import devices
from mla_converters.text.healing import divided
from mla_converters.training import assembly, distillation, losses, schedule, trainer
from mla_converters.training.assembly import assemble
from mla_converters.training.stored import Examples

OTHER_TEXT = ROOT / "scripts" / "demo_text.txt"
CALIBRATED = ("--calibration", CALIBRATION, "--calibration-tokens", 1024, "--refit-steps", 0, *UNPACKED)
MAP_ALONE = (*CALIBRATED, "--without", "least-squares")  # loses more, so that there is more to heal
OPTIONS = ("--text", CALIBRATION, "--text", OTHER_TEXT, "--steps", 60)
LOST = {0.0: 1024, 0.39: 1024, 0.4: 512, 0.78: 512, 0.79: 256, 9.0: 256}  # window length by loss in nats per token
SHAPES = {
    "llama": RandomModel(bias=True, tied=True),
    "qwen3": RandomModel("qwen3", heads=4, kv_heads=1),
    "qwen3_moe": RandomModel("qwen3_moe", experts=QWEN3_EXPERTS),
    "mixtral": RandomModel("mixtral", experts=MIXTRAL_EXPERTS, dtype=torch.bfloat16),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return RandomModel().save(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def mla(source: Path) -> Path:
    return convert(source, source.with_name("mla"), *CALIBRATED)


@pytest.fixture(scope="module")
def expected(mla: Path) -> dict[str, bytes]:
    """The files that an undisturbed run writes."""
    return contents(heal(mla, mla.with_name("healed"), *OPTIONS))


def reported(folder: Path) -> dict[str, Any]:
    """The report's entry for the healing."""
    return json.loads((folder / "conversion_report.json").read_text())["healing"]


def held_out(folder: Path) -> dict[str, float]:
    """KL divergence from the source on held-out text, before and after."""
    return reported(folder)["kl_held_out"]


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("shape", SHAPES)
def test_only_attentions_change_and_predict_better(shape: str, tmp_path: Path) -> None:
    source = SHAPES[shape].save(tmp_path / "source")
    mla = convert(source, tmp_path / "mla", *MAP_ALONE)
    healed = heal(mla, tmp_path / "healed", "--text", CALIBRATION, "--steps", 48)
    kl = held_out(healed)
    assert 0 < kl["after"] < 0.9 * kl["before"]
    assert reported(healed)["learning_rate"] == pytest.approx(
        schedule.suited_rate(kl["before"], reported(healed)["window"]), rel=1e-3
    )
    old, new = (load_file(folder / "model.safetensors") for folder in (mla, healed))
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        assert new[name].dtype == tensor.dtype
        trained = ".self_attn." in name and not name.endswith("rope_freqs")
        assert torch.equal(new[name], tensor) != trained, name


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ("llama", ("--train", "all")),
        ("qwen3_moe", ("--train", "all", "--loss", "kl:0.5,lm:0.5", "--gradient-checkpointing")),
        ("qwen3", ("--train", "lora", "--lora-rank", 4, "--temperature", 2)),
    ],
)
def test_what_trains(shape: str, options: tuple, tmp_path: Path) -> None:
    """All weights change, experts too; or attentions alone, by low-rank changes that end up in the weights.

    The maps to rotary queries, which are small, then train as they are.
    """
    mla = convert(SHAPES[shape].save(tmp_path / "source"), tmp_path / "mla", *MAP_ALONE)
    healed = heal(mla, tmp_path / "healed", "--text", CALIBRATION, "--steps", 48, "--dtype", "float32", *options)
    losses = [loss for name in ("kl_held_out", "lm_held_out") if (loss := reported(healed).get(name))]
    assert 0 < sum(loss["after"] for loss in losses) < 0.98 * sum(loss["before"] for loss in losses)
    old, new = (load_file(folder / "model.safetensors") for folder in (mla, healed))
    assert old.keys() == new.keys()
    whole = "all" in options
    for name, tensor in old.items():
        changes = new[name] - tensor
        matrix = whole or (".self_attn." in name and ("_proj" in name or "q_rope_map" in name))
        assert bool(changes.any()) == (matrix and not name.endswith("rope_freqs")), name
        if not whole and matrix and not name.endswith("q_rope_map.weight"):
            assert torch.linalg.matrix_rank(changes, rtol=1e-4) == 4


def test_exact_trains_on_text(command_line: CommandLine, source: Path, tmp_path: Path) -> None:
    """Same cache as the source, and more weights that count: no teacher is needed, and none is in memory."""
    exact = convert(source, tmp_path / "exact", "--method", "exact")
    options = ("--text", CALIBRATION, "--tokens", 16384, "--length", 64, "--batch-size", 4, "--learning-rate", 0.01)
    healed = heal(exact, tmp_path / "healed", *options, "--loss", "lm")
    assert "kl_held_out" not in reported(healed)
    assert reported(healed)["lm_held_out"]["after"] < 0.98 * reported(healed)["lm_held_out"]["before"]
    report = json.loads((healed / "conversion_report.json").read_text())
    assert report["lossless"] is False and report["self_check"]["kl"] > 0.01
    assert "attentions trained on the text itself" in (healed / "README.md").read_text()
    code, _, complaint = command_line("verify", healed, "--source", source)
    assert code == 0, complaint


def test_larger_teacher(refusal: Refused, mla: Path, tmp_path: Path) -> None:
    """A wider model with the same tokenizer teaches. Rows of the vocabulary that only it has do not matter."""
    teacher = RandomModel(hidden=96, heads=6, layers=3, vocab=220).save(tmp_path / "teacher")
    options = ("--text", CALIBRATION, "--steps", 24, "--teacher", teacher)
    healed = heal(mla, tmp_path / "healed", *options)
    kl = held_out(healed)
    assert 0 < kl["after"] < 0.98 * kl["before"]
    assert reported(healed)["teacher"] == str(teacher)
    assert f"attentions trained on `{teacher}`'s predictions" in (healed / "README.md").read_text()
    out = tmp_path / "out"
    assert "learns from no teacher" in refusal("heal", mla, out, *options, "--loss", "lm")
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (teacher / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "has another tokenizer than" in refusal("heal", mla, out, *options)


def test_hidden_states_first(refusal: Refused, mla: Path, tmp_path: Path) -> None:
    """The first steps bring the hidden states of all layers nearer to the source's, and the rest the predictions."""
    errors: list[float] = []
    text = (str(CALIBRATION),)
    options = HealOptions(text=text, steps=40, hidden_steps=30, dtype="float32", batch_size=4, learning_rate=0.01)

    def record(step: int, loss: float) -> None:
        errors.append(loss)

    train = healing.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(healing, "train", lambda *arguments: train(*arguments[:-1], record))
        healing.heal(mla, tmp_path / "healed", options, quiet=True)
    assert sum(errors[20:30]) < 0.9 * sum(errors[:10])
    kl = held_out(tmp_path / "healed")
    assert 0 < kl["after"] < kl["before"]
    assert "no teacher in memory has layers like MODEL's" in refusal(
        "heal", mla, tmp_path / "out", "--loss", "lm", "--hidden-steps", 3
    )


@pytest.mark.parametrize("seed", [-1, 2**64 - 1])
def test_any_seed_of_64_bits(seed: int, mla: Path, tmp_path: Path) -> None:
    """The 15 windows are seen a second time, in another order."""
    few = ("--text", CALIBRATION, "--tokens", 2048, "--length", 128, "--steps", 24)
    assert reported(heal(mla, tmp_path / "healed", *few, "--seed", seed))["seed"] == seed


def test_precision_of_accelerate_does_not_count(mla: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``accelerate launch`` sets the variable; ``--dtype`` decides."""
    few = ("--text", CALIBRATION, "--tokens", 2048, "--length", 128, "--steps", 8, "--dtype", "float32")
    expected = contents(heal(mla, tmp_path / "expected", *few))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert contents(heal(mla, tmp_path / "healed", *few)) == expected


def test_a_model_that_lost_nothing_learns_text(source: Path, refusal: Refused, tmp_path: Path) -> None:
    """The divergence is nothing then, and with the text alone in the loss there would be a rate, too."""
    whole = convert(source, tmp_path / "whole", *CALIBRATED, "--cache-ratio", 1)
    few = ("--text", CALIBRATION, "--tokens", 16384, "--length", 64, "--batch-size", 4)
    healing = reported(heal(whole, tmp_path / "healed", *few, "--loss", "kl:0.1,lm:0.9"))
    assert healing["learning_rate"] == schedule.suited_rate(None, 4 * 64, on_text=True) > 0
    assert healing["lm_held_out"]["after"] < healing["lm_held_out"]["before"]
    for more in ((), ("--teacher", source), ("--teacher", source, "--loss", "kl:0.5")):
        assert "there is nothing that training could improve" in refusal("heal", whole, tmp_path / "out", *few, *more)


def test_rates() -> None:
    """The rate falls with the root of the divergence, then with the divergence, which rounding may leave below zero."""
    assert schedule.suited_rate(-1e-9, 512) == 0
    assert schedule.suited_rate(0.25, 512) == pytest.approx(schedule.RATE / 2)
    least = schedule.RATE * schedule.SMALL**0.5
    for part in (1, 1 / 4):
        assert schedule.suited_rate(part * schedule.SMALL, 512) == pytest.approx(part * least)
    assert schedule.suited_rate(1.0, 512) == schedule.suited_rate(1.0, 512, on_text=True) == schedule.RATE
    for little in (None, -1e-9, 1e-9):
        assert schedule.suited_rate(little, 512, on_text=True) == schedule.TEXT_RATE


def test_windows_by_how_much_was_lost() -> None:
    """More loss gives shorter windows. Windows are cut into equal pieces, and only a remainder is dropped."""
    assert [schedule.suited_length(lost) for lost in LOST] == list(LOST.values())
    windows = torch.arange(2002).view(2, 1001)
    assert torch.equal(divided(windows, 256), torch.cat([row[:999].view(3, 333) for row in windows]))
    assert torch.equal(divided(windows, 2048), windows)


def test_windows_are_seen_twice_if_much_was_lost(tmp_path: Path) -> None:
    assert [schedule.suited_passes(lost) for lost in (0.0, 0.2, 0.21, 9.0)] == [1, 1, 2, 2]
    mla = convert(SHAPES["llama"].save(tmp_path / "source"), tmp_path / "mla", *CALIBRATED)
    healed = heal(mla, tmp_path / "healed", "--text", CALIBRATION, "--tokens", 1408, "--length", 128, "--batch-size", 4)
    # One of the 11 windows is held out.
    assert reported(healed)["steps"] == math.ceil(schedule.suited_passes(held_out(healed)["before"]) * 10 / 4)


def test_real_model(command_line: CommandLine, healed: Path, smollm2: Path) -> None:
    """Training on three windows of text brings a converted SmolLM2 nearer to its source."""
    kl = held_out(healed)
    assert 0 < kl["after"] < kl["before"]
    assert reported(healed)["learning_rate"] == 1e-4
    code, _, _ = command_line("verify", healed, "--source", smollm2)
    assert code == 0


def beside_its_source(model: Path, source: Path, options: HealOptions | None = None) -> distillation.Distillation:
    with open_source(str(source)) as opened:
        return assemble(model, opened, None, options or HealOptions(), torch.float32, "cpu", False)


def beside(model: Path, teacher: Path, options: HealOptions | None = None) -> distillation.Distillation:
    """With a teacher in memory that shares nothing with the model."""
    other = find_model(str(teacher), ExitStack())
    return assemble(model, None, other, options or HealOptions(), torch.float32, "cpu", False)


def test_held_out_text_is_measured_at_temperature_1(source: Path, mla: Path) -> None:
    """The divergence decides the learning rate and is reported, so it must not depend on how the model is trained."""
    windows = Examples(input_ids=torch.randint(0, 128, (2, 64), generator=torch.Generator().manual_seed(0)))
    plain, softened = (
        distillation.held_out_loss(
            beside(mla, source, HealOptions(temperature=temperature)), windows, "cpu", torch.float32
        )
        for temperature in (1, 4)
    )
    assert torch.equal(plain, softened)


@torch.no_grad()
@pytest.mark.parametrize("put_together", [beside_its_source, beside])
def test_loss_is_the_divergence_of_evaluations(source: Path, mla: Path, put_together: Callable) -> None:
    """The loss equals the KL divergence of evaluations, with one chunk and with several, the last one shorter."""
    student, teacher = load(mla), load(source)
    for shape in ((1, 100), (5, 120)):
        ids = torch.randint(0, 128, shape, generator=torch.Generator().manual_seed(0))
        loss = put_together(mla, source)(ids)["loss"].item()
        pairs = zip(teacher(ids).logits, student(ids).logits, strict=True)
        assert loss == pytest.approx(torch.cat([kl_per_token(*pair) for pair in pairs]).mean().item(), rel=1e-4)


@pytest.mark.parametrize("train", ["attention", "all"])
def test_gradient_is_that_of_all_logits_at_once(source: Path, mla: Path, train: Literal["attention", "all"]) -> None:
    """Of a sum of both losses, at a temperature; also the gradient of the output head."""
    teacher = load(source)
    ids = torch.randint(0, teacher.config.vocab_size, (3, 250), generator=torch.Generator().manual_seed(0))
    assert ids.numel() > losses.CHUNK and ids.numel() % losses.CHUNK
    distilled = beside(mla, source, HealOptions(train=train, loss="kl:0.7,lm:0.3", temperature=2))
    student, trained = distilled.student, distilled.trained
    distilled(ids)["loss"].backward()
    gradients = [weight.grad.clone() for weight in trained]
    student.zero_grad()
    expected, predicted = (model(ids).logits.flatten(0, 1) for model in (teacher, student))
    expected, softened = ((logits / 2).log_softmax(-1) for logits in (expected, predicted))
    kl = torch.nn.functional.kl_div(softened, expected, reduction="batchmean", log_target=True)
    lm = student(ids, labels=ids).loss
    (0.7 * 4 * kl + 0.3 * lm).backward()
    assert len(gradients) == len(trained) > 0
    for gradient, weight in zip(gradients, trained, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("native", [True, False])
def test_with_and_without_bfloat16(native: bool, mla: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With bfloat16, only the trained weights are float32. The test simulates machines with and without bfloat16."""
    dtypes: set[torch.dtype] = set()
    load_model = assembly.load_model

    def spy(model: Model, dtype: torch.dtype, device: str) -> torch.nn.Module:
        dtypes.add(dtype)
        return load_model(model, dtype, device)

    monkeypatch.setattr(assembly, "load_model", spy)
    for module in (healing, layers, devices):
        monkeypatch.setattr(module, "native_bfloat16", lambda device: native)
    healed = heal(mla, tmp_path / "healed", "--text", CALIBRATION, "--steps", 40)
    assert dtypes == {torch.bfloat16 if native else torch.float32}
    kl = held_out(healed)
    assert kl["after"] < 0.9 * kl["before"]
    weights = load_file(healed / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    trained = weights["model.layers.0.self_attn.o_proj.weight"]
    assert not torch.equal(trained, trained.bfloat16().float())


def test_report_and_card(command_line: CommandLine, source: Path, mla: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "report.json"
    options = ("--text", CALIBRATION, "--tokens", 4096, "--steps", 8, "--batch-size", 2)
    code, table, complaint = command_line("heal", mla, out, *options, "--json", file)
    assert (code, complaint) == (0, "")
    assert f"vllm serve {out}" in table.replace("\n", "")
    report, written = json.loads(file.read_text()), json.loads((out / "conversion_report.json").read_text())
    assert written == json.loads((out / "config.json").read_text())["mla_conversion"]
    assert report["healing"] == written["healing"]
    healing = written.pop("healing")
    before = json.loads((mla / "conversion_report.json").read_text())
    assert written.pop("self_check")["kl"] < before.pop("self_check")["kl"]
    assert written.pop("loss")["tokens"] == 256 and before.pop("loss")["tokens"] == 512
    assert written == before
    assert (healing["tokens"], healing["window"], healing["steps"]) == (4096, 256, 8)
    assert healing["command"] == f"vllm-mla heal {mla} ./mla-healed {' '.join(map(str, options))}"
    card = (out / "README.md").read_text()
    assert f"8 steps of 2 x 256 tokens; text: 4,096 tokens of `{CALIBRATION.name}`" in card
    assert healing["command"] in card and "Nothing was trained" not in card


@pytest.mark.parametrize("more", [(), ("--train", "all", "--hidden-steps", 40)], ids=["attention", "stages"])
def test_killed(more: tuple, mla: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill, the same command goes on from the steps that were done, and gives the same bytes.

    In the steps that learn hidden states, the output head has no gradient, and Adam knows nothing of it.
    """
    out, folder, options = tmp_path / "out", tmp_path / "out.partial", (*OPTIONS, *more)
    expected = contents(heal(mla, tmp_path / "expected", *options))
    with running("heal", mla, out, *options) as process:
        wait_for(process, lambda: list(folder.glob(f"trainer/*/{trainer.COMPLETE}")))
        process.kill()
    started_from: list[str] = []
    train = transformers.Trainer.train

    def spy(self: transformers.Trainer, resume_from_checkpoint: str) -> Any:
        started_from.append(resume_from_checkpoint)
        return train(self, resume_from_checkpoint=resume_from_checkpoint)

    monkeypatch.setattr(transformers.Trainer, "train", spy)
    assert contents(heal(mla, out, *options)) == expected
    assert Path(started_from[0]).parent == folder / "trainer"
    assert not folder.exists()


def test_a_checkpoint_that_was_not_finished_is_passed_over(tmp_path: Path) -> None:
    for step, whole in ((9, True), (12, True), (15, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{step}" / trainer.COMPLETE).touch()
    assert trainer._last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-12")


def test_loss_that_is_no_number(
    refusal: Refused, mla: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last good checkpoint is kept, and the same command goes on from there."""
    forward, steps, out = distillation.Distillation.forward, 0, tmp_path / "out"

    def broken(
        self: distillation.Distillation, input_ids: torch.Tensor, weights: losses.Weights | None = None
    ) -> dict[str, torch.Tensor]:
        nonlocal steps
        result = forward(self, input_ids, weights=weights)
        steps += torch.is_grad_enabled()
        return result | {"loss": result["loss"] * math.nan} if steps == 20 else result

    with monkeypatch.context() as patch:
        patch.setattr(distillation.Distillation, "forward", broken)
        complaint = refusal("heal", mla, out, *OPTIONS)
    assert "the loss of step 20 is not a finite number" in complaint and "checkpoint-18" in complaint
    assert (tmp_path / "out.partial" / "trainer" / "checkpoint-18").is_dir()
    assert contents(heal(mla, out, *OPTIONS)) == expected


def test_other_options_do_not_go_on(mla: Path, refusal: Refused, tmp_path: Path) -> None:
    out, folder = tmp_path / "out", tmp_path / "out.partial"
    with running("heal", mla, out, *OPTIONS) as process:
        wait_for(process, lambda: (folder / "text.npy").exists())
    complaint = refusal("heal", mla, out, *OPTIONS, "--learning-rate", 0.001)
    assert "--learning-rate (not given then, 0.001 now)" in complaint
    assert folder.exists()


def test_another_teacher_does_not_go_on(mla: Path, refusal: Refused, tmp_path: Path) -> None:
    out, folder, larger = tmp_path / "out", tmp_path / "out.partial", RandomModel(hidden=96, heads=6)
    options = (*OPTIONS, "--teacher", larger.save(tmp_path / "teacher"))
    with running("heal", mla, out, *options) as process:
        wait_for(process, lambda: (folder / "text.npy").exists())
    larger.save(tmp_path / "teacher")
    assert "holds unfinished work that differs in teacher" in refusal("heal", mla, out, *options)


def test_disk_that_fills_up(mla: Path, expected: dict[str, bytes], small_disk: Path) -> None:
    """If the disk fills up during a run, the run ends with one sentence. It goes on when there is space again."""
    out, folder = small_disk / "out", small_disk / "out.partial"
    with running("heal", mla, out, *OPTIONS) as process:
        wait_for(process, lambda: list(folder.glob(f"trainer/*/{trainer.COMPLETE}")))
        fill(small_disk, process)
        _, complaint = process.communicate(timeout=60)
    assert process.returncode == 2, complaint
    (line,) = without_progress(complaint).strip().splitlines()
    assert "No space left on device" in line and "goes on from" in line
    (small_disk / "filler").unlink()
    assert contents(heal(mla, out, *OPTIONS)) == expected


def test_what_both_models_have_is_in_memory_once(smollm2: Path, half: Path) -> None:
    distilled = beside_its_source(half, smollm2)
    student, teacher = load(half), load(smollm2)
    attentions = sum(weight.numel() for name, weight in teacher.named_parameters() if ".self_attn." in name)
    assert sum(weight.numel() for weight in distilled.parameters()) == student.num_parameters() + attentions


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--loss", "mse"), "--loss is 'mse', but must be kl, lm, or a weighted sum"),
        (("--text", "nowhere.jsonl:0.5"), "Text nowhere.jsonl cannot be read"),
        (("--steps", 0), "--steps is 0, but must be 1 or more"),
        (("--length", 0), "--length is 0, but must be 1 or more"),
        (("--batch-size", -1), "--batch-size is -1, but must be 1 or more"),
        (("--learning-rate", "nan"), "--learning-rate is nan, but must be a finite number"),
        (("--learning-rate", 0), "--learning-rate is 0, but must be above 0"),
        (("--learning-rate", 1e30, "--steps", 5), "Training made the model worse"),
        (("--tokens", 256), "--tokens is 256, but must be at least 512"),
        (("--text", "nowhere.txt"), "nowhere.txt cannot be read"),
        (("--text", "chat"), "needs a chat template"),
        (("--source", "nowhere/at/all"), "nowhere/at/all does not exist"),
        (("--device", "tpu9"), "which is not a device"),
        (("--seed", 2**70), "must fit 64 bits"),
        (("--loss", "lm", "--temperature", 2), "--temperature is of the predictions in kl, and --loss is lm"),
        (("--lora-rank", 16), "--lora-rank is for --train lora, and --train is attention"),
        (("--hidden-steps", 5, "--steps", 5), "--hidden-steps is 5, but must be less than the 5 steps"),
        (("--hidden-steps", 99, "--tokens", 2048), "--hidden-steps is 99, but must be less than the "),
    ],
)
def test_refused_options(refusal: Refused, mla: Path, tmp_path: Path, options: tuple, reason: str) -> None:
    text = () if "--text" in options else ("--text", CALIBRATION)
    assert reason in refusal("heal", mla, tmp_path / "out", *text, *options)
    assert not list(tmp_path.iterdir())


def test_refused_models(refusal: Refused, source: Path, mla: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "is not a checkpoint that vllm-mla convert wrote" in refusal("heal", source, out)
    exact = convert(source, tmp_path / "exact", "--method", "exact")
    assert "is an exact conversion" in refusal("heal", exact, out)
    other = RandomModel(hidden=32, heads=2).save(tmp_path / "other")
    assert "differ in hidden_size, num_attention_heads" in refusal("heal", mla, out, "--source", other)
    assert "which is MODEL" in refusal("heal", mla, mla, "--force")
    assert "which holds files of MODEL: give" in refusal("heal", mla, mla.parent, "--force")
    assert "which holds files of MODEL's source: give" in refusal("heal", mla, source, "--force")
    assert "exists: choose another OUT" in refusal("heal", mla, exact, "--text", CALIBRATION)
    moved = Path(shutil.copytree(mla, tmp_path / "moved"))
    change_json(moved / "config.json", kv_lora_rank=6)
    assert "shapes differ from what its config.json asks for" in refusal("heal", moved, out, "--text", CALIBRATION)
    change_json(moved / "conversion_report.json", source="../gone")
    assert "was converted from ../gone, which is gone: say where with --source" in refusal("heal", moved, out)
    (moved / "conversion_report.json").unlink()
    assert "conversion_report.json" in refusal("heal", moved, out)
    assert not out.exists()


def test_xformers_needs_a_gpu(refusal: Refused, source: Path, mla: Path, tmp_path: Path) -> None:
    """One sentence in both: the command, and transformers."""
    complaint = refusal("heal", mla, tmp_path / "out", "--attention", "xformers", "--device", "cpu")
    assert "needs the package xformers" in complaint or "which needs a GPU" in complaint
    with pytest.raises(ValueError, match="needs the package xformers and a GPU"):
        load(mla, attn_implementation="xformers")(torch.arange(5)[None])
