"""Plans and decodes layers of different sizes as vLLM does on a GPU, in Triton's interpreter.

vLLM's own functions make the cache's groups, the cache, and the builders of metadata. The layers and their kernels are
the plugin's. What came out is printed as JSON, case by case. This runs in a process of its own, because
TRITON_INTERPRET must be set before Triton is imported.
"""

import json
import sys
import tempfile
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language
import vllm.triton_utils

# Without a GPU, vLLM has put an empty module in Triton's place.
vllm.triton_utils.triton, vllm.triton_utils.tl = triton, triton.language

from support.launches import Operations, triton_launches
from transformers import AutoConfig
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.platforms import current_platform
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.mla.prefill.cpu_sdpa import CPUSDPAMLAPrefillBackend
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity
from vllm.v1.worker.gpu.attn_utils import init_attn_backend, init_kv_cache
from vllm.v1.worker.workspace import current_workspace_manager, init_workspace_manager, lock_workspace

try:
    from vllm.v1.core import kv_cache_planning as planning
except ImportError:  # before 0.33
    from vllm.v1.core import kv_cache_utils as planning

from vllm_mla_plugin import backends, register
from vllm_mla_plugin.attention import MLASelfAttention
from vllm_mla_plugin.backends import gpu, gpu_merge, gpu_packed
from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat
from vllm_mla_plugin.checkpoint.latent_cache import latent_cache_json
from vllm_mla_plugin.latent_packing import dequantise, mean_at, quantise
from vllm_mla_plugin.testing.layer import cached_tokens, make_cache, reference

# As if there were a GPU.
backends.current_platform = SimpleNamespace(is_cpu=lambda: False, is_cuda_alike=lambda: True)
gpu.shared_memory = gpu_packed.shared_memory = lambda: 232448
torch.accelerator.empty_cache = lambda: None
type(current_platform).num_compute_units = classmethod(lambda cls, device_id=0: 24)
FlashAttention = type("FlashAttention", (CPUSDPAMLAPrefillBackend,), {})  # which cannot be imported without a GPU
sys.modules["vllm_mla_plugin.backends.gpu_prefill"] = SimpleNamespace(AnySizeFlashAttnPrefillBackend=FlashAttention)

HEADS, NOPE, VALUES, HIDDEN = 3, 16, 24, 48
LENGTHS = [5, 70, 33, 0]  # the last only fills up a CUDA graph
MEMORY = 1 << 20
CASES = {
    # The first and the third layer have equally wide rows, which are split differently.
    "16 bits": [(64, 16), (32, 8), (48, 32), (64, 16)],
    "packed": ["64x4g32/16x8g16", "32x4g32/8x8g8/nomean", "48x4g24c/32x6g32", "64x4g32/16x8g16"],
    "vLLM's sizes": [(512, 64), (256, 64), (512, 64), (320, 256)],
}


def make_layers(sizes: list[tuple[int, int]], formats: list[CacheFormat] | None, folder: Path) -> Any:
    """vLLM's configuration, and random layers that are ready to serve."""
    latents, ropes = zip(*sizes, strict=True)
    config = AutoConfig.for_model(
        "llama_mla",
        hidden_size=HIDDEN,
        num_hidden_layers=len(sizes),
        num_attention_heads=HEADS,
        kv_lora_ranks=latents,
        qk_rope_head_dims=ropes,
        qk_nope_head_dim=NOPE,
        v_head_dim=VALUES,
        max_position_embeddings=128,
        architectures=["LlamaMLAForCausalLM"],
        dtype=torch.float16,
        latent_cache=None if formats is None else latent_cache_json(formats),
    )
    config.save_pretrained(folder)
    vllm_config = VllmConfig(
        model_config=ModelConfig(str(folder), dtype="float16", skip_tokenizer_init=True),
        device_config=DeviceConfig("cpu"),
        cache_config=CacheConfig(block_size=16),
        scheduler_config=SchedulerConfig(
            max_model_len=128, max_num_seqs=len(LENGTHS), max_num_batched_tokens=128, is_encoder_decoder=False
        ),
    )
    torch.set_default_dtype(torch.float16)
    with set_current_vllm_config(vllm_config):
        layers = [
            MLASelfAttention(config, HIDDEN, HEADS, HEADS, prefix=f"model.layers.{index}.self_attn")
            for index in range(len(sizes))
        ]
    torch.set_default_dtype(torch.float32)
    for layer in layers:
        for parameter in layer.parameters():
            parameter.data.normal_(std=HIDDEN**-0.5)
        layer.rope_freqs.data.uniform_()
        layer.attn.process_weights_after_loading(torch.float16)
    return vllm_config, layers


