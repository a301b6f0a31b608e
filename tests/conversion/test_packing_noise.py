"""What rounding costs each cached number, and the scaling of the cache that suits it."""

from dataclasses import replace

import pytest
import torch
from support.latent import attend
from support.models import RandomModel

from mla_converters.checkpoints.source import open_source
from mla_converters.latent.cache_size import CacheBudget
from mla_converters.latent.maps import LatentMap, mla_weights
from mla_converters.methods.attention_aware.layer import first_weighing, layer_map, layer_model
from mla_converters.methods.attention_aware.map import ScoreModel
from mla_converters.methods.attention_aware.noise import costs, spreads, suited_to_packing
from mla_converters.streaming.layers import SourceLayer, source_layers
from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat, Segment
from vllm_mla_plugin.latent_packing import round_trip

HEADS, KV_HEADS, HEAD_DIM = 6, 3, 16
BUDGETS = {"all": CacheBudget(48, 48), "half-of-rope": CacheBudget(72, 24), "half": CacheBudget(32, 16)}


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def layer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SourceLayer:
    """The first layer of a model without QK-norm, and of one with QK-norm."""
    model = RandomModel(request.param, HEADS, KV_HEADS, HEAD_DIM, hidden=96)
    with open_source(str(model.save(tmp_path_factory.mktemp("noise") / "source"))) as source:
        return next(source_layers(source, "cpu"))


@pytest.fixture(scope="module")
def hidden() -> torch.Tensor:
    """Inputs of the layer: tokens whose components differ in size, around a mean that is not zero."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-1, 0.5, 96)
    return sizes * (torch.randn(6, 48, 96, generator=generator) + torch.randn(96, generator=generator))


@pytest.fixture(scope="module")
def model(layer: SourceLayer, hidden: torch.Tensor) -> ScoreModel:
    return layer_model(layer, hidden[:-1], hidden[-1:], frozenset())


@pytest.fixture(params=BUDGETS)
def maps(request: pytest.FixtureRequest, layer: SourceLayer, model: ScoreModel) -> LatentMap:
    """The layer's map, as it is for a cache that rounds nothing."""
    return layer_map(layer, model, BUDGETS[request.param], first_weighing(frozenset()))


def test_same_function(maps: LatentMap, model: ScoreModel) -> None:
    """In float64, attention under the scaled and sorted map is what it was."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(2, heads, 40, HEAD_DIM, dtype=torch.float64, generator=generator)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    suited = suited_to_packing(maps, model)
    assert sorted(suited.rope_freqs.tolist()) == sorted(maps.rope_freqs.tolist())
    expected, got = (attend(each, q, k, v, 0.25) for each in (maps, suited))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_sorted_and_scaled_by_cost(maps: LatentMap, model: ScoreModel) -> None:
    """Scaling changes no component's cost, the dearest come first, and spreads are as the fourth root of costs."""
    suited = suited_to_packing(maps, model)
    before, after = costs(maps, model), costs(suited, model)
    for found, old, spread in (
        (after.latent, before.latent, spreads(suited, model.covariance)[0]),
        (after.rope, before.rope, spreads(suited, model.covariance)[1]),
    ):
        torch.testing.assert_close(found, old.sort(descending=True).values, rtol=1e-6, atol=0)
        torch.testing.assert_close(spread, (found / found.mean()) ** 0.25, rtol=1e-6, atol=0)


def test_twice_is_once(maps: LatentMap, model: ScoreModel) -> None:
    once = suited_to_packing(maps, model)
    twice = suited_to_packing(once, model)
    for name, tensor in vars(once).items():
        torch.testing.assert_close(getattr(twice, name), tensor, rtol=1e-6, atol=1e-9)


