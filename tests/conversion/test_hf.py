"""The MLA model in transformers."""

from pathlib import Path

import pytest
import torch
from support.commands import convert
from support.files import TEXT
from support.models import MIXTRAL_EXPERTS, QWEN3_EXPERTS, RandomModel, load
from transformers import AutoTokenizer, DynamicCache


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    source = RandomModel(heads=6, kv_heads=3, hidden=96, bias=True).save(folder / "source")
    return convert(source, folder / "mla", "--method", "exact")


def test_generate_caches_latents_only(half: Path) -> None:
    """Decoding from cached latents gives the same tokens as recomputing everything."""
    model = load(half)
    ids = AutoTokenizer.from_pretrained(half)(TEXT, return_tensors="pt").input_ids[:, :60]
    cache = DynamicCache(config=model.config)
    cached = model.generate(ids, max_new_tokens=20, do_sample=False, past_key_values=cache)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=20, do_sample=False, use_cache=False))
    layer = cache.layers[0]
    tokens = cached.shape[1] - 1  # the last token was not an input
    assert layer.keys.shape == (1, 1, tokens, model.config.kv_lora_rank)
    assert layer.values.shape == (1, 1, tokens, model.config.qk_rope_head_dim)


@pytest.mark.parametrize(
    ("family", "experts"),
    [
        ("llama", {}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("qwen3_moe", QWEN3_EXPERTS),
        ("mixtral", MIXTRAL_EXPERTS),
    ],
)
def test_every_family_decodes_from_its_cache(family: str, experts: dict, tmp_path: Path) -> None:
    """Decoding token by token from the cache gives the logits of a pass over the whole text."""
    source = RandomModel(family, experts=experts).save(tmp_path / "source")
    model = load(convert(source, tmp_path / "mla", "--method", "exact"))
    ids = torch.randint(0, 199, (2, 8), generator=torch.Generator().manual_seed(0))
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "eos_token_id": None}
    decoded = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, pad_token_id=0, **options)
    with torch.inference_mode():
        expected = model(decoded.sequences, use_cache=False).logits[:, 7:-1]
    torch.testing.assert_close(torch.stack(decoded.logits, dim=1), expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_eager_equals_sdpa_with_padding(tiny: Path) -> None:
    """Left padding changes nothing in either attention implementation."""
    ids = torch.randint(0, 199, (1, 20), generator=torch.Generator().manual_seed(0))
    padded = torch.cat((torch.zeros(1, 7, dtype=torch.long), ids), dim=1)
    mask = torch.cat((torch.zeros(1, 7, dtype=torch.long), torch.ones_like(ids)), dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = load(tiny)(ids).logits
    for implementation in ("sdpa", "eager"):
        model = load(tiny, attn_implementation=implementation)
        assert model.config._attn_implementation == implementation
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
        got = model(padded, attention_mask=mask, position_ids=positions).logits[:, 7:]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing(tiny: Path) -> None:
    """Gradients are the same with and without it. The frequencies get no gradient."""
    ids = torch.randint(0, 199, (2, 20), generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpointing in (False, True):
        model = load(tiny).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    assert any("kv_b_proj" in name for name in plain) and not any("rope_freqs" in name for name in plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)


def test_bfloat16_keeps_frequencies(tiny: Path, tmp_path: Path) -> None:
    """Frequencies stay float32 in a bfloat16 model, and survive saving."""
    model = load(tiny, torch.bfloat16)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight.dtype == torch.bfloat16
    assert attention.rope_freqs.dtype == torch.float32
    model.save_pretrained(tmp_path)
    again = load(tmp_path, torch.bfloat16)
    assert torch.equal(again.model.layers[0].self_attn.rope_freqs, attention.rope_freqs)
