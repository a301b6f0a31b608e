"""Candidate caches, vLLM's own formats, and what ``vllm-mla plan`` recommends, depending on who serves them."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from transformers import LlamaConfig
from vllm.config.cache import CacheDType
from vllm.model_executor.layers.quantization.turboquant.config import TQ_PRESETS, TurboQuantConfig
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE, nvfp4_kv_cache_full_dim
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode

from mla_converters.checkpoints.shape import PlannedSource, Shape
from mla_converters.checkpoints.vllm_caches import VLLM_CACHES, WIDE_CPU, vllm_caches
from mla_converters.errors import ConversionError
from mla_converters.latent.cache_size import CacheBudget
from mla_converters.methods.asked_cache import AskedCache
from mla_converters.methods.registry import method_of
from mla_converters.options import (
    AttentionAwareOptions,
    CacheSizes,
    ExactOptions,
    LayerSizes,
    MethodOptions,
    TransmlaOptions,
)
from mla_converters.planning.layouts import Candidate, asked, candidates, share_sizes
from mla_converters.planning.recommendation import UNTRIED, advice, recommend
from mla_converters.planning.serving import serving_backends
from vllm_mla_plugin.checkpoint.layouts import (
    A100,
    BLACKWELL,
    GPUS,
    HOPPER,
    PLUGIN_BACKEND,
    WIDEST_PACKED_LATENT,
    gpu_backends,
)

DEFAULT = AttentionAwareOptions()
NAMES = [cache.name for cache in VLLM_CACHES]


def shape(kv_heads: int, head_dim: int, layers: int = 32) -> Shape:
    """A source of which only the cache matters here."""
    sizes: dict[str, Any] = dict.fromkeys(Shape.__dataclass_fields__, 0)
    named = {"layers": layers, "hidden": 64, "query_heads": kv_heads, "kv_heads": kv_heads, "head_dim": head_dim}
    return Shape(**{**sizes, **named, "window": None, "qkv_bias": False, "qk_norm": False, "weight_bytes": 2})


def source(kv_heads: int, head_dim: int, dtype: str = "bfloat16") -> PlannedSource:
    return PlannedSource("model", None, "LlamaForCausalLM", dtype, dtype, shape(kv_heads, head_dim), LlamaConfig())


def listed(kv_heads: int, head_dim: int, method: MethodOptions = DEFAULT) -> dict[str, Candidate]:
    """The candidates by their options."""
    return {" ".join(candidate.options): candidate for candidate in candidates(shape(kv_heads, head_dim), method)}


def test_candidates() -> None:
    """Shares of the bytes, vLLM's fast layouts, and the source's numbers in 8 and 4 bits, largest first."""
    found = listed(8, 128)
    assert list(found) == [
        "--method exact --latent-bits 8",
        "--cache-ratio 0.5",
        "--cache-ratio 0.3125",
        *("--method exact --latent-bits 4", "--kv-lora-rank 512 --qk-rope-head-dim 64"),  # of as many bytes
        *(f"--cache-ratio {ratio}" for ratio in (0.25, 0.1875)),
        "--kv-lora-rank 256 --qk-rope-head-dim 64",
        *(f"--cache-ratio {ratio}" for ratio in (0.125, 0.0625)),
    ]
    rows = {options: candidate.cache.row_bytes for options, candidate in found.items()}
    assert rows["--cache-ratio 0.25"] == 1024  # a quarter of 2,048 numbers of 2 bytes
    assert rows["--kv-lora-rank 512 --qk-rope-head-dim 64"] == 1152
    assert rows["--method exact --latent-bits 4"] == 2048 * 4 // 8 + 2 * 2048 // 32  # two bytes for a group of 32
    # A small source: 256 + 64 in 16 bits is larger than all of its numbers in 8 bits, and 512 + 64 than the source.
    assert next(iter(listed(3, 64))) == "--kv-lora-rank 256 --qk-rope-head-dim 64"
    assert "--kv-lora-rank 512 --qk-rope-head-dim 64" not in listed(3, 64)


def test_typical_formats() -> None:
    """Where the search has room for all numbers, they have as many bits as fit; below, four."""
    caches = {options: candidate.cache for options, candidate in listed(8, 128).items()}
    for ratio, numbers, bits in ((0.5, 2048, 6), (0.3125, 2048, 4), (0.125, 910, 4)):
        cache = caches[f"--cache-ratio {ratio}"]
        assert cache.searched_bytes == ratio * 4096
        assert cache.format is not None and cache.format.bytes_per_token <= cache.searched_bytes
        assert cache.budget.width == pytest.approx(numbers, rel=0.01)
        assert {segment.bits for segment in (*cache.format.latent, *cache.format.rope)} == {bits}
    assert caches["--method exact --latent-bits 8"].searched_bytes is None


def test_wide_sources() -> None:
    """A search keeps latents that GPUs serve. Larger shares then come to the same cache, with its real bytes."""
    found = listed(32, 128)
    cache = found["--cache-ratio 0.25"].cache
    assert cache.budget == CacheBudget(WIDEST_PACKED_LATENT, 128)
    assert cache.row_bytes == (WIDEST_PACKED_LATENT + 128) * 65 // 64 + 14  # 8 bits, and a scale for 64; padded
    assert "--cache-ratio 0.5" not in found and "--cache-ratio 0.125" in found


def test_search_and_rounding_take_time() -> None:
    """Of the same sizes, a cache that is packed costs more time than one that is not, and one that is searched most."""
    sizes = replace(shape(8, 128), hidden=1024, layer_parameters=10**7, attention_parameters=4 * 10**6)
    method = method_of(DEFAULT)
    searched = method.cache(sizes, CacheSizes(cache_ratio=0.25))
    kinds = (AskedCache(searched.budget), replace(searched, searched_bytes=None), searched)
    seconds = [method.cost(sizes, cache, 16384).core_seconds for cache in kinds]
    assert seconds == sorted(set(seconds))
    assert method.cache(sizes, CacheSizes(cache_ratio=0.25, latent_bits=4)).searched_bytes == 1024
    assert method.cache(sizes, CacheSizes(kv_lora_rank=512, latent_bits=4)).searched_bytes is None


def test_candidates_of_other_methods() -> None:
    """Methods that do not choose bits get four, layers of different sizes are not packed, and ``exact`` keeps all."""
    four = listed(8, 128, TransmlaOptions())["--cache-ratio 0.25 --latent-bits 4"].cache
    assert four.searched_bytes is None and four.format is not None and 1000 < four.row_bytes <= 1024
    plain = listed(8, 128, AttentionAwareOptions(layer_sizes=LayerSizes.MEASURED))
    assert plain["--cache-ratio 0.25 --latent-bits 16"].cache.format is None
    assert list(listed(8, 128, ExactOptions())) == ["--method exact --latent-bits 8", "--method exact --latent-bits 4"]


def test_tiny_source() -> None:
    """Shares without room for a latent are left out; a quarter must have room."""
    exact = [f"--method exact --latent-bits {bits}" for bits in (8, 4)]
    assert list(listed(1, 4)) == [*exact, "--cache-ratio 0.5"]
    with pytest.raises(ConversionError, match="give a larger --cache-ratio"):
        recommend(source(1, 4), DEFAULT)


@pytest.mark.parametrize(("kv_heads", "head_dim"), [(8, 128), (3, 64), (32, 128), (8, 256)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_backends_are_those_of_the_plugin(kv_heads: int, head_dim: int, dtype: str) -> None:
    """A plan says what the plugin's own table says about the cache, packed or not."""
    for candidate in candidates(shape(kv_heads, head_dim), DEFAULT):
        served = candidate.backends(dtype)
        budget = candidate.cache.budget
        layout = (budget.kv_lora_rank, budget.qk_rope_head_dim)
        assert served.pop("CPU") == ["any-size backend of this plugin"]
        asked_of = {gpu: gpu_backends(layout, candidate.nope_dim, dtype, gpu, candidate.cache.format) for gpu in GPUS}
        assert served == {gpu: names for gpu, names in asked_of.items() if names}
        assert served == {} or dtype != "float32"


