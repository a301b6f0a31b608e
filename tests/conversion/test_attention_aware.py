"""The attention-aware method: its statistics, its map, its search, and the refit."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.files import CALIBRATION
from support.latent import attend
from support.models import MIXTRAL_EXPERTS, RandomModel, load
from support.older_layout import without_query_map

from mla_converters.checkpoints.source import open_source
from mla_converters.convert import convert
from mla_converters.latent import attention as attention_module
from mla_converters.latent.attention import gqa_attention, rotate
from mla_converters.latent.cache_size import CacheBudget, candidate_budgets
from mla_converters.latent.maps import balanced, mla_weights
from mla_converters.latent.module import LatentAttention
from mla_converters.methods.attention_aware.least_squares import Examples, fit_output
from mla_converters.methods.attention_aware.map import (
    ScoreModel,
    Weighing,
    attention_aware_map,
    choose_rotary,
    phase_map,
    real_map,
    score_model,
)
from mla_converters.methods.attention_aware.refit import Refit, parts_apart, refit_layer, relative_weights
from mla_converters.methods.attention_aware.split import widest_latent
from mla_converters.methods.attention_aware.statistics import AttentionStatistics, attention_statistics
from mla_converters.options import AttentionAwareOptions, ConvertOptions, Ingredient
from mla_converters.reports.conversion import ConversionReport
from mla_converters.streaming.layers import SourceLayer, source_layers

HEADS, KV_HEADS, HEAD_DIM = 6, 3, 16
WIDTH = KV_HEADS * HEAD_DIM


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moments(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random second moments, ``[..., n, n]``."""
    rows = random(*shape, 2 * shape[-1], seed=seed)
    return rows @ rows.mT / rows.shape[-1]


