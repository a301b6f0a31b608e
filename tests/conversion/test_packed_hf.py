"""Packed caches in transformers: new tokens are attended as they will be cached, and the cache holds rows."""

from pathlib import Path

import pytest
import torch
from support.commands import convert
from support.models import RandomModel, load
from support.packed import cache_means, collected, pack_checkpoint
from transformers import AutoModelForCausalLM, DynamicCache

from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat
from vllm_mla_plugin.checkpoint.latent_cache import latent_cache_json

FORMATS = [CacheFormat.parse(spec) for spec in ("32x4g16+16x2g16c/48x6g24", "48x8g48s/48x5g16")]


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 199, shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    model = RandomModel(heads=6, kv_heads=3, hidden=96, std=0.1)
    out = convert(model.save(folder / "source"), folder / "mla", "--method", "exact")
    return pack_checkpoint(out, folder / "packed", FORMATS, random_ids(8, 32))


def test_generate_caches_rows(folder: Path) -> None:
    """Decoding from rows gives the tokens that recomputing everything gives."""
    model, ids = load(folder), random_ids(2, 30)
    cache = DynamicCache(config=model.config)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids, past_key_values=cache, eos_token_id=None, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, eos_token_id=None, **options))
    for layer, format in zip(cache.layers, FORMATS, strict=True):
        assert layer.keys.shape == (2, 1, 39, format.bytes_per_token) and layer.keys.dtype == torch.uint8
        assert layer.values.view(torch.int32).flatten().tolist() == [*range(39)] * 2, "positions"
    static = model.generate(ids, cache_implementation="static", disable_compile=True, eos_token_id=None, **options)
    assert torch.equal(static, cached)


@torch.inference_mode()
def test_left_padding_changes_nothing(folder: Path) -> None:
    """Means turn with positions, wherever a token stands."""
    model, ids = load(folder), random_ids(1, 20)
    padded = torch.cat((torch.zeros(1, 7, dtype=torch.long), ids), dim=1)
    mask = torch.cat((torch.zeros(1, 7, dtype=torch.long), torch.ones_like(ids)), dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = model(ids).logits
    for use_cache in (False, True):
        got = model(padded, attention_mask=mask, position_ids=positions, use_cache=use_cache).logits[:, 7:]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_means_are_free(folder: Path) -> None:
    """With 16 bits a number, a packed model with means computes what the source does."""
    model, ids = load(folder), random_ids(2, 40)
    source = load(folder.parent / "source")
    means = cache_means(load(folder.parent / "mla"), random_ids(8, 32))
    for layer, mean in zip(model.model.layers, means, strict=True):
        torch.testing.assert_close(layer.self_attn.cache_mean, mean)
        layer.self_attn.cache_format = CacheFormat.parse("48x16/48x16")
    torch.testing.assert_close(model(ids).logits, source(ids).logits, rtol=2e-2, atol=2e-3)


def test_trains_through_rounding(folder: Path) -> None:
    """The gradient reaches the projection as if nothing were rounded."""
    model, ids = load(folder), random_ids(2, 16)
    with collected(model) as outputs:
        logits = model(ids, use_cache=False).logits
    cached = outputs[0][0]
    (gradient,) = torch.autograd.grad(logits.square().sum(), cached)
    assert gradient.shape == cached.shape and gradient.isfinite().all()
    assert (gradient[:, :-1] != 0).float().mean() > 0.9


def test_unpacked_from_the_same_checkpoint(folder: Path) -> None:
    """Without the format, the means in the checkpoint are left where they are."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, latent_cache=None, dtype=torch.float32, output_loading_info=True
    )
    assert not info["unexpected_keys"] and not info["missing_keys"]
    ids = random_ids(2, 20)
    with torch.inference_mode():
        expected = load(folder.parent / "source")(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_saved_and_loaded_again(folder: Path, tmp_path: Path) -> None:
    model, ids = load(folder), random_ids(1, 20)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.config.latent_cache == latent_cache_json(FORMATS)
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, model(ids).logits)