def test_recommendation_says_who_serves_it() -> None:
    """A quarter of the bytes. Where no GPU serves it, vLLM's own 16-bit layout is named, if it is worth it."""
    chosen, reason = recommend(source(3, 64), DEFAULT)
    assert chosen.options == ("--cache-ratio", "0.25")
    assert set(chosen.backends("bfloat16")) == {"CPU", *GPUS}
    assert f"CPUs serve it, and on GPUs {PLUGIN_BACKEND}. {UNTRIED}" in reason
    chosen, reason = recommend(source(8, 128), DEFAULT)  # about 1,820 numbers are too wide for some GPUs
    assert list(chosen.backends("bfloat16")) == ["CPU", HOPPER, BLACKWELL, A100]
    assert f"on some GPUs ({HOPPER}, {BLACKWELL}, {A100}) {PLUGIN_BACKEND}" in reason
    chosen, reason = recommend(source(16, 128), TransmlaOptions())  # 3,600 numbers, which no search limits
    assert set(chosen.backends("bfloat16")) == {"CPU"}
    assert "numbers are too wide for GPU kernels" in reason
    assert "On GPUs take --kv-lora-rank 512 --qk-rope-head-dim 64: 14.1% of the bytes, in 16 bits" in reason


def test_recommendation_where_no_gpu_can() -> None:
    _, reason = recommend(source(8, 128, "float32"), DEFAULT)
    assert "Only CPUs serve it: GPUs do not serve MLA in float32." in reason and "On GPUs take" not in reason
    _, reason = recommend(source(8, 256), DEFAULT)
    assert "prefill on GPUs takes heads of at most 256 numbers, and these have 256 + 256" in reason