@pytest.fixture
def statistics() -> AttentionStatistics:
    phase = torch.polar(0.9 * torch.rand(HEADS, HEAD_DIM // 2), random(HEADS, HEAD_DIM // 2).float())
    return AttentionStatistics(
        key_value=moments(2 * WIDTH, seed=1),
        query=moments(HEADS, HEAD_DIM, seed=2),
        phase=phase.to(torch.complex128),
        plain_query=moments(HEADS, HEAD_DIM, seed=3),
        output=moments(HEADS, HEAD_DIM, seed=4),
    )


@pytest.fixture
def model(statistics: AttentionStatistics) -> ScoreModel:
    return score_model(statistics, moments(2 * WIDTH, seed=5), moments(2 * WIDTH, seed=6), KV_HEADS)


@pytest.fixture(params=["llama", "qwen3"])
def layer(request: pytest.FixtureRequest, tmp_path: Path) -> SourceLayer:
    """The first layer of a model without QK-norm, and of one with QK-norm."""
    model = RandomModel(request.param, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, hidden=96)
    folder = model.save(tmp_path / "source")
    with open_source(str(folder)) as source:
        return next(source_layers(source, "cpu"))


def test_real_map_multiplies_complex_numbers() -> None:
    matrix = torch.complex(random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1))
    x = torch.complex(random(4, 5), random(4, 5, seed=1))
    expected = torch.einsum("abcd,cd->ab", matrix, x)
    got = real_map(matrix) @ torch.stack((x.real, x.imag), dim=1).flatten()  # ordered by head, half and pair
    torch.testing.assert_close(got, torch.stack((expected.real, expected.imag), dim=1).flatten())


def test_phase_map_turns_the_score() -> None:
    """With phase ``exp(-i f distance)``, a mapped query and an unrotated key score as with RoPE at that distance."""
    freqs, distance = torch.tensor([0.7, 0.2, 0.05], dtype=torch.float64), 3
    q, k = random(6), random(6, seed=1)
    turned = torch.stack((q, k)).repeat_interleave(4, dim=0).view(2, 4, 6)
    expected = rotate(turned[0], freqs)[distance] @ rotate(turned[1], freqs)[0]
    phase = torch.polar(torch.ones(1, 3, dtype=torch.float64), -distance * freqs[None])
    assert (phase_map(phase)[0] @ q) @ k == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize("scaled", [False, True])
def test_nothing_truncated_is_exact(model: ScoreModel, scaled: bool) -> None:
    q, k, v = (random(2, heads, 40, HEAD_DIM, seed=heads) for heads in (HEADS, KV_HEADS, KV_HEADS))
    freqs = torch.rand(HEAD_DIM // 2, generator=torch.Generator().manual_seed(0))
    maps = attention_aware_map(model, freqs, rope_dim=WIDTH, kv_lora_rank=WIDTH, weighing=Weighing())
    if scaled:
        maps = balanced(maps, model.key_value)
        latent = maps.kv_to_latent @ model.key_value @ maps.kv_to_latent.mT
        torch.testing.assert_close(latent.diagonal(), torch.ones(WIDTH, dtype=torch.float64))
    torch.testing.assert_close(attend(maps, q, k, v, 0.25), gqa_attention(q, k, v, freqs, 0.25), rtol=0, atol=1e-9)


def test_algebra_stays_on_its_device(model: ScoreModel) -> None:
    """The meta device stands for any device but the CPU, because tensors of two devices cannot be mixed."""
    elsewhere = ScoreModel(**{name: tensor.to("meta") for name, tensor in vars(model).items()})
    freqs = torch.rand(HEAD_DIM // 2, device="meta")
    maps = balanced(attention_aware_map(elsewhere, freqs, 24, 24, Weighing()), elsewhere.key_value)
    assert {tensor.device.type for tensor in vars(maps).values()} == {"meta"}
    heads = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
    source = {f"{name}_proj.weight": torch.rand(count * HEAD_DIM, 96) for name, count in heads.items()}
    weights = mla_weights(source, maps)
    assert {tensor.device.type for tensor in weights.values()} == {"meta"}


def test_statistics_by_hand(layer: SourceLayer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics of one window in several blocks equal those of loops over pairs of tokens."""
    monkeypatch.setattr("mla_converters.methods.attention_aware.statistics.BLOCK", 3)
    hidden = torch.randn(1, 7, 96, generator=torch.Generator().manual_seed(0))
    got = attention_statistics(layer, hidden)
    with torch.inference_mode():
        x = layer.normed(hidden)
        q, k, v = (part[0].double() for part in (layer.queries(x), *layer.keys_values(x)))
    out = layer.attention_weights["o_proj.weight"].double().view(96, HEADS, HEAD_DIM)
    freqs = layer.freqs.double()
    turned = torch.zeros(HEADS, HEAD_DIM // 2, dtype=torch.complex128)
    energy = torch.zeros(HEADS, HEAD_DIM // 2, dtype=torch.float64)
    query, read = torch.zeros(HEADS, HEAD_DIM, HEAD_DIM, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    for i in range(HEADS):
        keys, values = k[i // 2], v[i // 2]
        scores = rotate(q[i], freqs) @ rotate(keys, freqs).mT * layer.scale
        attention = scores.masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
        for t in range(7):
            for j in range(t + 1):
                moved = out[:, i] @ (values[j] - attention[t] @ values)
                weight = (attention[t, j] * layer.scale * moved.norm()) ** 2
                query[i] += weight * torch.outer(q[i, t], q[i, t]) / 7
                read[j] += attention[t, j] ** 2
                q_energy, k_energy = (x.view(2, -1).square().sum(0) for x in (q[i, t], keys[j]))
                turned[i] += weight * q_energy * k_energy * torch.exp(-1j * freqs * (t - j))
                energy[i] += weight * q_energy * k_energy
    kv = torch.cat([x.transpose(0, 1).flatten(1) for x in (k, v)], dim=-1)
    for measured, expected in (
        (got.phase, turned / energy),
        (got.query, query),
        (got.key_value, kv.mT @ torch.diag(read / read.sum()) @ kv),
    ):
        torch.testing.assert_close(measured, expected, rtol=1e-3, atol=1e-5)


def test_what_costs_most_keeps_rope(statistics: AttentionStatistics) -> None:
    """A component whose lost rotation costs nothing does not keep RoPE, as long as its energy has no weight."""
    phase = statistics.phase.clone()
    phase[:, 2:] /= phase[:, 2:].abs()
    changed = AttentionStatistics(**(vars(statistics) | {"phase": phase}))
    model = score_model(changed, moments(2 * WIDTH, seed=5), moments(2 * WIDTH, seed=6), KV_HEADS)
    assert set(choose_rotary(model, 4 * KV_HEADS, Weighing(energy=0.0)).frequency.tolist()) == {0, 1}
    assert set(choose_rotary(model, 4 * KV_HEADS, Weighing(energy=1e6)).frequency.tolist()) != {0, 1}


def converted(layer: SourceLayer, hidden: torch.Tensor) -> LatentAttention:
    """The layer's attention, converted to half of the cache."""
    found = layer.moments(hidden)
    plain = found.kv
    model = score_model(attention_statistics(layer, hidden), plain, found.covariance, KV_HEADS)
    maps = attention_aware_map(model, layer.freqs, rope_dim=24, kv_lora_rank=24, weighing=Weighing())
    return layer.converted(mla_weights(layer.attention_weights, balanced(maps, plain)))


@pytest.mark.parametrize("block", [2, 128])
def test_attention_at_some_positions(layer: SourceLayer, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mla_converters.latent.attention.BLOCK", block)
    hidden = torch.randn(2, 32, 96, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 7, 30, 31])
    for attention in (layer.attend, converted(layer, hidden)):
        with torch.inference_mode():
            torch.testing.assert_close(attention(hidden, positions), attention(hidden)[:, positions])


def test_scores_are_not_rounded_to_16_bits(layer: SourceLayer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast, plain products compute scores in float32, as torch's kernels do; also with QK-norm."""
    hidden = torch.randn(2, 32, 96, generator=torch.Generator().manual_seed(0))
    attention = converted(layer, hidden)
    with torch.inference_mode():
        expected = attention(hidden)
        computed: list[torch.dtype] = []
        unfused = attention_module._unfused

        def spy(q: torch.Tensor, k: torch.Tensor, *others: object) -> torch.Tensor:
            computed.append((q @ k[:, :1].mT).dtype)
            return unfused(q, k, *others)

        monkeypatch.setattr(attention_module, "_unfused", spy)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = attention(hidden)
    assert computed == [torch.float32]
    assert (got - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("mapped", [True, False], ids=["map", "no-map"])
def test_parts_are_taken_apart_and_put_together_again(layer: SourceLayer, mapped: bool) -> None:
    """Splitting projections and joining them again puts every head's rows and columns back into their places."""
    hidden = torch.randn(2, 32, 96, generator=torch.Generator().manual_seed(0))
    attention = converted(layer, hidden)
    if not mapped:
        attention = layer.converted(without_query_map(attention.weights(), own_queries=True))
    before = attention.weights()
    with torch.no_grad():
        expected = attention(hidden)
        with parts_apart([attention]):
            parts = dict(attention.named_parameters())
            torch.testing.assert_close(attention(hidden), expected)
            if attention.q_rope_map is None:
                rotary = parts["q_proj.parametrizations.weight.original1"]
                assert rotary.shape == (HEADS, attention.rope_dim, 96)
            else:
                assert parts["q_proj.parametrizations.weight.original"].shape == (HEADS, HEAD_DIM, 96)
            parts["kv_b_proj.parametrizations.weight.original1"].zero_()
            assert not attention(hidden).any(), "the second part is that of values"
            assert ("kv_a_proj_with_mqa.parametrizations.weight.original0" in parts) == hasattr(attention, "k_norm")
    after = attention.weights()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in after if not name.startswith("kv_b_proj"))
    keys = [x["kv_b_proj.weight"].unflatten(0, (HEADS, -1))[:, : attention.nope_dim] for x in (before, after)]
    assert keys[0].any() and torch.equal(*keys)


def attended(layer: SourceLayer, windows: int, seed: int) -> Examples:
    """Random inputs of a layer, and the source's residual stream after its attention."""
    hidden = torch.randn(windows, 64, 96, generator=torch.Generator().manual_seed(seed))
    expected = hidden.clone()
    layer.add_attention(expected, layer.attend)
    return Examples(hidden, expected, 1.0)


def test_output_is_fitted_by_least_squares(layer: SourceLayer) -> None:
    """A projection that was halved is repaired. The gradient of the weighted error is opposite to the change, because
    the ridge balances it. No other weight changes."""
    examples = attended(layer, windows=12, seed=0)
    attention, error = converted(layer, examples.hidden), layer.comparison(attended(layer, 4, seed=1).hidden)
    lost = error(attention)
    with torch.no_grad():
        attention.o_proj.weight *= 0.5
    before = {name: tensor.clone() for name, tensor in attention.weights().items()}
    fit_output(attention, layer, [examples], seed=0)
    assert error(attention) < 1.1 * lost, "on other inputs"
    target = examples.expected - examples.hidden
    missing = attention(layer.normed(examples.hidden)) - target
    weights = torch.stack([relative_weights(window) for window in target])
    (missing.square().sum(-1) * weights).sum().backward()
    change = attention.o_proj.weight.detach() - before["o_proj.weight"]
    assert torch.cosine_similarity(attention.o_proj.weight.grad.flatten(), -change.flatten(), dim=0) > 0.99
    after = attention.weights()
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["o_proj.weight"]


def test_output_stays_where_nothing_is_to_be_learned(layer: SourceLayer) -> None:
    """The projection does not change if the targets are noise and there are few tokens."""
    hidden = torch.randn(2, 32, 96, generator=torch.Generator().manual_seed(0))
    attention = converted(layer, hidden)
    before = attention.weights()["o_proj.weight"].clone()
    with torch.no_grad():
        noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
        expected = hidden + attention(layer.normed(hidden)) + noise
    fit_output(attention, layer, [Examples(hidden, expected, 1.0)], seed=0)
    assert torch.equal(attention.weights()["o_proj.weight"], before)


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_refit_lowers_the_error(layer: SourceLayer, scale: float) -> None:
    """It also does if values are much smaller than keys, as with QK-norm."""
    for name, factor in {"v_proj.weight": scale, "k_norm.weight": 1 / scale, "q_norm.weight": scale}.items():
        if name in layer.attention_weights:
            layer.attention_weights[name] *= factor
    hidden = torch.randn(8, 32, 96, generator=torch.Generator().manual_seed(0))
    attention = converted(layer, hidden)
    names = set(attention.weights())
    expected = hidden.clone()
    layer.advance(expected, layer.attend)
    error = layer.comparison(hidden)

    def lost() -> float:
        """Squared error of the layer's output."""
        output = hidden.clone()
        layer.advance(output, attention)
        return (output - expected).square().sum().item()

    before, lost_before = error(attention), lost()
    generator = torch.Generator().manual_seed(0)
    refit_layer(attention, layer, hidden, expected, before, Refit(steps=60), generator, through_mlp=True)
    assert lost() < 0.4 * lost_before
    assert error(attention) < before, "of the attention alone"
    assert set(attention.weights()) == names


def test_refit_steps_are_as_large_as_the_error(layer: SourceLayer) -> None:
    """A layer without error does not change. With a quarter of the squared error, the first step is half as large."""
    hidden = torch.randn(8, 32, 96, generator=torch.Generator().manual_seed(0))
    moved = {}
    for error in (0.0, 0.09, 0.36, 1.0, 9.0):
        attention = converted(layer, hidden)
        before = attention.weights()["o_proj.weight"].clone()
        generator = torch.Generator().manual_seed(0)
        refit_layer(attention, layer, hidden, 2 * hidden, error, Refit(steps=1), generator, through_mlp=True)
        moved[error] = (attention.weights()["o_proj.weight"] - before).abs().max().item()
    assert moved[0.0] == 0 < moved[0.09]
    assert moved[0.36] == pytest.approx(2 * moved[0.09], rel=0.01)
    assert moved[9.0] == moved[1.0] > moved[0.36], "no step is larger than that of a layer that lost all"


@pytest.mark.parametrize("experts", [{}, MIXTRAL_EXPERTS], ids=["dense", "mixture"])
def test_refit_of_what_comes_out_of_the_attention(experts: dict[str, int], tmp_path: Path) -> None:
    """A refit to the stream after the attention never reads the experts."""
    model = RandomModel("mixtral" if experts else "llama", HEADS, KV_HEADS, HEAD_DIM, hidden=96, experts=experts)
    hidden = torch.randn(8, 32, 96, generator=torch.Generator().manual_seed(0))
    with open_source(str(model.save(tmp_path / "source"))) as source:
        layer = next(source_layers(source, "cpu"))
        attention, error = converted(layer, hidden), layer.comparison(hidden)
    before, expected = error(attention), hidden.clone()  # the source is closed, so experts can no longer be read
    layer.add_attention(expected, layer.attend)
    generator = torch.Generator().manual_seed(0)
    refit_layer(attention, layer, hidden, expected, before, Refit(steps=60), generator, through_mlp=False)
    assert error(attention) < 0.7 * before


def test_mixtures_are_refitted_without_their_mlp(tmp_path: Path) -> None:
    source = RandomModel("mixtral", HEADS, KV_HEADS, head_dim=32, hidden=96, experts=MIXTRAL_EXPERTS)
    folder, files = source.save(tmp_path / "source"), []
    for without in (frozenset(), frozenset({Ingredient.MLP})):
        out = tmp_path / f"without {len(without)}"
        options = asked(512, refit_steps=3, without=without)
        convert(str(folder), out, options, quiet=True)
        files.append(weights(out))
    assert files[0] == files[1]


def test_refit_of_a_single_window(tmp_path: Path) -> None:
    """The refit uses the last window of text too, so one window is enough."""
    source = RandomModel(heads=HEADS, kv_heads=KV_HEADS, head_dim=32, hidden=96).save(tmp_path / "source")
    for steps in (0, 3):
        options = asked(512, refit_steps=steps)
        convert(str(source), tmp_path / f"{steps}", options, quiet=True)
    closed_form, refitted = (load_file(tmp_path / f"{steps}" / "model.safetensors") for steps in (0, 3))
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    assert not torch.equal(closed_form[name], refitted[name])


def test_too_few_tokens_for_least_squares(tmp_path: Path) -> None:
    """The fit needs 8 tokens for each of the 192 numbers that the heads read; 512 of the tokens are random. With fewer,
    the report has a warning, unless there is nothing to fit."""
    source = RandomModel(heads=HEADS, kv_heads=KV_HEADS, head_dim=32, hidden=96).save(tmp_path / "source")

    def report(name: str, tokens: int, cache_ratio: float = 0.5, **method: Any) -> ConversionReport:
        options = asked(tokens, **{"refit_steps": 0} | method).model_copy(update={"cache_ratio": cache_ratio})
        return convert(str(source), tmp_path / name, options, quiet=True)

    few = report("few", 512)
    assert "--calibration-tokens 2048 " in few.warnings[0]
    assert json.loads((tmp_path / "few" / "conversion_report.json").read_text())["warnings"] == few.warnings
    report("few, map alone", 512, without=frozenset({Ingredient.LEAST_SQUARES}))
    assert weights(tmp_path / "few") == weights(tmp_path / "few, map alone")
    assert not about_tokens(report("enough", 1024))
    report("enough, map alone", 1024, without=frozenset({Ingredient.LEAST_SQUARES}))
    assert weights(tmp_path / "enough") != weights(tmp_path / "enough, map alone")
    assert not about_tokens(report("refit", 512, refit_steps=1))
    assert not about_tokens(report("whole", 512, cache_ratio=1.0))


def about_tokens(report: ConversionReport) -> list[str]:
    """Warnings about too few tokens."""
    return [warning for warning in report.warnings if "--calibration-tokens" in warning]


def asked(tokens: int, **method: Any) -> ConvertOptions:
    """Options of a conversion to half of the source's numbers, with ``tokens`` of calibration text."""
    return ConvertOptions(
        method=AttentionAwareOptions(**method),
        calibration=(str(CALIBRATION),),
        calibration_tokens=tokens,
        cache_ratio=0.5,
        latent_bits=16,
    )


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_every_ingredient_does_something(tmp_path: Path) -> None:
    source = RandomModel(heads=HEADS, kv_heads=KV_HEADS, head_dim=32, hidden=96).save(tmp_path / "source")
    ids = torch.randint(0, 128, (1, 64), generator=torch.Generator().manual_seed(1))

    @functools.cache
    def logits(steps: int, without: frozenset[Ingredient]) -> torch.Tensor:
        out = tmp_path / "-".join([str(steps), *sorted(without)])
        report = convert(str(source), out, asked(2048, refit_steps=steps, without=without), quiet=True)
        assert report.settings["without"] == sorted(without)
        with torch.inference_mode():
            return load(out)(ids).logits

    # Without the search, because it may find the map that --without joint-choice gives.
    base = {Ingredient.JOINT_CHOICE: frozenset({Ingredient.SEARCH})}
    for steps, only in {0: Ingredient.MLP, 3: Ingredient.LEAST_SQUARES}.items():  # only the other fit has it
        for name in set(Ingredient) - {only}:
            others = base.get(name, frozenset())
            assert not torch.equal(logits(steps, others | {name}), logits(steps, others)), name


def test_random_tokens_help_where_the_text_says_nothing(tmp_path: Path) -> None:
    """With a calibration text of few words, random tokens lower the error of the converted model."""
    source = RandomModel(heads=HEADS, kv_heads=KV_HEADS, head_dim=32, hidden=96).save(tmp_path / "source")
    (tmp_path / "text.txt").write_text("all the notices and all the terms " * 200)
    ids = torch.randint(0, 128, (4, 64), generator=torch.Generator().manual_seed(1))

    def error(name: str, without: frozenset[Ingredient]) -> float:
        options = asked(512, refit_steps=0, without=without)
        options = options.model_copy(update={"calibration": (str(tmp_path / "text.txt"),)})
        convert(str(source), tmp_path / name, options, quiet=True)
        with torch.inference_mode():
            difference = load(tmp_path / name)(ids).logits - load(source)(ids).logits
        return difference.square().mean().item()

    assert error("with", frozenset()) < 0.7 * error("without", frozenset({Ingredient.RANDOM_TOKENS}))


ERRORS = {  # for each cache size: SmolLM2's errors on WikiText-2 by rotary size, and the best rotary size once healed
    192: ({40: 0.0757, 48: 0.0573, 64: 0.0460, 80: 0.0495}, 48),
    128: ({32: 0.1611, 40: 0.1234, 48: 0.1147, 56: 0.1145, 64: 0.1215}, 40),
    96: ({24: 0.2629, 32: 0.2028, 40: 0.1778, 48: 0.1803}, 32),
    48: ({12: 0.4970, 16: 0.4526, 20: 0.4090, 24: 0.3732, 28: 0.3683, 32: 0.3806}, 20),
}


@pytest.mark.parametrize("width", ERRORS)
def test_widest_latent_that_loses_little_more(width: int) -> None:
    errors, best = ERRORS[width]
    found = widest_latent({CacheBudget(width - rope, rope): error for rope, error in errors.items()})
    assert found == CacheBudget(width - best, best)


def test_splits_that_are_searched() -> None:
    """Candidates give 1/4 to 7/12 of the cache to RoPE. A size with fast GPU kernels has no other candidate."""
    splits = candidate_budgets(kv_heads=3, head_dim=64, budget=CacheBudget(32, 16))
    assert splits == [CacheBudget(48 - rope, rope) for rope in (12, 16, 20, 24, 28)]
    wider = candidate_budgets(kv_heads=3, head_dim=64, budget=CacheBudget(64, 32))
    assert wider == [CacheBudget(96 - rope, rope) for rope in (24, 32, 40, 48, 56)]
    assert candidate_budgets(kv_heads=8, head_dim=128, budget=CacheBudget(512, 64)) == [CacheBudget(512, 64)]
