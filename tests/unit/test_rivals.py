"""The simulated caches of the benchmark of quality: quantisers, attention and bytes against direct formulations."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.attention.backends.turboquant_attn import TurboQuantAttentionBackend
from vllm.v1.attention.ops.int4_per_token_head import single_rht
from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode

from benchmarks import gpu
from benchmarks.common import CODE
from benchmarks.quantisers import (
    by_channel,
    fp8,
    hadamard_uniform,
    lloyd_max,
    per_token_head,
    unchanged,
    uniform,
)
from benchmarks.rivals import RIVALS, Rival, perplexity
from mla_converters.checkpoints.models import read_config

HEAD = 64


@pytest.fixture
def vectors() -> torch.Tensor:
    """Vectors of heads ``[2, 3, 40, 64]`` with means and a few outliers, as keys have them."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 40, HEAD) + 2 * torch.randn(HEAD)
    x[..., 5] *= 8
    return x


def levels(values: list[float], bits: int) -> list[float]:
    """Values on evenly spaced levels from the least to the greatest of them."""
    low, step = min(values), (max(values) - min(values)) / (2**bits - 1)
    kept_low, kept_step = (torch.tensor(x).half().item() for x in (low, step))
    return [math.floor((value - low) / step + 0.5) * kept_step + kept_low for value in values]


def hadamard(size: int) -> torch.Tensor:
    """Sylvester's matrix, of length 1 in rows and columns."""
    signs = [[1 - 2 * ((i & j).bit_count() % 2) for j in range(size)] for i in range(size)]
    return torch.tensor(signs, dtype=torch.float64) / math.sqrt(size)


def test_fp8(vectors: torch.Tensor) -> None:
    """Each number becomes the nearest of those that 8 bits can hold."""
    every = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()]
    x = torch.cat((vectors.flatten(), torch.tensor([1e4, -1e4, 3e-3])))
    nearest = (x[:, None] - every).abs().amin(1)
    torch.testing.assert_close((fp8(x) - x).abs(), nearest)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_uniform(vectors: torch.Tensor, bits: int) -> None:
    """By token in groups of channels, and by channel in groups of tokens; the last groups are smaller."""
    vector, group = vectors[1, 2, 7].tolist(), 24
    expected = [x for start in range(0, HEAD, group) for x in levels(vector[start : start + group], bits)]
    close(uniform(vectors, bits, group)[1, 2, 7], expected)
    channel = vectors[1, 2, :, 7].tolist()
    expected = [x for start in range(0, len(channel), group) for x in levels(channel[start : start + group], bits)]
    close(by_channel(vectors, bits, group)[1, 2, :, 7], expected)


def test_constant_group() -> None:
    close(uniform(torch.full((3, HEAD), 0.5), 2, 32), torch.full((3, HEAD), 0.5).tolist())


@pytest.mark.parametrize("bits", [3, 4])
def test_per_token_head(vectors: torch.Tensor, bits: int) -> None:
    """Codes with a whole zero, of vectors rotated by vLLM's transform."""
    rotation = single_rht(torch.eye(HEAD)).double()  # rows are the images of unit vectors
    torch.testing.assert_close(rotation @ rotation.T, HEAD * torch.eye(HEAD).double())
    rotated, most = (vectors[1, 2, 7].double() @ rotation).tolist(), 2**bits - 1
    scale = (max(rotated) - min(rotated)) / most
    zero = min(max(round(-min(rotated) / scale), 0), most)
    codes = [min(max(math.floor(x / scale + zero + 0.5), 0), most) for x in rotated]
    read = torch.tensor([scale * (code - zero) for code in codes], dtype=torch.float64) @ rotation.T / HEAD
    close(per_token_head(vectors, bits)[1, 2, 7], read.tolist())


def test_hadamard_uniform(vectors: torch.Tensor) -> None:
    rotation = single_rht(torch.eye(HEAD))
    rotated = (vectors[1, 2, 7] @ rotation).tolist()
    read = torch.tensor([x for start in (0, 32) for x in levels(rotated[start : start + 32], 2)]) @ rotation.T / HEAD
    close(hadamard_uniform(vectors, 2, 32)[1, 2, 7], read.tolist())


