"""Runs this plugin's Triton kernels for packed rows in Triton's interpreter.

What each of :data:`CHECKS` returns is printed as JSON. This runs in a process of its own, because TRITON_INTERPRET must
be set before Triton is imported.
"""

import json
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language
import vllm.triton_utils

# Without a GPU, vLLM has put an empty module in Triton's place.
vllm.triton_utils.triton, vllm.triton_utils.tl = triton, triton.language

from support.packed import SPECS, random_layer
from support.packed_attention import check_decode, check_prefill, projection_error
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.backends.mla.prefill.cpu_sdpa import CPUSDPAMLAPrefillBackend

from vllm_mla_plugin.backends import gpu_packed
from vllm_mla_plugin.backends.gpu_means import Means
from vllm_mla_plugin.backends.gpu_pack import pack
from vllm_mla_plugin.backends.gpu_packed_decode import EXTRA, decode_packed
from vllm_mla_plugin.backends.gpu_rows import widen
from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat
from vllm_mla_plugin.checkpoint.layouts import packed_tiles
from vllm_mla_plugin.latent_packing import dequantise, mean_at, quantise
from vllm_mla_plugin.testing.layer import Projection, Sizes, impl_arguments, make_cache, reference

type(current_platform).num_compute_units = classmethod(lambda cls, device_id=0: 3)

TOKENS = 8
PARTS = 3
PAGE = 16
SHARED = 232448  # bytes; with less, tiles have fewer tokens
ODD = "37x4g16+5x2g8c/6x6g6s"


def packed_by_kernel(numbers: torch.Tensor, format: CacheFormat) -> torch.Tensor:
    """Rows of tokens ``[tokens, latent + rope]``, written to pages in random order."""
    pages = -(-len(numbers) // PAGE) + 1
    cache = torch.zeros(pages, PAGE, format.bytes_per_token + 16, dtype=torch.uint8)[..., : format.bytes_per_token]
    slots = torch.randperm(pages * PAGE)[: len(numbers) + 1]
    slots[-1] = -1  # padding, which is not written
    padded = torch.nn.functional.pad(numbers, (0, 0, 0, 1), value=float("nan"))
    pack(*padded.split(list(format.sizes), dim=-1), cache, slots, format)
    rows = cache.flatten(0, 1)
    assert int((rows != 0).any(-1).sum()) <= len(numbers)
    return rows[slots[:-1]]


def check_rows(spec: str) -> float:
    """The share of rows that differ from those of torch. They may differ where another scale is equally good."""
    torch.manual_seed(0)
    format = CacheFormat.parse(spec)
    numbers = torch.randn(TOKENS, 192) * torch.logspace(-2, 1.5, TOKENS)[:, None]
    numbers[3], numbers[5], numbers[6] = 0, 1e30, numbers[6] * 1e-30
    expected, got = quantise(numbers, format), packed_by_kernel(numbers, format)
    errors = [(dequantise(rows, format) - numbers).double().square().sum(-1) for rows in (expected, got)]
    torch.testing.assert_close(errors[1], errors[0], rtol=1e-6, atol=0)
    return (expected != got).any(-1).float().mean().item()


def check_ties(spec: str) -> float:
    """The same for small whole numbers, whose squared errors are exact, whatever their order: no row may differ."""
    torch.manual_seed(0)
    format = CacheFormat.parse(spec)
    numbers = torch.randint(-8, 8, (TOKENS, 192)).float()
    numbers[:4] = numbers[:4].clamp(-1, 1)
    return (quantise(numbers, format) != packed_by_kernel(numbers, format)).any(-1).float().mean().item()


def check_widen(spec: str) -> float:
    """The largest error of widened tokens, relative to the numbers' size."""
    torch.manual_seed(0)
    format, mean, freqs = random_layer(spec)
    cache = quantise(torch.randn(5, PAGE, 192), format)
    slots, positions = torch.randperm(5 * PAGE)[:37], torch.arange(37) * 101
    means = None if mean is None else Means.of(mean, freqs, 4096, 32)
    got = widen(cache, slots, positions, format, means, torch.float32)
    expected = dequantise(cache.flatten(0, 1)[slots], format)
    if mean is not None:
        expected += mean_at(mean, freqs, positions)
    return ((got - expected).abs() / (1 + expected.abs())).max().item()


def check_attention(
    spec: str, heads: int, queries: int, causal: bool, shared: int = SHARED, lengths: tuple[int, ...] = (5, 97, 1, 0)
) -> float:
    """The largest error of outputs and log-sum-exps, if each request asks with its ``queries`` newest tokens."""
    torch.manual_seed(0)
    format, mean, freqs = random_layer(spec)
    latent, rope = format.sizes
    scale, tiles = (latent + rope) ** -0.5, packed_tiles(format, shared)
    numbers, table = make_cache(Sizes(latent=latent, rope=rope), list(lengths), torch.float32)
    cache = quantise(numbers.nan_to_num(), format)
    cache[numbers.isnan().any(-1)] = 255
    rows = len(lengths) * queries
    # The rotary part is a slice of the projection's result, as when vLLM hands it over.
    q_latent, q_rope = torch.randn(rows, heads, latent), torch.randn(rows, heads, 3 + rope)[..., 3:]
    parts = decode_packed(
        q_latent,
        q_rope,
        cache,
        table,
        torch.tensor(lengths, dtype=torch.int32),
        torch.full((rows, heads, PARTS, latent + EXTRA), float("nan")),
        format,
        None if mean is None else Means.of(mean, freqs, 4096, tiles.tokens),
        scale=scale,
        causal=causal,
        tiles=tiles,
    )
    output, lse = parts.merge()
    q = torch.cat((q_latent, q_rope), dim=-1)
    worst = projection_error(parts, output) if heads < 9 else 0.0  # the interpreter is slow
    for i in range(rows):
        request, token = divmod(i, queries)
        length = max(0, lengths[request] - (queries - 1 - token if causal else 0))
        if not length:
            worst = max(worst, output[i].abs().max().item())
            continue
        keys = dequantise(cache[table[request].long()].flatten(0, 1)[:length], format)
        if mean is not None:
            keys += mean_at(mean, freqs, torch.arange(length))
        keys = keys.double()[:, None].expand(-1, heads, -1)
        expected = reference(q[i : i + 1], keys, keys[..., :latent], scale)
        scores = torch.einsum("hd,khd->hk", q[i].double(), keys) * scale
        worst = max(worst, (output[i : i + 1] - expected).abs().max().item())
        worst = max(worst, (lse[i] - scores.logsumexp(-1)).abs().max().item())
    return worst


def make_impl(spec: str, sizes: Sizes) -> gpu_packed.PackedTritonMLAImpl:
    """The backend's implementation, as if there were a GPU."""
    gpu_packed.shared_memory = lambda: SHARED
    format, mean, freqs = random_layer(spec)
    kv_b_proj = Projection(sizes.latent, sizes.heads * (sizes.nope + sizes.v), bias=False)
    kv_b_proj.weight.data.normal_(std=sizes.latent**-0.5)
    packing: dict[str, Any] = {"cache_mean": mean, "rope_freqs": freqs}
    parameters = {name: x if x is None else torch.nn.Parameter(x, False) for name, x in packing.items()}
    arguments = impl_arguments(sizes, kv_b_proj)
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig("cpu"))):
        impl = gpu_packed.PackedTritonMLAImpl(cache_format=format, max_position=4096, **parameters, **arguments)
    impl.process_weights_after_loading(torch.float32)
    if impl.means is not None:  # loaded again, weights come to where captured CUDA graphs read them
        before = [tensor.data_ptr() for tensor in impl.means]
        for tensor in impl.means:
            tensor.zero_()
        impl.process_weights_after_loading(torch.float32)
        assert [tensor.data_ptr() for tensor in impl.means] == before
    return impl


