"""``--rope-scaling``: contexts beyond the source's, and no other RoPE afterwards."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import Refused, contents, convert, heal
from support.engine import run_engine
from support.files import CALIBRATION
from support.models import YARN, RandomModel, load
from transformers import AutoConfig, AutoModelForCausalLM
from vllm.config import ModelConfig

from mla_converters.checkpoints.manifest import write_manifest
from mla_converters.checkpoints.models import find_model
from mla_converters.options import VerifyOptions
from mla_converters.planning.plan import plan
from mla_converters.verify import verify
from vllm_mla_plugin import register

EXACT = ("--method", "exact")
SCALINGS = {
    "yarn": {"rope_type": "yarn", "factor": 3.5, "original_max_position_embeddings": 200},
    "yarn-own-context": {"rope_type": "yarn", "factor": 2.8},
    "yarn-old-name": {"type": "yarn", "factor": 3.5, "original_max_position_embeddings": 200, "beta_fast": 16},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 160,
    },
    "linear": {"rope_type": "linear", "factor": 3.0},
}
CONTEXTS = {"yarn": 700, "yarn-own-context": 716, "yarn-old-name": 700, "llama3": 640, "linear": 768}
TOKENS = 600


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(0, 199, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model(ids).logits


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("case", SCALINGS)
def test_computes_what_the_source_does_with_it(family: str, case: str, tmp_path: Path) -> None:
    """At more tokens than the source takes without it."""
    source = RandomModel(family).save(tmp_path / "source")
    out = convert(source, tmp_path / "out", *EXACT, "--rope-scaling", json.dumps(SCALINGS[case]))
    assert f"Contexts of up to {CONTEXTS[case]} tokens" in (out / "README.md").read_text()
    scaling = {"rope_type": "yarn"} | SCALINGS[case] if "type" in SCALINGS[case] else SCALINGS[case]
    rope = {"rope_theta": 10000.0, **scaling}
    config = AutoConfig.from_pretrained(source, rope_parameters=rope)
    expected = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=torch.float64).eval()
    got = load(out, torch.float64)
    assert (logits(got) - logits(expected)).norm() < 1e-6 * logits(expected).norm()
    plain = load(source, torch.float64)
    assert (logits(got) - logits(plain)).norm() > 1e-3 * logits(plain).norm()  # the scaling does something


LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}
LINEAR_CASES: dict[str, tuple[dict[str, Any], tuple[object, ...], int]] = {
    "source": (LINEAR, (), 640),
    "shortened": (LINEAR, ("--max-context", 64), 62),
    "added": ({}, ("--rope-scaling", json.dumps(SCALINGS["linear"])), 768),
    "added-and-shortened": ({}, ("--rope-scaling", json.dumps(SCALINGS["linear"]), "--max-context", 767), 765),
}


def served_context(folder: Path) -> int:
    return ModelConfig(str(folder), dtype="float32", skip_tokenizer_init=True).max_model_len


@pytest.mark.parametrize("case", LINEAR_CASES)
def test_linear_context_is_the_one_that_vllm_serves(case: str, tmp_path: Path) -> None:
    """vLLM multiplies ``max_position_embeddings`` by the factor."""
    rope, options, context = LINEAR_CASES[case]
    source = (RandomModel(rope=rope) if rope else RandomModel()).save(tmp_path / "source")
    out = convert(source, tmp_path / "out", *EXACT, *options)
    register()
    assert served_context(out) == find_model(str(out), ExitStack()).context == context
    assert f"Contexts of up to {context} tokens" in (out / "README.md").read_text()
    if not options:
        assert served_context(source) == context == plan(str(source)).source.context


def test_window_within_a_linear_context(refusal: Refused, tmp_path: Path) -> None:
    """It counts tokens, of which there are more than positions."""
    source = RandomModel("mistral", window=300, rope=LINEAR).save(tmp_path / "source")
    assert "--max-context 300" in refusal("convert", source, tmp_path / "out", *EXACT)
    assert "must be 3 to the source's 640" in refusal("convert", source, tmp_path / "out", *EXACT, "--max-context", 2)
    assert served_context(convert(source, tmp_path / "out", *EXACT, "--max-context", 300)) == 300


def test_calibrated_and_healed(tmp_path: Path) -> None:
    """Calibration and healing have the scaling, so that healing begins near the source; the report says it."""
    source = RandomModel(std=0.3).save(tmp_path / "source")
    scaling = ("--rope-scaling", json.dumps(SCALINGS["yarn"]))
    sizes = ("--cache-ratio", 0.9, "--latent-bits", 16)
    options = ("--calibration", "self", "--calibration-tokens", 1024, "--refit-steps", 1)
    out = convert(source, tmp_path / "out", *options, *sizes, *scaling, "--max-context", 512)
    report = json.loads((out / "conversion_report.json").read_text())
    assert report["rope_scaling"] == SCALINGS["yarn"]
    assert '--rope-scaling \'{"rope_type": "yarn"' in report["command"]
    assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == 512
    few_steps = ("--text", CALIBRATION, "--tokens", 4096, "--batch-size", 1, "--steps", 20, "--learning-rate", 3e-4)
    healed = heal(out, tmp_path / "healed", *few_steps)
    report = json.loads((healed / "conversion_report.json").read_text())
    assert report["healing"]["kl_held_out"]["before"] < 1.0  # from the source without the scaling, 2.7


def test_verified(tmp_path: Path) -> None:
    """Against the source with the scaling, which without it predicts something else."""
    source = RandomModel().save(tmp_path / "source")
    out = convert(source, tmp_path / "out", *EXACT, "--rope-scaling", json.dumps(SCALINGS["yarn"]))
    report = verify(out, VerifyOptions(source=str(source)))
    assert report.ok, report
    description = json.loads((out / "config.json").read_text())
    del description["mla_conversion"]["rope_scaling"]
    (out / "config.json").write_text(json.dumps(description))
    write_manifest(out)
    (check,) = [check for check in verify(out, VerifyOptions(source=str(source))).checks if check.name == "predictions"]
    assert "the KL is above" in check.problems[0]


def test_the_same_once_more(tmp_path: Path) -> None:
    """A source that has the scaling already converts to the same with and without the option."""
    source = RandomModel(rope=YARN).save(tmp_path / "source")
    given = {name: value for name, value in YARN.items() if name != "rope_theta"}
    plain = convert(source, tmp_path / "plain", *EXACT)
    again = convert(source, tmp_path / "again", *EXACT, "--rope-scaling", json.dumps(given))
    assert contents(plain)["model.safetensors"] == contents(again)["model.safetensors"]


REFUSED: dict[str, tuple[Any, str]] = {
    "no-json": ("{", "--rope-scaling is not valid JSON"),
    "no-object": ("[4]", "must be a JSON object"),
    "type": ({"rope_type": "dynamic", "factor": 2.0}, "rope_type 'dynamic'; choose one of yarn, llama3, linear"),
    "no-type": ({"factor": 2.0}, "rope_type None; choose one of"),
    "list-type": ({"rope_type": ["yarn"], "factor": 2.0}, "choose one of"),
    "no-factor": ({"rope_type": "yarn"}, "lacks factor"),
    "small": ({"rope_type": "linear", "factor": 0.5}, "factor 0.5, but must be a number of 1 or more"),
    "text": ({"rope_type": "linear", "factor": "4"}, "factor '4', but must be a number"),
    "truth": ({"rope_type": "linear", "factor": True}, "factor True, but must be a number"),
    "endless": ('{"rope_type": "linear", "factor": Infinity}', "factor inf, but must be a number"),
    "huge": ({"rope_type": "linear", "factor": 1e300}, "The RoPE factor 1e+300 with max_position_embeddings 256 gives"),
    "half-a-token": (
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64.5},
        "must be a whole number",
    ),
    "theta": ({"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e6}, "has rope_theta; it takes"),
    "truncate": ({"rope_type": "yarn", "factor": 2.0, "truncate": 1}, "must be true or false"),
    "order": (SCALINGS["llama3"] | {"low_freq_factor": 4.0}, "must be above"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(refusal: Refused, case: str, tmp_path: Path) -> None:
    value, reason = REFUSED[case]
    source = RandomModel().save(tmp_path / "source")
    given = value if isinstance(value, str) else json.dumps(value)
    assert reason in refusal("convert", source, tmp_path / "out", *EXACT, "--rope-scaling", given)
    assert not (tmp_path / "out").exists()


def test_another_scaling_is_refused(refusal: Refused, tmp_path: Path) -> None:
    source = RandomModel(rope=YARN).save(tmp_path / "source")
    given = json.dumps({"rope_type": "yarn", "factor": 2.0})
    complaint = refusal("convert", source, tmp_path / "out", *EXACT, "--rope-scaling", given)
    assert "The source scales RoPE already" in complaint


CHANGED = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


def test_out_keeps_its_rope_in_transformers(tmp_path: Path) -> None:
    out = convert(RandomModel().save(tmp_path / "source"), tmp_path / "out", *EXACT)
    config = AutoConfig.from_pretrained(out, rope_parameters=CHANGED)
    with pytest.raises(ValueError, match="rope_type cannot be changed afterwards: convert the source again with"):
        AutoModelForCausalLM.from_pretrained(out, config=config)


@pytest.mark.engine
def test_out_keeps_its_rope_in_vllm(tmp_path: Path) -> None:
    out = convert(RandomModel().save(tmp_path / "source"), tmp_path / "out", *EXACT)
    engine = {"hf_overrides": {"rope_parameters": CHANGED}, "max_model_len": 64}
    with pytest.raises(AssertionError, match="rope_type cannot be changed afterwards: convert the source again with"):
        run_engine(out, [[1, 2, 3]], engine=engine)
