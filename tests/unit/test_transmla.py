"""Method ``transmla``: its two streams of hidden states."""

from pathlib import Path

import pytest
import torch
from support.models import RandomModel

from mla_converters.checkpoints.source import open_source
from mla_converters.latent.maps import mla_weights
from mla_converters.latent.moments import LayerMoments
from mla_converters.methods.transmla.map import joint_map, rotate_keys
from mla_converters.methods.transmla.partial_rope import PartialRope
from mla_converters.streaming.layers import SourceLayer, source_layers

KV_HEADS, HEAD_DIM, ROPE_DIM = 3, 16, 24


@pytest.fixture(params=["llama", "qwen3"])
def layer(request: pytest.FixtureRequest, tmp_path: Path) -> SourceLayer:
    """The first layer of a model with biases, without QK-norm and with it."""
    model = RandomModel(request.param, heads=6, kv_heads=KV_HEADS, head_dim=HEAD_DIM, hidden=96, bias=True)
    with open_source(str(model.save(tmp_path / "source"))) as source:
        return next(source_layers(source, "cpu"))


def test_partial_rope_is_the_map_of_full_rank(layer: SourceLayer) -> None:
    """As in TransMLA's own code, the latent holds every component that loses RoPE."""
    x = torch.randn(2, 70, 96, generator=torch.Generator().manual_seed(0))
    moments = layer.moments(x)
    rotation = rotate_keys(moments, ROPE_DIM, freqfold=2)
    full = joint_map(moments, layer.freqs, rotation, kv_lora_rank=2 * KV_HEADS * HEAD_DIM - ROPE_DIM)
    expected = layer.converted(mla_weights(layer.attention_weights, full))
    positions = torch.tensor([0, 7, 64, 69])
    with torch.inference_mode():
        got = PartialRope(layer, rotation)
        torch.testing.assert_close(got(x), expected(x), rtol=0, atol=1e-4)
        torch.testing.assert_close(got(x, positions), got(x)[:, positions])
        assert (got(x) - layer.attend(x)).norm() > 0.01 * got(x).norm(), "nothing lost RoPE"


def test_moments_corrected_on_a_part() -> None:
    """If keys are off by a fixed factor, a tenth of the tokens is enough to correct most of the error."""
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 5000, KV_HEADS * HEAD_DIM, generator=generator)
    k = k @ torch.randn(k.shape[1], k.shape[1], generator=generator)

    def moments(factor: float, tokens: int) -> LayerMoments:
        result = LayerMoments(KV_HEADS, HEAD_DIM)
        result.add(factor * k[:tokens], v[:tokens])
        return result

    true, biased = moments(1.0, 5000), moments(1.1, 5000)
    corrected = biased.corrected(moments(1.1, 500), moments(1.0, 500))
    assert corrected.tokens == 5000

    def error(of: LayerMoments) -> float:
        return ((of.kv - true.kv).norm() / true.kv.norm()).item()

    assert error(corrected) < 0.3 * error(biased)
    assert error(corrected) < 0.3 * error(moments(1.0, 500)), "the part alone says less"
    everywhere = biased.corrected(biased, true)
    torch.testing.assert_close(everywhere.kv, true.kv)
