"""Real weights in every family: SmolLM2 is written as that architecture, and computes the same function."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from support.agreement import assert_agrees, text_prompts
from support.commands import SPLIT, convert
from support.engine import run_engine
from support.files import CALIBRATION
from support.models import converted_layers, load
from transformers import AutoTokenizer

from mla_converters.checkpoints.source import open_source
from mla_converters.latent.cache_size import CacheBudget
from mla_converters.methods.transmla.run import transmla
from scripts.as_family import as_family


@pytest.mark.slow
@pytest.mark.parametrize("family", ["phi3", "granite", "smollm3", "seed_oss"])
def test_same_conversion(family: str, smollm2: Path, tmp_path: Path) -> None:
    """At half of the cache, the family's conversion equals Llama's."""
    source = as_family(smollm2, family, tmp_path / "source")
    windows = torch.randint(0, 49152, (2, 512), generator=torch.Generator().manual_seed(1))
    got, expected = (first_layers(folder, windows, 2) for folder in (source, smollm2))
    for layer, reference in zip(got, expected, strict=True):
        assert layer.keys() == reference.keys()
        for name, tensor in reference.items():
            assert torch.equal(layer[name], tensor), name


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral", "qwen2", "mixtral"])
def test_real_weights(family: str, smollm2: Path, tmp_path: Path) -> None:
    """At half of the cache, the family's conversion equals Llama's. vLLM agrees with transformers."""
    source = as_family(smollm2, family, tmp_path / "source")
    # Both get the same tokens, because transformers tokenises text for every Qwen2 folder in Qwen2's way.
    ids = AutoTokenizer.from_pretrained(smollm2)(CALIBRATION.read_text(), return_tensors="pt").input_ids
    windows = ids[:, :2048].view(4, 512)
    got, expected = (first_layers(folder, windows) for folder in (source, smollm2))
    for layer, reference in zip(got, expected, strict=True):
        for name, tensor in reference.items():
            assert torch.equal(layer[name], tensor), name
        assert all(not layer[name].any() for name in layer.keys() - reference.keys()), "a bias out of nothing"

    options = ("--calibration", CALIBRATION, "--calibration-tokens", 1024, "--refit-steps", 0, *SPLIT)
    out = convert(source, tmp_path / "mla", *options)
    model = load(out)
    assert model.config.model_type == f"{family}_mla"
    prompts = text_prompts(out, 6, longest=200)
    assert_agrees(run_engine(out, prompts, max_tokens=16, prompt_logprobs=True), model, prompts)


def first_layers(folder: Path, windows: torch.Tensor, count: int = 4) -> list[dict[str, torch.Tensor]]:
    """The first ``count`` layers of a conversion to half of the cache."""
    with open_source(str(folder)) as source:
        conversion = transmla(source, windows, CacheBudget(128, 64), freqfold=2)
        return list(islice(converted_layers(source, conversion), count))