def test_spreads_are_standard_deviations(maps: LatentMap) -> None:
    """Of the cached numbers; a rotary pair has one, the root mean square of both halves'."""
    kv = torch.randn(500, 2 * KV_HEADS * HEAD_DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kv = kv @ torch.randn(kv.shape[1], kv.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 3
    latent, rope = spreads(maps, kv.mT.cov(correction=0))
    torch.testing.assert_close(latent, (kv @ maps.kv_to_latent.mT).std(0, correction=0))
    pairs = (kv[:, : KV_HEADS * HEAD_DIM] @ maps.key_to_rope.mT).var(0, correction=0).view(2, -1)
    torch.testing.assert_close(rope, pairs.mean(0).sqrt())


def test_dead_components_do_not_blow_up(maps: LatentMap, model: ScoreModel) -> None:
    """A component without spread, one that nothing reads, and a layer that does nothing at all."""
    kv_to_latent, latent_to_key, latent_to_value = (
        x.clone() for x in (maps.kv_to_latent, maps.latent_to_key, maps.latent_to_value)
    )
    kv_to_latent[0] = 0
    latent_to_key[..., 1], latent_to_value[..., 1] = 0, 0
    dead = replace(maps, kv_to_latent=kv_to_latent, latent_to_key=latent_to_key, latent_to_value=latent_to_value)
    nothing = ScoreModel(**{name: torch.zeros_like(tensor) for name, tensor in vars(model).items() if name != "roots"})
    for changed, statistics in ((dead, model), (maps, nothing)):
        for tensor in vars(suited_to_packing(changed, statistics)).values():
            assert tensor.isfinite().all()


@pytest.mark.parametrize("spread", [0.5, 2.0, 6.0], ids="{:g} powers of ten".format)
def test_scaling_between_none_and_all_is_best(spread: float) -> None:
    """For any group: of ``s² = 1``, ``sqrt(c)`` and ``c``, the middle costs least, by the formula and when rounded."""
    generator = torch.Generator().manual_seed(0)
    for bits in (2, 4):
        cost = 10 ** (spread * torch.rand(32, generator=generator, dtype=torch.float64))
        format = CacheFormat((Segment(32, bits, 32),), (Segment(2, 16),), mean=False)
        numbers = torch.randn(2000, 32, generator=generator)
        predicted, measured = [], []
        for power in (0.25, 0.0, 0.5):
            scale = (cost / cost.mean()) ** power
            predicted.append((scale.square().sum() * (cost / scale.square()).sum()).item())
            scaled = torch.cat((numbers * scale, torch.zeros(2000, 2)), dim=1).float()
            error = (round_trip(scaled, format) - scaled)[:, :32] / scale
            measured.append((error.double().square().mean(0) * cost).sum().item())
        assert predicted[0] == pytest.approx(cost.sqrt().sum().item() ** 2)
        assert predicted[0] <= min(predicted) and measured[0] <= min(measured), (predicted, measured)


@torch.inference_mode()
def test_costs_are_those_of_noise(maps: LatentMap, layer: SourceLayer, hidden: torch.Tensor, model: ScoreModel) -> None:
    """Small noise in the cached numbers moves the layer's output by as much as the costs say, to 10%."""
    size, found = 0.03, costs(maps, model)
    latent, pairs = spreads(maps, model.covariance)
    attention = layer.converted(mla_weights(layer.attention_weights, maps))
    x = layer.normed(hidden[:4])
    expected = attention(x)
    both = torch.cat((latent, pairs, pairs)).float()
    of_latent = torch.arange(len(both)) < len(latent)
    generator = torch.Generator().manual_seed(0)
    for noisy, predicted in ((both * of_latent, found.latent.sum()), (both * ~of_latent, 2 * found.rope.sum())):

        def add_noise(_: object, args: object, cached: torch.Tensor, noisy: torch.Tensor = noisy) -> torch.Tensor:
            return cached + size * noisy * torch.randn(cached.shape, generator=generator)

        hook = attention.kv_a_proj_with_mqa.register_forward_hook(add_noise)
        moved = [(attention(x) - expected).square().sum(-1).mean().item() / size**2 for _ in range(8)]
        hook.remove()
        assert sum(moved) / len(moved) == pytest.approx(predicted.item(), rel=0.1)