@pytest.mark.parametrize("bits", [3, 4])
def test_lloyd_max(vectors: torch.Tensor, bits: int) -> None:
    """The levels are best for normal numbers; a direction goes to the nearest of them, and keeps its length."""
    from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids

    table = get_centroids(HEAD, bits).double()
    vector, rotation = vectors[1, 2, 7].double(), hadamard(HEAD)
    direction = rotation @ vector / vector.norm()
    nearest = table[(direction[:, None] - table).abs().argmin(1)]
    close(lloyd_max(vectors, bits)[1, 2, 7], (rotation @ nearest / nearest.norm() * vector.norm()).tolist())
    normal = torch.randn(4000, HEAD) / math.sqrt(HEAD)
    error = (lloyd_max(normal, bits) - normal).square().mean() / normal.square().mean()
    # Max (1960), table 1. A direction of 64 numbers is not quite normal.
    assert error == pytest.approx({3: 0.03454, 4: 0.009497}[bits], rel=0.1)


def close(found: torch.Tensor, expected: list) -> None:
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-3, atol=2e-3)


def attention_inputs(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.nn.Module]:
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.config, module.layer_idx = SimpleNamespace(num_hidden_layers=6), 2
    module.num_key_value_groups, module.is_causal = 2, True
    query, key, value = (torch.randn(1, heads, tokens, 16) for heads in (4, 2, 2))
    return query, key, value, module