def fill(layer: MLASelfAttention, cache: torch.Tensor, table: torch.Tensor) -> list[torch.Tensor]:
    """Write random tokens into a layer's cache, and NaN elsewhere.

    Returns:
        What each sequence's tokens are when they are read, ``[tokens, latent + rope]``.
    """
    sizes = SimpleNamespace(latent=layer.latent_dim, rope=layer.rope_dim, block=cache.shape[1])
    numbers, made = make_cache(sizes, LENGTHS, torch.float32)
    table[: len(made), : made.shape[1]] = made  # the same for all layers, because the seed is
    format = getattr(layer.attn, "cache_format", None)
    if format is None:
        cache[: len(numbers)] = numbers
        return [cached_tokens(cache, made[i], length) for i, length in enumerate(LENGTHS)]
    cache[: len(numbers)] = quantise(numbers.nan_to_num(), format)
    cache[: len(numbers)][numbers.isnan().any(-1)] = 255
    sequences = []
    for i, length in enumerate(LENGTHS):
        tokens = dequantise(cache[made[i].long()].flatten(0, 1)[:length], format)
        if format.mean:
            tokens += mean_at(layer.cache_mean.data, layer.rope_freqs.data, torch.arange(length))
        sequences.append(tokens.double())
    return sequences


def decode(layer: MLASelfAttention, builder: Any, table: torch.Tensor, sequences: list[torch.Tensor]) -> dict[str, Any]:
    """Decode one token of each sequence, with merging and W_UV together and apart: the errors, and the launches."""
    count = len(LENGTHS)
    starts, lengths = torch.arange(count + 1, dtype=torch.int32), torch.tensor(LENGTHS, dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=count,
        num_actual_tokens=count,
        max_query_len=1,
        max_seq_len=max(LENGTHS),
        block_table_tensor=table,
        slot_mapping=torch.zeros(count, dtype=torch.int64),
    )
    metadata = builder.build(0, common)
    attention = layer.attn
    q = torch.randn(count, HEADS, NOPE + layer.rope_dim, dtype=torch.float16)
    weight = layer.kv_b_proj.weight.double().view(HEADS, NOPE + VALUES, layer.latent_dim)
    expected = torch.zeros(count, HEADS, VALUES, dtype=torch.float64)
    for i, tokens in enumerate(sequences):
        if not len(tokens):
            continue
        kv = torch.einsum("tl,hdl->thd", tokens[:, : layer.latent_dim], weight)
        rope = tokens[:, None, layer.latent_dim :].expand(-1, HEADS, -1)
        k = torch.cat((kv[..., :NOPE], rope), dim=-1)
        expected[i] = reference(q[i : i + 1], k, kv[..., NOPE:], attention.scale)[0]
    result: dict[str, Any] = {}
    for name, most in (("together", gpu_merge.MOST_WEIGHT_BYTES), ("apart", -1)):
        gpu_merge.MOST_WEIGHT_BYTES, kept = most, gpu_merge.MOST_WEIGHT_BYTES
        output = torch.full((count, HEADS * VALUES), float("nan"), dtype=torch.float16)
        new = torch.empty(count, layer.latent_dim), torch.empty(count, 1, layer.rope_dim)
        with Operations() as operations, triton_launches(operations.counts):
            attention.forward_impl(q, *new, attention.kv_cache, metadata, output)
        gpu_merge.MOST_WEIGHT_BYTES = kept
        error = (output.double() - expected.flatten(1)).abs().max() / expected.abs().max()
        launches = {launch: number for launch, number in operations.counts.items() if "empty" not in launch}
        result[name] = {"error": error.item(), "launches": launches}
    return result


