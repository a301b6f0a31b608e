"""The map from each head's own query to its rotary query, which is a tensor of its own where that takes fewer bytes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.commands import convert, heal
from support.files import CALIBRATION
from support.models import FAMILY_MODELS, YARN, RandomModel, load
from support.older_layout import older_checkpoint, without_query_map

from mla_converters.checkpoints.source import open_source
from mla_converters.latent import maps as latent_maps
from mla_converters.latent.cache_size import CacheBudget
from mla_converters.latent.maps import ROTARY_MAP, LatentMap, has_query_map, mla_weights
from mla_converters.latent.module import LatentAttention
from mla_converters.streaming.planned import planned_tensors
from mla_converters.training.parametrization import parts_apart
from mla_converters.training.trained import make_trainable, trained_tensors

ATTENTION = "model.layers.0.self_attn."
FEW = ("--calibration", CALIBRATION, "--calibration-tokens", 1024, "--refit-steps", 0)
SIZES = ("--kv-lora-rank", 20, "--qk-rope-head-dim", 12)
METHODS = {
    "attention-aware": (*SIZES, *FEW),
    "transmla": ("--method", "transmla", *SIZES, *FEW[:4]),
    "mha2mla": ("--method", "mha2mla", *SIZES),
    "exact": ("--method", "exact"),
}


@torch.inference_mode()
def logits(folder: Path) -> torch.Tensor:
    """Of a fixed text, in float64."""
    return load(folder, torch.float64)(torch.arange(40, 100)[None]).logits


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_queries_as_they_are(method: str, tmp_path: Path) -> None:
    """``q_proj`` is the source's byte for byte.

    With the map multiplied into it, as in checkpoints of version 0.1.0, the model computes the same, because the rotary
    query is exactly a linear map of the head's query.
    """
    source = RandomModel(heads=6, kv_heads=3, hidden=96, bias=True, dtype=torch.bfloat16).save(tmp_path / "source")
    out = convert(source, tmp_path / "mla", *METHODS[method], "--dtype", "float32")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    for kind in ("weight", "bias"):
        name = f"{ATTENTION}q_proj.{kind}"
        assert torch.equal(after[name], before[name].float())
    config = load(out).config
    assert after[ATTENTION + ROTARY_MAP].shape == (6, 16, config.qk_rope_head_dim) and config.rotary_query_map
    older = older_checkpoint(out, tmp_path / "older")
    assert load_file(older / "model.safetensors")[f"{ATTENTION}q_proj.weight"].shape[0] > 6 * 16
    torch.testing.assert_close(logits(older), logits(out), rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["glm4", "phi3", "qwen3", "olmo2"])
def test_queries_are_stored_in_the_sources_order(family: str, tmp_path: Path) -> None:
    """Where the source turns neighbours or some components only, the map takes the order over, and ``q_proj`` stays."""
    model = RandomModel(**vars(FAMILY_MODELS[family]) | {"kv_heads": 3, "heads": 9, "hidden": 288, "head_dim": 32})
    if family == "glm4":  # the attention factor is not for components that never turn
        model.rope = YARN | {"partial_rotary_factor": 0.5}
    source = model.save(tmp_path / "source")
    out = convert(source, tmp_path / "mla", "--method", "exact")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    fused = before.get(f"{ATTENTION}qkv_proj.weight")
    expected = before[f"{ATTENTION}q_proj.weight"] if fused is None else fused[: 9 * 32]
    assert torch.equal(after[f"{ATTENTION}q_proj.weight"], expected)
    # Norms are computed in float32, and what is divided by an attention factor is rounded to float32.
    rounded = load(out).config.qk_norm or family == "glm4"
    torch.testing.assert_close(logits(out), logits(source), rtol=0, atol=1e-4 if rounded else 1e-9)


@pytest.fixture
def maps() -> LatentMap:
    """A random map of 2 KV heads of 8 numbers to 12 + 10, for 4 query heads."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "key_to_rope": (10, 16),
        "query_to_rope": (4, 10, 8),
        "query_to_nope": (4, 8, 8),
        "kv_to_latent": (12, 32),
        "latent_to_key": (2, 8, 12),
        "latent_to_value": (2, 8, 12),
    }
    parts = {name: torch.randn(shape, dtype=torch.float64, generator=generator) for name, shape in shapes.items()}
    return LatentMap(rope_freqs=torch.rand(5, generator=generator), **parts)


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "qk-norm"])
def test_with_and_without_the_map(normed: bool, maps: LatentMap, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both layouts give the same outputs, whatever the map is; without it, ``q_proj`` holds its product."""
    generator = torch.Generator().manual_seed(1)
    rows = {"q": 32, "k": 16, "v": 16}
    source = {f"{name}_proj.weight": torch.randn(size, 24, generator=generator).double() for name, size in rows.items()}
    source |= {f"{name}_proj.bias": torch.randn(size, generator=generator).double() for name, size in rows.items()}
    source["o_proj.weight"] = torch.eye(32, dtype=torch.float64)
    if normed:
        source |= {f"{name}_norm.weight": torch.rand(8, generator=generator).double() for name in "qk"}
    apart = mla_weights(source, maps)
    monkeypatch.setattr(latent_maps, "has_query_map", lambda *sizes: False)
    together = mla_weights(source, maps)
    assert ROTARY_MAP in apart and ROTARY_MAP not in together
    if normed:
        for name, tensor in without_query_map(apart, own_queries=True).items():
            torch.testing.assert_close(tensor, together[name], rtol=1e-12, atol=1e-12)
    x = torch.randn(2, 30, 24, generator=generator).double()
    # The norm is computed in float32.
    options = {"qk_norm_eps": 1e-6, "dtype": torch.float32} if normed else {"dtype": torch.float64}
    x = x.to(options["dtype"])
    outputs = [LatentAttention(weights, 4, 0.3, **options)(x) for weights in (apart, together)]
    torch.testing.assert_close(*outputs, rtol=1e-4 if normed else 0, atol=1e-4 if normed else 1e-9)


def test_the_map_is_trained_by_itself(maps: LatentMap) -> None:
    """Training sees one matrix of each head for its queries, and one for the map."""
    source = {f"{name}_proj.weight": torch.randn(size, 24) for name, size in (("q", 32), ("k", 16), ("v", 16))}
    attention = LatentAttention(mla_weights(source | {"o_proj.weight": torch.eye(32)}, maps), 4, 0.3)
    with parts_apart([attention]):
        shapes = {name: tuple(parameter.shape) for name, parameter in attention.named_parameters()}
        attention(torch.randn(1, 9, 24)).square().sum().backward()
        assert all(parameter.grad.any() for parameter in attention.parameters())
    assert shapes["q_proj.parametrizations.weight.original"] == (4, 8, 24)
    assert shapes[ROTARY_MAP] == (4, 8, 10)


def attention_bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(x.numel() * x.element_size() for name, x in tensors.items() if ".self_attn." in name)


def test_bytes_of_llama_3_8b() -> None:
    """At 512 + 64, what a layer's attention takes is less than in the source: computed from shapes."""
    sizes = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096), "o_proj": (4096, 4096)}
    source = {
        f"{name}.weight": torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in sizes.items()
    }
    assert has_query_map(128, 4096, 64, 128, False)
    with torch.device("meta"):
        made = mla_weights(
            source,
            LatentMap(
                torch.empty(32),
                torch.empty(64, 1024),
                torch.empty(8, 64, 128),
                torch.empty(8, 128, 128),
                torch.empty(512, 2048),
                torch.empty(8, 128, 512),
                torch.empty(8, 128, 512),
            ),
        )
    before = sum(tensor.numel() for tensor in source.values())
    assert before == 41_943_040
    assert sum(tensor.numel() for tensor in made.values()) == 40_370_176 + 32  # with the frequencies
    assert made[ROTARY_MAP].shape == (32, 128, 64)


