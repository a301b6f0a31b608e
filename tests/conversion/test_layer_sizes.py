"""Layers with different cache sizes, in the real vLLM engine and in transformers."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.agreement import assert_agrees
from support.commands import UNPACKED, convert
from support.engine import run_engine
from support.files import CALIBRATION
from support.models import RandomModel, load, save_random_mla
from transformers import AutoConfig

from mla_converters.latent.cache_size import CacheBudget
from mla_converters.methods.attention_aware.layer_sizes import candidate_sizes, spread

SIZES = {
    "widths": ([48, 16, 33, 16], [16, 8, 4, 12]),
    "one-width-many-splits": ([48, 32, 24, 40], [8, 24, 32, 16]),
}


def random_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 199, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.engine
@pytest.mark.parametrize(("case", "eager"), [("widths", False), ("one-width-many-splits", True)])
def test_sizes_per_layer(case: str, eager: bool, tmp_path: Path) -> None:
    """The engine agrees with transformers, and reserves memory for each layer's own width."""
    latents, ropes = SIZES[case]
    folder = save_random_mla(tmp_path / "model", kv_lora_ranks=latents, qk_rope_head_dims=ropes)
    model = load(folder)
    assert [layer.self_attn.latent_dim for layer in model.model.layers] == latents
    assert [layer.self_attn.rope_dim for layer in model.model.layers] == ropes

    prompts = random_prompts(150, 1, 17, 40)
    job = {
        "max_tokens": 16,
        "prompt_logprobs": True,
        "no_tokenizer": True,
        "environment": {"VLLM_CACHE_ROOT": str(tmp_path / "cache")},
        "engine": {"max_model_len": 512, "enforce_eager": eager},
    }
    result = run_engine(folder, prompts, **job)
    assert_agrees(result, model, prompts)
    token_bytes = torch.float32.itemsize * (sum(latents) + sum(ropes))
    assert result["kv_tokens"] == pytest.approx(2**30 / token_bytes, rel=1e-3)


def test_sizes_need_one_entry_per_layer() -> None:
    with pytest.raises(ValueError, match="kv_lora_ranks has 3 entries, but the model has 4 layers"):
        AutoConfig.for_model("llama_mla", num_hidden_layers=4, kv_lora_ranks=[8, 8, 8])


@pytest.mark.parametrize("most", [2, 4])
def test_sizes_go_where_they_save_most(most: int) -> None:
    """The choice is the best of all with so few sizes, for costs that fall ever more slowly, as errors do."""
    generator = torch.Generator().manual_seed(0)
    sizes = (2, 4, 6, 8)
    costs = []
    for _ in range(4):
        steps = torch.rand(len(sizes), generator=generator).sort(descending=True).values
        costs.append(dict(zip(sizes, (10 - steps.cumsum(0)).tolist(), strict=True)))
    for total in (8, 14, 20, 32):
        chosen = spread(costs, total, most)
        best = min(
            sum(cost[size] for cost, size in zip(costs, choice, strict=True))
            for choice in product(sizes, repeat=4)
            if sum(choice) <= total and len(set(choice)) <= most
        )
        assert sum(chosen) <= total and len(set(chosen)) <= most
        assert sum(cost[size] for cost, size in zip(costs, chosen, strict=True)) == pytest.approx(best)


def test_candidate_sizes() -> None:
    """A layer may have a half to twice the common size, unless it would take a GPU away that serves the common size."""
    common = CacheBudget(512, 64)
    assert candidate_sizes(common, 1024, 128)[2 * 576] == CacheBudget(1024, 128)
    assert sorted(candidate_sizes(common, 1024, 128)) == [288, 432, 504, 576, 648, 720, 864, 1152]
    wide = candidate_sizes(CacheBudget(512, 96), 1024, 128)
    assert max(size.qk_rope_head_dim for size in wide.values()) == 120, "prefill takes heads of 128 + 128 numbers"
    assert max(candidate_sizes(CacheBudget(512, 96), 1024, 256)) == 2 * 608, "no GPU serves the common size either"


def test_measured_sizes(tmp_path: Path) -> None:
    """A layer whose attention does almost nothing gets a small cache. The total stays within the limit."""
    source = RandomModel(heads=6, kv_heads=3, hidden=96, layers=3).save(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"] *= 1e-3
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    options = ("--calibration", CALIBRATION, "--calibration-tokens", 2048, "--refit-steps", 2, *UNPACKED)
    out = convert(source, tmp_path / "mla", *options, "--layer-sizes", "measured")
    config = json.loads((out / "config.json").read_text())
    widths = [sum(sizes) for sizes in zip(config["kv_lora_ranks"], config["qk_rope_head_dims"], strict=True)]
    assert widths[1] == min(widths) < max(widths)
    assert sum(widths) <= 3 * 48 and config["mla_conversion"]["cache_ratio"] == pytest.approx(sum(widths) / 288)
    model = load(out)
    assert [layer.self_attn.kv_b_proj.in_features for layer in model.model.layers] == config["kv_lora_ranks"]
    with torch.inference_mode():
        assert model(torch.arange(50)[None]).logits.isfinite().all()
