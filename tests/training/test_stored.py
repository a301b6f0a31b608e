"""A teacher's predictions that vLLM wrote down, and training on them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.commands import UNPACKED, Refused, alone, convert, heal
from support.files import CALIBRATION
from support.models import RandomModel, load

from mla_converters.training.losses import WholeVocabulary
from mla_converters.training.stored import TopTokens, read_stored

TOP = 12


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return RandomModel().save(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def mla(source: Path) -> Path:
    few = ("--calibration-tokens", 1024, "--refit-steps", 0)
    return convert(source, source.with_name("mla"), "--calibration", CALIBRATION, *few, *UNPACKED)


@pytest.fixture(scope="module")
def written(source: Path) -> Path:
    """The predictions of a larger model."""
    teacher = RandomModel(hidden=96, heads=6, layers=3, head_dim=32).save(source.with_name("teacher"))
    options = ("--text", CALIBRATION, "--tokens", 4096, "--length", 64, "--top-k", TOP, "--dtype", "float32")
    return alone("logits", teacher, source.with_name("written"), *options)


def test_divergence() -> None:
    """With all tokens, it is that over the whole vocabulary; with fewer, that of their sums."""
    torch.manual_seed(0)
    expected, logits = 3 * torch.randn(5, 40), torch.randn(5, 40)
    p, q = expected.softmax(-1), logits.softmax(-1)
    whole = WholeVocabulary(expected, torch.eye(40)).divergence(logits, 0, 1.0)
    for count in (40, 7):
        logprobs, ids = expected.log_softmax(-1).topk(count)
        found = TopTokens(ids, logprobs).divergence(logits[2:], 2, 1.0)
        kept_p, kept_q = (x.gather(1, ids)[2:] for x in (p, q))
        rest_p, rest_q = (1 - kept.sum(1).clamp(max=1) for kept in (kept_p, kept_q))
        rest = (rest_p * (rest_p / rest_q).log()).sum() if count < 40 else 0
        torch.testing.assert_close(found, (kept_p * (kept_p / kept_q).log()).sum() + rest)
    assert torch.isclose(whole, (p * (p / q).log()).sum())
    assert 0 < TopTokens(ids, logprobs).divergence(logits, 0, 1.0) < whole


def test_gradient_is_finite_where_nothing_remains() -> None:
    logits = torch.randn(2, 4, requires_grad=True)
    ids, logprobs = torch.arange(4).expand(2, 4), torch.full((2, 4), 0.25).log()
    TopTokens(ids, logprobs).divergence(logits, 0, 1.0).backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.engine
def test_predictions_are_the_models(source: Path, written: Path) -> None:
    """vLLM writes what transformers computes, the last token of a window included."""
    stored = read_stored(written)
    ids, top, logprobs = (stored.columns[name] for name in ("input_ids", "top_ids", "top_logprobs"))
    assert ids.shape == (64, 64) and top.shape == logprobs.shape == (64, 64, TOP)
    with torch.inference_mode():
        expected = load(source.with_name("teacher"))(ids[:4].long()).logits.log_softmax(-1)
    torch.testing.assert_close(logprobs[:4].float(), expected.gather(-1, top[:4].long()), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(logprobs[:4].float(), expected.topk(TOP).values, rtol=2e-3, atol=2e-3)
    report = json.loads((written / "logits.json").read_text())
    remainder = 1 - logprobs.float().exp().sum(-1).mean().item()
    assert report["remainder"] == pytest.approx(remainder, abs=1e-3)
    assert report["bytes"] == sum(values.nbytes for values in stored.columns.values())


@pytest.mark.engine
def test_heal_on_them(mla: Path, written: Path, tmp_path: Path) -> None:
    healed = heal(mla, tmp_path / "healed", "--teacher", written, "--steps", 24, "--batch-size", 4)
    healing = json.loads((healed / "conversion_report.json").read_text())["healing"]
    kl = healing["kl_held_out"]
    assert 0 < kl["after"] < 0.98 * kl["before"]
    assert (healing["tokens"], healing["window"], healing["text"]) == (4096, 64, [CALIBRATION.name])


def test_failed_engine_keeps_the_text(
    refusal: Refused, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on with it, also with other options that do not change the text."""
    out, text = tmp_path / "out", tmp_path / "out.partial" / "text.npy"
    asked = ("logits", source, out, "--text", CALIBRATION, "--tokens", 1024, "--length", 64)
    monkeypatch.setattr("mla_converters.engines.process.WORKER", "no.such.module")
    assert "goes on from" in refusal(*asked)
    written = text.stat().st_mtime_ns
    for changed in (("--tensor-parallel-size", 2), ("--top-k", 5), ("--dtype", "bfloat16")):
        line = refusal(*asked, *changed)
        assert "vLLM died" in line and "goes on from" in line
    assert "--top-k is 199" in refusal(*asked, "--top-k", 199)
    assert text.stat().st_mtime_ns == written


def test_too_small_disk_keeps_the_text(refusal: Refused, source: Path, small_disk: Path) -> None:
    sizes = ("--tokens", 8192, "--length", 64, "--top-k", 128)
    line = refusal("logits", source, small_disk / "out", "--text", CALIBRATION, *sizes)
    assert "GB on disk" in line and "goes on from" in line
    assert (small_disk / "out.partial" / "text.npy").exists()


def test_without_vllm(refusal: Refused, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mla_converters.support.packages.find_spec", lambda module: None)
    assert "logits needs the package vllm" in refusal("logits", source, tmp_path / "out", "--text", CALIBRATION)
    assert not list(tmp_path.iterdir())


@pytest.mark.engine
def test_refused(refusal: Refused, mla: Path, source: Path, written: Path, tmp_path: Path) -> None:
    out, broken = tmp_path / "out", Path(shutil.copytree(written, tmp_path / "broken"))
    assert "holds predictions on text of its own" in refusal("heal", mla, out, "--teacher", written, "--text", "self")
    assert "no teacher in memory" in refusal("heal", mla, out, "--teacher", written, "--hidden-steps", 3)
    np.save(broken / "top_ids.npy", np.zeros((2, 2), dtype=np.int32))
    assert "top_ids.npy holds int32 (2, 2)" in refusal("heal", mla, out, "--teacher", broken)
    (broken / "top_ids.npy").unlink()
    assert "top_ids.npy cannot be read" in refusal("heal", mla, out, "--teacher", broken)
    assert "exists: choose another OUT" in refusal("logits", source, written)
    assert "--top-k is 199, but must be less than the vocabulary" in refusal("logits", source, out, "--top-k", 199)
    assert not out.exists()