def test_bytes_of_the_same_proportions(tmp_path: Path) -> None:
    """Llama-3-8B's proportions, one sixteenth as wide: the written attention is smaller than the source's."""
    model = RandomModel(heads=32, kv_heads=8, head_dim=8, hidden=256, dtype=torch.bfloat16)
    source = model.save(tmp_path / "source")
    out = convert(source, tmp_path / "mla", "--kv-lora-rank", 32, "--qk-rope-head-dim", 4, *FEW)
    before, after = (attention_bytes(load_file(folder / "model.safetensors")) for folder in (source, out))
    assert before == 2 * 2 * 163_840
    assert after == 2 * (2 * 157_696 + 2 * 4), "two layers, in bfloat16, with two frequencies"


def test_no_map_where_it_would_be_larger(tmp_path: Path) -> None:
    """With heads wider than the hidden state, or one KV head that keeps all rotations, ``q_proj`` has both parts."""
    assert not has_query_map(head_dim=80, hidden=64, rope=40, nope=80, normed=False)
    assert not has_query_map(head_dim=80, hidden=64, rope=80, nope=80, normed=True)
    assert not has_query_map(head_dim=64, hidden=2048, rope=64, nope=0, normed=False)
    assert has_query_map(head_dim=128, hidden=4096, rope=1024, nope=0, normed=False)
    source = RandomModel(kv_heads=1).save(tmp_path / "source")
    out = convert(source, tmp_path / "mla", "--method", "exact")
    assert ATTENTION + ROTARY_MAP not in load_file(out / "model.safetensors")
    assert load(out).config.rotary_query_map is False
    with open_source(str(source)) as opened:
        planned = planned_tensors(opened, [CacheBudget(16, 16)] * 2, 0, None)
    assert not any(name.endswith(ROTARY_MAP) for name in planned)


def test_refit_and_healing_train_the_map(tmp_path: Path) -> None:
    """A refit changes queries and map, and so does healing. Low-rank healing trains the map as it is."""
    source = RandomModel(heads=6, kv_heads=3, hidden=96).save(tmp_path / "source")
    out = convert(source, tmp_path / "mla", *SIZES, *FEW[:4], "--refit-steps", 2)
    few = ("--text", CALIBRATION, "--tokens", 4096, "--length", 64, "--batch-size", 8, "--steps", 16)
    healed = heal(out, tmp_path / "healed", *few, "--learning-rate", 3e-3)
    tensors = [load_file(folder / "model.safetensors") for folder in (source, out, healed)]
    for layer in range(2):
        query, rotary = (f"model.layers.{layer}.self_attn.{name}" for name in ("q_proj.weight", ROTARY_MAP))
        assert not torch.equal(tensors[0][query], tensors[1][query])
        for name in (query, rotary):
            assert not torch.equal(tensors[1][name], tensors[2][name])
            assert tensors[1][name].shape == tensors[2][name].shape
    assert logits(healed).isfinite().all()
    pytest.importorskip("peft")
    model = load(healed)
    make_trainable(model, "lora", lora_rank=2, seed=0)
    assert model.model.layers[0].self_attn.q_rope_map.weight.requires_grad
    trained = dict(trained_tensors(model))
    torch.testing.assert_close(trained[ATTENTION + ROTARY_MAP], tensors[2][ATTENTION + ROTARY_MAP])
    assert f"{ATTENTION}q_proj.weight" in trained
