"""Method ``mha2mla``: the pairs that keep RoPE, the SVD of the weights, and whole models."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.commands import Refused
from support.files import CALIBRATION
from support.models import RandomModel, converted_layers
from transformers import AutoTokenizer

from mla_converters.checkpoints.source import open_source
from mla_converters.errors import ConversionError
from mla_converters.latent.attention import gqa_attention
from mla_converters.latent.cache_size import CacheBudget
from mla_converters.latent.module import LatentAttention
from mla_converters.methods.mha2mla.map import PairNorms, check_sizes, kept_pairs, mha2mla_map
from mla_converters.methods.mha2mla.method import Mha2mla
from mla_converters.methods.mha2mla.run import layer_weights, mha2mla
from mla_converters.options import Keep, Mha2mlaOptions, Svd
from mla_converters.streaming.layers import embed, source_layers

HEADS, KV_HEADS, HEAD_DIM, WIDTH, SCALE = 6, 3, 8, 40, 0.3
FREQS = torch.tensor([1.0, 0.3, 0.1, 0.03])

Weights = dict[str, torch.Tensor]


@pytest.fixture
def weights() -> Weights:
    """One attention layer with large biases of the keys, as in Qwen2."""
    generator = torch.Generator().manual_seed(0)
    rows = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
    layer = {}
    for name, heads in rows.items():
        layer[f"{name}_proj.weight"] = torch.randn(heads * HEAD_DIM, WIDTH, generator=generator).double() / WIDTH**0.5
        layer[f"{name}_proj.bias"] = torch.randn(heads * HEAD_DIM, generator=generator).double()
    layer["k_proj.bias"] *= 20
    layer["o_proj.weight"] = torch.eye(HEADS * HEAD_DIM, dtype=torch.float64)
    return layer


def project(weights: Weights, x: torch.Tensor) -> list[torch.Tensor]:
    """Queries, keys and values ``[windows, heads, tokens, d]``."""
    projected = (x @ weights[f"{name}_proj.weight"].mT + weights[f"{name}_proj.bias"] for name in "qkv")
    return [y.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for y in projected]


def source_attention(weights: Weights, x: torch.Tensor, freqs: torch.Tensor = FREQS) -> torch.Tensor:
    return gqa_attention(*project(weights, x), freqs, SCALE).transpose(1, 2).flatten(2)


def converted_attention(weights: Weights, x: torch.Tensor, kept: torch.Tensor, rank: int, svd: Svd) -> torch.Tensor:
    maps = mha2mla_map(weights["k_proj.weight"], weights["v_proj.weight"], FREQS, kept, rank, svd)
    return LatentAttention(layer_weights(weights, maps), HEADS, SCALE, dtype=torch.float64)(x)


def inputs() -> torch.Tensor:
    return torch.randn(2, 30, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def pairs_of(keep: Keep, pairs: int, contributions: list[list[float]] | None = None) -> list[list[int]]:
    """The pairs that each KV head keeps."""
    measured = None if contributions is None else torch.tensor(contributions, dtype=torch.float64)
    kv_heads, half = (2, 8) if measured is None else measured.shape
    return [head.nonzero().flatten().tolist() for head in kept_pairs(keep, pairs, kv_heads, 2 * half, measured)]


@pytest.mark.parametrize("svd", Svd)
def test_nothing_truncated(svd: Svd, weights: Weights) -> None:
    """With all pairs kept and room for all values in the latent, a layer gives its source's output."""
    full = torch.ones(KV_HEADS, HEAD_DIM // 2, dtype=torch.bool)
    x = inputs()
    got = converted_attention(weights, x, full, KV_HEADS * HEAD_DIM, svd)
    torch.testing.assert_close(got, source_attention(weights, x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("svd", Svd)
def test_partial_rope_alone(svd: Svd, weights: Weights) -> None:
    """At full rank only RoPE is lost, so the source with lost frequencies set to zero gives the same attention."""
    kept = kept_pairs(Keep.HIGH, 2 * KV_HEADS, KV_HEADS, HEAD_DIM)
    x = inputs()
    got = converted_attention(weights, x, kept, 2 * KV_HEADS * HEAD_DIM - 4 * KV_HEADS, svd)
    expected = source_attention(weights, x, torch.where(kept[0], FREQS, 0.0))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


def test_every_head_keeps_its_own(weights: Weights) -> None:
    """KV heads may keep different pairs, and different numbers of pairs, as if each had its own RoPE."""
    kept = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]], dtype=torch.bool)
    x = inputs()
    q, k, v = project(weights, x)
    groups = HEADS // KV_HEADS
    parts = [
        gqa_attention(q[:, groups * h : groups * (h + 1)], k[:, [h]], v[:, [h]], torch.where(pairs, FREQS, 0.0), SCALE)
        for h, pairs in enumerate(kept)
    ]
    expected = torch.cat(parts, dim=1).transpose(1, 2).flatten(2)
    got = converted_attention(weights, x, kept, 2 * KV_HEADS * HEAD_DIM - 10, Svd.JOINT)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


