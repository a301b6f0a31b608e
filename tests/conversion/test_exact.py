"""A converted model from which nothing was truncated computes its source's function."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support.commands import convert
from support.files import CALIBRATION
from support.latent import attend
from support.models import (
    GLM_EXPERTS,
    LLAMA3,
    MIXTRAL_EXPERTS,
    MULTIPLIERS,
    PARTIAL,
    QWEN2_EXPERTS,
    QWEN3_EXPERTS,
    UNPADDED,
    YARN,
    RandomModel,
    load,
)
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRMSNorm
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2RMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

from mla_converters.latent.attention import gqa_attention
from mla_converters.latent.moments import LayerMoments
from mla_converters.methods.transmla.map import transmla_map

VARIANTS = {
    "gqa": RandomModel(),
    "nine-heads": RandomModel(heads=9, kv_heads=3, head_dim=16, hidden=144),
    "mha-head-48": RandomModel(heads=2, kv_heads=2, head_dim=48, hidden=64),
    "mqa-head-80": RandomModel(heads=4, kv_heads=1, head_dim=80, hidden=64, tied=True),
    "biases": RandomModel(bias=True),
    "tied": RandomModel(tied=True),
    "linear": RandomModel(rope={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
    "llama3": RandomModel(rope=LLAMA3),
    "yarn": RandomModel(rope=YARN),
    "mistral": RandomModel("mistral", heads=9, kv_heads=3, hidden=144),
    "mistral-mqa-head-80": RandomModel("mistral", kv_heads=1, head_dim=80, tied=True),
    "qwen2": RandomModel("qwen2"),
    "qwen2-mha-head-48-tied": RandomModel("qwen2", heads=3, kv_heads=3, head_dim=48, hidden=144, tied=True),
    "qwen2-yarn": RandomModel("qwen2", rope=YARN),
    "qwen3": RandomModel("qwen3", head_dim=32),
    "qwen3-nine-heads-bias-tied": RandomModel("qwen3", heads=9, kv_heads=3, head_dim=48, bias=True, tied=True),
    "qwen3-mha-yarn": RandomModel("qwen3", kv_heads=4, rope=YARN),
    "qwen3-mqa-head-80": RandomModel("qwen3", kv_heads=1, head_dim=80),
    "qwen3-moe": RandomModel("qwen3_moe", head_dim=32, layers=3, experts=QWEN3_EXPERTS),
    "qwen3-moe-mqa-head-48": RandomModel("qwen3_moe", kv_heads=1, head_dim=48, tied=True, experts=QWEN3_EXPERTS),
    "mixtral": RandomModel("mixtral", experts=MIXTRAL_EXPERTS),
    "arcee-biases": RandomModel("arcee", heads=9, kv_heads=3, hidden=144, bias=True, experts={"mlp_bias": True}),
    "seed-oss-mqa-head-80": RandomModel("seed_oss", kv_heads=1, head_dim=80, bias=True),
    "qwen2-moe": RandomModel("qwen2_moe", heads=9, kv_heads=3, experts=QWEN2_EXPERTS, layers=3),
    "smollm3-nine-heads": RandomModel("smollm3", heads=9, kv_heads=3, layers=4, tied=True, experts=UNPADDED),
    "smollm3-yarn": RandomModel("smollm3", layers=4, rope=YARN, experts=UNPADDED),
    "glm4-moe-yarn": RandomModel(
        "glm4_moe", head_dim=48, rope=YARN | {"partial_rotary_factor": 0.5}, experts=GLM_EXPERTS
    ),
    "granite-head-48": RandomModel("granite", heads=3, kv_heads=3, head_dim=48, experts=MULTIPLIERS),
    "olmo2": RandomModel("olmo2", heads=9, kv_heads=3, head_dim=48),
    "olmo2-mqa-head-80": RandomModel("olmo2", kv_heads=1, head_dim=80),
    "phi3-nine-heads": RandomModel("phi3", heads=9, kv_heads=3, experts=UNPADDED),
    "phi3-partial": RandomModel("phi3", kv_heads=1, head_dim=80, rope=PARTIAL, experts=UNPADDED),
    "glm4-biases": RandomModel("glm4", heads=9, kv_heads=3, head_dim=48, bias=True, rope=PARTIAL, experts=UNPADDED),
    "glm4-moe-qk-norm": RandomModel("glm4_moe", head_dim=48, layers=3, rope=PARTIAL, experts=GLM_EXPERTS),
    "glm4-moe-bias": RandomModel(
        "glm4_moe", heads=9, kv_heads=3, bias=True, rope=PARTIAL, experts=GLM_EXPERTS | {"use_qk_norm": False}
    ),
    "minimax-m2": RandomModel("minimax_m2", heads=9, kv_heads=3, head_dim=32, rope=PARTIAL, experts=MIXTRAL_EXPERTS),
    "mixtral-nine-heads-80": RandomModel("mixtral", heads=9, kv_heads=3, head_dim=80, experts=MIXTRAL_EXPERTS),
}


NORMS = (Qwen3RMSNorm, Qwen3MoeRMSNorm, Olmo2RMSNorm, Glm4MoeRMSNorm, MiniMaxM2RMSNorm)
NORMALISED = ("qwen3", "olmo2", "glm4-moe-qk", "glm4-moe-yarn", "minimax")


def norm_in_own_dtype(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The norm without transformers' rounding to float32, because that makes sums in another order differ."""
    return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.mark.parametrize("variant", VARIANTS)