@torch.no_grad()
def check_impl(spec: str, what: str) -> bool:
    """The implementation on a cache that it wrote itself."""
    torch.manual_seed(0)
    latent, rope = CacheFormat.parse(spec).sizes
    sizes = Sizes(latent=latent, rope=rope)
    impl = make_impl(spec, sizes)
    if what == "decode":
        check_decode(impl, sizes, torch.float32, [1, 31, 33, 5])
        return True
    dims = (sizes.latent, sizes.nope, sizes.rope, sizes.v)
    backend = CPUSDPAMLAPrefillBackend(sizes.heads, impl.scale, *dims, SimpleNamespace())
    contexts, lengths = {"no-context": ([0, 0], [1, 40]), "context": ([32, 0, 48], [20, 4, 1])}[what]
    check_prefill(impl, sizes, torch.float32, contexts, lengths, backend)
    return True


CHECKS = {
    **{f"rows {spec}": (check_rows, spec) for spec in SPECS},
    **{f"ties {spec}": (check_ties, spec) for spec in ("128x8g128/64x6g64", *SPECS[2:5], SPECS[7], SPECS[9])},
    **{f"widen {spec}": (check_widen, spec) for spec in SPECS},
    **{f"attention {spec}": (check_attention, spec, 9, 1, True) for spec in SPECS},
    "attention odd sizes": (check_attention, ODD, 3, 1, True),
    "attention 17 heads, 3 queries": (check_attention, SPECS[2], 17, 3, True, SHARED, (2, 70, 0)),
    "attention 1 head, 3 queries, all visible": (check_attention, SPECS[7], 1, 3, False, SHARED, (2, 70, 0)),
    "attention 16 tokens a tile": (check_attention, SPECS[2], 9, 1, True, 30 << 10),
    "attention slices of 104": (check_attention, "208x4g32/8x6g8", 2, 1, True),
    "attention wide": (check_attention, "592x5g64/16x8g16s", 2, 1, True, SHARED, (40,)),
    **{f"impl {what}": (check_impl, "64x4g32/32x8g32s", what) for what in ("decode", "no-context", "context")},
    "impl decode without a mean": (check_impl, "64x4g32/32x8g32s/nomean", "decode"),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({name: check(*arguments) for name, (check, *arguments) in CHECKS.items()}))