def decode(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The last query ``[heads, size]`` over all tokens ``[kv_heads, tokens, size]``, head by head."""
    outputs = []
    for head, vector in enumerate(query):
        weights = (keys[head // 2] @ vector / 4).softmax(0)
        outputs.append(weights @ values[head // 2])
    return torch.stack(outputs)


def test_attention_reads_the_cache() -> None:
    """Every token is attended as it is cached, the newest too; layers at the ends may stay as they are."""
    query, key, value, module = attention_inputs(50)
    rival = Rival(partial(uniform, bits=2, group=16), partial(uniform, bits=3, group=16), lambda _: 1.0, boundary=2)
    for layer in (1, 2, 3, 4):
        module.layer_idx = layer
        output, _ = rival.attend(module, query, key, value, None, scaling=0.25)
        inside = layer in (2, 3)
        keys, values = (rival.keys(key), rival.values(value)) if inside else (key, value)
        for position in (0, 20, 49):
            expected = decode(query[0, :, position], keys[0, :, : position + 1], values[0, :, : position + 1])
            torch.testing.assert_close(output[0, position], expected)


def test_recent_tokens_are_whole() -> None:
    """As in a decoder that keeps recent tokens: keys since a multiple of 8, and the last 8 values beside the newest."""
    query, key, value, module = attention_inputs(50)
    quantise = partial(uniform, bits=2, group=16)
    output, _ = Rival(quantise, quantise, lambda _: 1.0, recent=8).attend(module, query, key, value, None, scaling=0.25)
    for position in (0, 7, 8, 9, 40, 49):
        whole = position // 8 * 8
        keys = torch.cat((quantise(key)[0, :, :whole], key[0, :, whole : position + 1]), dim=1)
        old = max(0, position - 8)
        values = torch.cat((quantise(value)[0, :, :old], value[0, :, old : position + 1]), dim=1)
        torch.testing.assert_close(output[0, position], decode(query[0, :, position], keys, values))


@pytest.mark.parametrize(
    ("flag", "backend"),
    [
        ("fp8", TritonAttentionBackend),
        ("int4_per_token_head", TritonAttentionBackend),
        ("turboquant_4bit_nc", TurboQuantAttentionBackend),
        ("turboquant_3bit_nc", TurboQuantAttentionBackend),
    ],
)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_bytes_are_those_of_vllm(flag: str, backend: type[AttentionBackend], head_dim: int) -> None:
    spec = FullAttentionSpec(
        block_size=1,
        num_kv_heads=1,
        head_size=head_dim,
        dtype=STR_DTYPE_TO_TORCH_DTYPE[flag],
        kv_quant_mode=get_kv_quant_mode(flag),
    )
    assert RIVALS[flag].head_bytes(head_dim) == backend.customize_spec(spec).page_size_bytes


SHARES = {
    "fp8": 0.5,
    "int4_per_token_head": (4 + 0.5) / 16,
    "turboquant_4bit_nc": 4 / 30 + 26 / 30 * 70 / 256,  # two layers at each end are whole
    "kivi 4 bits": (4 + 1) / 16,
    "kivi 2 bits": (2 + 1) / 16,
    "kivi 2 bits, recent in 16": (96 + (1024 - 96) * 3 / 16) / 1024,
    "hadamard 3 bits": (3 + 0.5) / 16,
    "hadamard 2 bits, groups of 32": (2 + 1) / 16,
}


@pytest.mark.parametrize("name", SHARES)
def test_shares(name: str) -> None:
    config = SimpleNamespace(head_dim=64, num_hidden_layers=30)
    assert RIVALS[name].share(config, 1024) == pytest.approx(SHARES[name])


@pytest.mark.slow
def test_on_a_real_model(smollm2: Path) -> None:
    """fp8 costs about 1%, and 4 bits less than a tenth; 2 bits, much more. Nothing quantised: nothing lost."""
    score: Callable[[Rival], float] = partial(perplexity, smollm2, text=CODE, windows=1, length=1024)
    source = score(Rival(unchanged, unchanged, lambda head_dim: 4.0 * head_dim))
    assert score(Rival(unchanged, unchanged, lambda head_dim: 4.0 * head_dim, recent=128)) == pytest.approx(source)
    names = ("fp8", "int4_per_token_head", "kivi 4 bits", "kivi 2 bits", "kivi 2 bits, recent in 16")
    lost = {name: score(RIVALS[name]) / source - 1 for name in names}
    assert 0 < lost["fp8"] < 0.03
    assert 0 < lost["int4_per_token_head"] < 0.12
    assert 0 < lost["kivi 4 bits"] < lost["int4_per_token_head"]
    assert lost["kivi 2 bits"] > lost["kivi 2 bits, recent in 16"] > 0.1


def test_ratios_of_the_gpu_benchmark(tmp_path: Path) -> None:
    """A conversion is compared with each cache of the source; the smallest ratio is the one to the best of them."""
    work = {"case": "llama-3-8b", "requests": "most", "input_len": 8192, "output_len": 8192}
    speeds = {"source": (100, 90), "source fp8": (210, 180), "source int4": (200, 400), "mla": (280, 320)}
    rows = [
        work | {"name": name, gpu.RATE: rate, gpu.DECODE: None, gpu.CAPACITY: tokens}
        for name, (rate, tokens) in speeds.items()
    ]
    *sources, mla = gpu.compared(rows)
    assert all("ratios" not in row for row in sources)
    assert mla["ratios"] == {gpu.RATE: 2.8, gpu.CAPACITY: 320 / 90}
    assert mla["rival_ratios"]["source int4"] == {gpu.RATE: 1.4, gpu.CAPACITY: 0.8}
    assert mla["ratios_to_best"] == {gpu.RATE: 280 / 210, gpu.CAPACITY: 0.8}
    assert mla["reached"] == {gpu.RATE: True, gpu.CAPACITY: True} and mla["fp8_reached"] == {gpu.RATE: True}


@pytest.mark.parametrize("name", gpu.CASES)
def test_models_of_the_gpu_benchmark(name: str, tmp_path: Path) -> None:
    """Every engine has its configuration, in which each layer has the case's size, and packed rows have 4 bits."""
    case, layers = gpu.CASES[name], 6
    gpu.write_configs(case, layers, tmp_path)
    assert {folder for folder, _ in gpu.ENGINES.values()} == {path.name for path in tmp_path.iterdir()}
    plain, packed = (read_config(tmp_path / folder, trust_remote_code=False) for folder in ("mla", "packed"))
    for layer in range(layers):
        sizes = tuple(each if isinstance(each, int) else each[layer % 4] for each in (case.latent, case.rope))
        assert plain.cached_sizes(layer) == packed.cached_sizes(layer) == packed.cache_format(layer).sizes == sizes
        assert packed.cache_format(layer).latent[0].bits == 4