def test_recommendation_of_a_lossless_method() -> None:
    chosen, reason = recommend(source(8, 128), ExactOptions())
    assert chosen.options == ("--method", "exact", "--latent-bits", "4")
    assert "keeps all numbers. In 4 bits they take 28.1% of the bytes." in reason


def test_advice() -> None:
    """Flags of vLLM come first where they are as small, and only those that the source's heads allow."""
    whole = advice(source(8, 128), "convert it", "convert it exactly")
    assert [each.cache_ratio for each in whole] == [0.5, 0.265625, 0.28125, 0.25]
    assert [each.command for each in whole] == [
        "vllm serve model --kv-cache-dtype fp8",
        "vllm serve model --kv-cache-dtype int4_per_token_head",
        *("convert it exactly", "convert it"),
    ]
    assert "on GPUs" in whole[1].what and WIDE_CPU in whole[0].what
    assert [each.command.split()[-1] for each in advice(source(8, 80), "a", "b")] == ["fp8", "b", "a"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_bytes_of_vllms_formats(name: str, head_dim: int) -> None:
    """They are what vLLM itself allocates for a head."""
    cache = next(cache for cache in VLLM_CACHES if cache.name == name)
    assert name in get_args(CacheDType)
    if name in TQ_PRESETS:
        expected = TurboQuantConfig.from_cache_dtype(name, head_dim).slot_size_aligned
    elif name == "nvfp4":
        expected = 2 * nvfp4_kv_cache_full_dim(head_dim)
    else:
        spec = FullAttentionSpec(
            block_size=16,
            num_kv_heads=1,
            head_size=head_dim,
            dtype=STR_DTYPE_TO_TORCH_DTYPE[name],
            kv_quant_mode=get_kv_quant_mode(name),
        )
        expected = TritonAttentionBackend.customize_spec(spec).page_size_bytes // 16
    assert cache.head_bytes(head_dim) == expected


def test_boundary_layers_of_turboquant() -> None:
    """vLLM leaves the first and last two layers in 16 bits."""

    class Config:
        is_hybrid, hf_text_config = False, torch.nn.Module()

    for layers in (3, 30):
        Config.hf_text_config.num_hidden_layers = layers  # type: ignore[assignment]
        kept = len(TurboQuantConfig.get_boundary_skip_layers(Config))  # type: ignore[arg-type]
        cache = next(cache for cache in VLLM_CACHES if cache.name == "turboquant_4bit_nc")
        assert cache.token_bytes(shape(3, 64, layers)) == 3 * ((layers - kept) * cache.head_bytes(64) + kept * 256)


def test_hardware_of_vllms_formats() -> None:
    served = {name: cache.served_on for name, cache in zip(NAMES, VLLM_CACHES, strict=True)}
    assert served["fp8"](128) == (WIDE_CPU, *GPUS)
    assert served["fp8"](80) == (HOPPER, BLACKWELL, *GPUS[3:])  # neither the CPU's heads nor FlashInfer's
    assert A100 not in served["fp8_per_token_head"](128)
    assert served["nvfp4"](64) == (BLACKWELL,) and served["nvfp4"](128) == GPUS
    assert served["int4_per_token_head"](128) == GPUS and served["int4_per_token_head"](96) == ()
    # vLLM's CPU backend takes no other heads, and fp8 only for heads that 32 divides.
    heads = [size for size in CPUAttentionBackend.get_supported_head_sizes() if size % 32 == 0]
    assert [size for size in range(16, 544, 16) if WIDE_CPU in served["fp8"](size)] == heads
    assert "fp8" in CPUAttentionBackend.supported_kv_cache_dtypes
    assert {"int8_per_token_head", "int4_per_token_head"} <= set(TritonAttentionBackend.supported_kv_cache_dtypes)
    ratios = [cache.token_bytes(shape(8, 128)) for cache in vllm_caches(shape(8, 128))]
    assert ratios == sorted(ratios, reverse=True) and len(ratios) == len(VLLM_CACHES)


def test_layouts_of_different_layers_stay_in_16_bits() -> None:
    """And this plugin's backend serves all of them on GPUs, vLLM's own layouts too."""
    method = AttentionAwareOptions(layer_sizes=LayerSizes.MEASURED)
    deepseek = asked(shape(8, 128), method, CacheSizes(kv_lora_rank=512, qk_rope_head_dim=64))
    assert not deepseek.is_vllms
    assert deepseek.backends("bfloat16") == {"CPU": ["any-size backend of this plugin"]} | {
        gpu: [PLUGIN_BACKEND] for gpu in GPUS
    }
    cache = asked(shape(8, 128), method, share_sizes(method, 0.25)).cache
    assert serving_backends(cache, 128, "bfloat16")["CPU"]
    with pytest.raises(ConversionError, match="--latent-bits 16"):
        asked(shape(8, 128), method, CacheSizes(cache_ratio=0.25))