def test_fixed_choices() -> None:
    """Choices made by hand for 2 KV heads of 8 pairs, divided evenly or with one more pair for the first head."""
    assert pairs_of(Keep.HIGH, 6) == [[0, 1, 2]] * 2
    assert pairs_of(Keep.LOW, 6) == [[5, 6, 7]] * 2
    assert pairs_of(Keep.UNIFORM, 8) == [[0, 2, 4, 6]] * 2
    assert pairs_of(Keep.UNIFORM, 6) == [[0, 2, 5]] * 2
    assert pairs_of(Keep.HIGH, 5) == [[0, 1, 2], [0, 1]]
    assert pairs_of(Keep.LOW, 5) == [[5, 6, 7], [6, 7]]
    assert pairs_of(Keep.UNIFORM, 5) == [[0, 2, 5], [0, 4]]
    assert pairs_of(Keep.HIGH, 1) == [[0], []]


def test_two_norm_choice() -> None:
    """Each head keeps its largest pairs. A remainder goes to the largest of all, even twice to one head."""
    contributions = [[9.0, 1.0, 8.0, 7.0], [0.1, 0.4, 0.3, 0.2], [2.0, 6.0, 3.0, 4.0]]
    assert pairs_of(Keep.TWO_NORM, 6, contributions) == [[0, 2], [1, 2], [1, 3]]
    assert pairs_of(Keep.TWO_NORM, 7, contributions) == [[0, 2, 3], [1, 2], [1, 3]]
    assert pairs_of(Keep.TWO_NORM, 5, contributions) == [[0, 2, 3], [1], [1]]
    assert pairs_of(Keep.TWO_NORM, 2, contributions) == [[0, 2], [], []]