@torch.no_grad()
def check(name: str) -> dict[str, Any]:
    """What vLLM plans for the layers of a case, and what they decode."""
    torch.manual_seed(0)
    formats = None
    sizes: Any = CASES[name]
    if isinstance(sizes[0], str):
        formats = [CacheFormat.parse(spec) for spec in sizes]
        sizes = [format.sizes for format in formats]
    with tempfile.TemporaryDirectory() as folder:
        vllm_config, layers = make_layers(sizes, formats, Path(folder))
    names = [layer.attn.layer_name for layer in layers]
    specs = {layer.attn.layer_name: layer.attn.get_kv_cache_spec(vllm_config) for layer in layers}
    with set_current_vllm_config(vllm_config):
        layouts = get_supported_kv_cache_layouts([layer.attn.get_attn_backend() for layer in layers])
        resolve_kv_cache_layout(vllm_config, [[layout.name for layout in layouts]], specs.values())
        from_0_33 = getattr(planning, "get_global_kv_cache_groups", None)
        grouped = [from_0_33(vllm_config, [specs])] if from_0_33 else []
        (config,) = planning.get_kv_cache_configs(vllm_config, [specs], [MEMORY], *grouped)
        groups, support, block_sizes = init_attn_backend(config, vllm_config, torch.device("cpu"))
        forward_context = vllm_config.compilation_config.static_forward_context
        lock_workspace()  # as after the capture of CUDA graphs
        # In 0.29, it also puts the caches into a list.
        collected = [[]] if "runner_kv_caches" in signature(init_kv_cache).parameters else []
        init_kv_cache(*collected, forward_context, config, torch.device("cpu"), block_sizes, vllm_config)
    table = torch.zeros(len(LENGTHS), 8, dtype=torch.int32)
    decoded = []
    for group in groups[0]:
        builder = group.get_metadata_builder(0)
        for layer_name in group.layer_names:
            layer = layers[names.index(layer_name)]
            torch.manual_seed(1)
            sequences = fill(layer, layer.attn.kv_cache, table)
            decoded.append(decode(layer, builder, table, sequences))
    builders = [group.get_metadata_builder(0) for group in groups[0]]
    return {
        "backends": sorted({layer.attn.get_attn_backend().__name__ for layer in layers}),
        "prefill": sorted({type(layer.attn.prefill_backend).__name__ for layer in layers}),
        "groups": [[names.index(layer) for layer in group.layer_names] for group in groups[0]],
        "builders": [(builder.mla_dims.kv_lora_rank, builder.mla_dims.qk_rope_head_dim) for builder in builders],
        "workspaces": [builder.chunked_prefill_workspace.numel() for builder in builders],
        "graphs": support.min_cg_support.name,
        "rows": [layer.attn.kv_cache.shape[-1] * layer.attn.kv_cache.itemsize for layer in layers],
        "blocks": config.num_blocks,
        "tokens": get_kv_cache_capacity(vllm_config, config)[0],
        "decoded": decoded,
    }


def main() -> None:
    """Check all cases, with one workspace that is as large as the widest layers need, and does not grow afterwards."""
    torch.set_num_threads(1)
    register()
    init_workspace_manager(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        with set_current_vllm_config(VllmConfig(device_config=DeviceConfig("cpu"))):
            init_distributed_environment(1, 0, f"file://{folder}/rendezvous", backend="gloo")
            ensure_model_parallel_initialized(1, 1)
        results = {}
        for name in CASES:
            current_workspace_manager().unlock()
            results[name] = check(name)
        print(json.dumps(results))


if __name__ == "__main__":
    main()