def test_exact_equals_source(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits agree to 1e-9 in float64 (1e-4 in float32), also beyond the original context of scaled RoPE."""
    for norm in NORMS:
        monkeypatch.setattr(norm, "forward", norm_in_own_dtype)
    model = VARIANTS[variant]
    if variant.startswith(NORMALISED):
        # The weight of the queries' norm is multiplied into other weights. In float32, these would be off by 4e-8.
        model = replace(model, dtype=torch.float64)
    source = model.save(tmp_path / "source")
    out = convert(source, tmp_path / "mla", "--method", "exact")
    ids = torch.randint(0, 199, (2, 150), generator=torch.Generator().manual_seed(1))
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        # transformers' faster implementations of experts do not support float64.
        models = [load(folder, dtype, experts_implementation="eager") for folder in (source, out)]
        with torch.inference_mode():
            expected, got = (model(ids).logits for model in models)
        error = (got - expected).norm() / expected.norm()
        if "yarn" in variant and dtype == torch.float64:
            tolerance = 1e-6  # transformers rounds cos and sin times the attention factor to float32
        assert error < tolerance, f"{dtype}: relative error {error:.2e}"


def test_maps_are_exact_in_float64() -> None:
    """Without any model, full-rank TransMLA attention equals GQA attention to 1e-9."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 40, 16, dtype=torch.float64, generator=generator) for heads in (6, 3, 3))
    freqs = torch.rand(8, generator=generator)
    moments = LayerMoments(3, 16)
    moments.add(k.transpose(1, 2).flatten(2), v.transpose(1, 2).flatten(2))
    maps = transmla_map(moments, freqs, kv_lora_rank=48, rope_dim=48, freqfold=1)
    expected = gqa_attention(q, k, v, freqs, 0.25)
    torch.testing.assert_close(attend(maps, q, k, v, 0.25), expected, rtol=0, atol=1e-9)


def test_smollm2_exact_logits(smollm2: Path, exact: Path) -> None:
    """The float32 logits of a real model equal the source's, with a relative error below 1e-4."""
    ids = torch.randint(0, 49152, (2, 200), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected, got = (load(folder)(ids).logits for folder in (smollm2, exact))
    assert (got - expected).norm() / expected.norm() < 1e-4


def test_transmla_with_nothing_truncated(tmp_path: Path) -> None:
    """At full rank, RoRoPE (freqfold 1) only rotates the keys, so the function stays the same."""
    source = RandomModel(heads=6, kv_heads=3, hidden=96, bias=True).save(tmp_path / "source")
    out = convert(
        source,
        tmp_path / "mla",
        *("--method", "transmla", "--kv-lora-rank", 48, "--qk-rope-head-dim", 48, "--freqfold", 1),
        *("--calibration", CALIBRATION, "--calibration-tokens", 2048),
    )
    ids = torch.randint(0, 199, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, got = (load(folder)(ids).logits for folder in (source, out))
    assert (got - expected).norm() / expected.norm() < 1e-4


def test_gguf_equals_folder(smollm2_gguf: Path, exact: Path, tmp_path: Path) -> None:
    """A GGUF file converts to the same weights as a folder with the same model."""
    out = convert(smollm2_gguf, tmp_path / "mla", "--method", "exact")
    with safe_open(out / "model.safetensors", "pt") as a, safe_open(exact / "model.safetensors", "pt") as b:
        assert sorted(a.keys()) == sorted(b.keys())
        assert all(torch.equal(a.get_tensor(name), b.get_tensor(name)) for name in a.keys())  # noqa: SIM118