@settings(deadline=None)
@given(st.data())
def test_pairs_are_spread(data: st.DataObject) -> None:
    """Every rule keeps exactly the given number of pairs, and every head keeps its share."""
    kv_heads, half = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 16))
    pairs = data.draw(st.integers(1, kv_heads * half))
    contributions = torch.rand(kv_heads, half, generator=torch.Generator().manual_seed(pairs))
    for keep in Keep:
        each = kept_pairs(keep, pairs, kv_heads, 2 * half, contributions).sum(1)
        assert each.sum() == pairs
        assert each.min() >= pairs // kv_heads
        assert keep == Keep.TWO_NORM or each.max() <= -(-pairs // kv_heads)


def test_contributions() -> None:
    """A contribution is the mean norm of a pair's keys, times that of its group's queries, for any batches."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(4, heads, 10, HEAD_DIM, generator=generator) for heads in (HEADS, KV_HEADS))
    norms = PairNorms(HEADS, KV_HEADS, HEAD_DIM)
    for start in (0, 2):
        norms.add(q[start : start + 2], k[start : start + 2])
    half = HEAD_DIM // 2
    queries, keys = (torch.complex(x[..., :half], x[..., half:]).abs().mean((0, 2)) for x in (q, k))
    expected = torch.stack([(queries[2 * h] + queries[2 * h + 1]) / 2 * keys[h] for h in range(KV_HEADS)])
    torch.testing.assert_close(norms.contributions().float(), expected)


def approximation(k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor, rank: int, svd: Svd) -> torch.Tensor:
    """The map's approximation of the weights of values, and of keys without RoPE (zero if a pair keeps RoPE)."""
    maps = mha2mla_map(k, v, FREQS, kept, rank, svd)
    up = torch.cat((maps.latent_to_key.flatten(0, 1), maps.latent_to_value.flatten(0, 1)))
    assert up.shape[1] == rank
    return up @ maps.kv_to_latent @ torch.cat((k, v))


def truncated(weight: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


@pytest.mark.parametrize("rank", [1, 7, 16, 40, 42])
def test_joint_svd(rank: int, weights: Weights) -> None:
    """Rank R gives the truncated SVD of both weights together, even if R is more than the hidden size."""
    k, v = weights["k_proj.weight"], weights["v_proj.weight"]
    kept = kept_pairs(Keep.HIGH, KV_HEADS, KV_HEADS, HEAD_DIM)
    keys = k.view(KV_HEADS, 2, HEAD_DIM // 2, -1).masked_fill(kept[:, None, :, None], 0).flatten(0, 2)
    expected = truncated(torch.cat((keys, v)), rank)
    torch.testing.assert_close(approximation(k, v, kept, rank, Svd.JOINT), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("rank", "of_keys"), [(2, 1), (9, 4), (16, 8), (36, 18), (40, 18), (42, 18), (24, 0)])
def test_split_svd(rank: int, of_keys: int, weights: Weights) -> None:
    """Keys and values get half of the rank each. The values also get the rank that the keys cannot fill."""
    k, v = weights["k_proj.weight"], weights["v_proj.weight"]
    pairs = KV_HEADS * HEAD_DIM // 2 if of_keys == 0 else KV_HEADS
    kept = kept_pairs(Keep.HIGH, pairs, KV_HEADS, HEAD_DIM)
    keys = k.view(KV_HEADS, 2, HEAD_DIM // 2, -1).masked_fill(kept[:, None, :, None], 0).flatten(0, 2)
    expected = torch.cat((truncated(keys, of_keys), truncated(v, rank - of_keys)))
    torch.testing.assert_close(approximation(k, v, kept, rank, Svd.SPLIT), expected, rtol=0, atol=1e-9)


def test_key_bias_without_rope_is_free(weights: Weights) -> None:
    """Even with a narrow latent, a bias of keys without RoPE changes neither the attention nor the values."""
    kept = kept_pairs(Keep.HIGH, KV_HEADS, KV_HEADS, HEAD_DIM)
    x = inputs()
    lost = ~kept[:, None].expand(-1, 2, -1).flatten()
    without = weights | {"k_proj.bias": weights["k_proj.bias"].masked_fill(lost, 0)}
    got, expected = (converted_attention(w, x, kept, 10, Svd.JOINT) for w in (weights, without))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("rope", "rank", "svd", "message"),
    [
        (7, 10, Svd.JOINT, "even"),
        (0, 10, Svd.JOINT, "at least 2"),
        (26, 10, Svd.JOINT, "at most 24"),
        (8, 0, Svd.JOINT, "1 to 40"),
        (8, 41, Svd.SPLIT, "1 to 40"),
        (8, 1, Svd.SPLIT, "--svd joint"),
    ],
)
def test_impossible_sizes(rope: int, rank: int, svd: Svd, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        check_sizes(KV_HEADS, HEAD_DIM, rope, rank, svd)


def test_smallest_sizes() -> None:
    check_sizes(KV_HEADS, HEAD_DIM, 2, 1, Svd.JOINT)
    check_sizes(KV_HEADS, HEAD_DIM, 24, 1, Svd.SPLIT)


def test_two_norm_needs_calibration(tmp_path: Path) -> None:
    source = RandomModel().save(tmp_path / "source")
    with open_source(str(source)) as opened, pytest.raises(ValueError, match="contributions"):
        next(converted_layers(opened, mha2mla(opened, None, CacheBudget(16, 16), Mha2mlaOptions())))


@pytest.mark.parametrize("model", [RandomModel(bias=True), RandomModel("qwen2", heads=6, kv_heads=3, hidden=96)])
def test_layers_of_a_model(model: RandomModel, tmp_path: Path) -> None:
    """If nothing is truncated, every rule gives every layer its source's attention, including biases."""
    source = model.save(tmp_path / "source")
    width = model.kv_heads * model.head_dim
    ids = torch.randint(0, 128, (2, 50), generator=torch.Generator().manual_seed(0))
    with open_source(str(source)) as opened, torch.inference_mode():
        hidden = embed(opened, ids)
        for keep in Keep:
            windows = ids if Mha2mla(Mha2mlaOptions(rope_keep=keep)).window else None
            conversion = mha2mla(opened, windows, CacheBudget(width, width), Mha2mlaOptions(rope_keep=keep))
            layers = source_layers(opened, "cpu")
            for layer, weights in zip(layers, converted_layers(opened, conversion), strict=True):
                x = layer.normed(hidden)
                expected = layer.attend(x)
                error = (layer.converted(weights)(x) - expected).norm() / expected.norm()
                assert error < 1e-5, f"{keep}, layer {layer.index}: {error:.1e}"


def test_two_norm_beats_low_on_a_real_model(smollm2: Path) -> None:
    """With RoPE on a third of SmolLM2's pairs and no low rank, the paper's choice beats the slowest pairs."""
    ids = AutoTokenizer.from_pretrained(smollm2)(CALIBRATION.read_text(), return_tensors="pt").input_ids
    windows = ids[:, :512].view(2, 256)
    with open_source(str(smollm2)) as source:
        budget = CacheBudget(kv_lora_rank=320, qk_rope_head_dim=64)
        runs = {
            keep: converted_layers(source, mha2mla(source, windows, budget, Mha2mlaOptions(rope_keep=keep)))
            for keep in (Keep.TWO_NORM, Keep.LOW)
        }
        errors = dict.fromkeys(runs, 0.0)
        hidden = embed(source, windows)
        for layer in islice(source_layers(source, "cpu"), 4):
            for keep, layers in runs.items():
                errors[keep] += layer.comparison(hidden)(layer.converted(next(layers)))
            layer.advance(hidden, layer.attend)
    assert errors[Keep.TWO_NORM] < 0.6 * errors[Keep.LOW], errors


def test_qk_norm_is_refused(refusal: Refused, tmp_path: Path) -> None:
    """Keys that are normalised after their projection cannot be split by factoring the projection."""
    source = RandomModel("qwen3").save(tmp_path / "source")
    assert "QK-norm" in refusal("convert", source, tmp_path / "out", "--method", "mha2mla")
