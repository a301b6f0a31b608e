"""What a converted layer launches to decode, compared with DeepSeek's layer in vLLM.

``test_layers_gpu.py`` counts what the attention launches.
"""

from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.launches import Operations
from transformers import AutoConfig
from vllm.config import DeviceConfig, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear
from vllm.model_executor.layers.mla import MLAModules, MultiHeadLatentAttentionWrapper
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

from vllm_mla_plugin import mapped_queries, register
from vllm_mla_plugin.attention import MLASelfAttention
from vllm_mla_plugin.rope import FrequencyRotaryEmbedding
from vllm_mla_plugin.testing.layer import absorbed

HEADS, LATENT, ROPE, NOPE = 8, 512, 64, 128  # DeepSeek's sizes, except the number of heads
METADATA = SimpleNamespace(num_actual_tokens=5, num_decodes=5, num_decode_tokens=5, num_prefills=0, decode=object())
"""Of a batch that only decodes."""


@pytest.fixture
def layers(tmp_path: Any) -> Iterator[tuple[MLASelfAttention, MLASelfAttention, MultiHeadLatentAttentionWrapper]]:
    """Our layer without and with ``q_rope_map``, and DeepSeek's.

    Without a query rank, DeepSeek's cannot compute queries and latent in one product.
    """
    register()
    config = AutoConfig.for_model(
        "llama_mla",
        hidden_size=256,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        kv_lora_rank=LATENT,
        qk_rope_head_dim=ROPE,
        qk_nope_head_dim=NOPE,
        v_head_dim=NOPE,
        max_position_embeddings=64,
        architectures=["LlamaMLAForCausalLM"],
        dtype=torch.float32,
    )
    config.save_pretrained(tmp_path / "model")
    model_config = ModelConfig(str(tmp_path / "model"), dtype="float32", skip_tokenizer_init=True)
    with set_current_vllm_config(VllmConfig(model_config=model_config, device_config=DeviceConfig("cpu"))):
        init_distributed_environment(1, 0, f"file://{tmp_path}/rendezvous", backend="gloo")
        ensure_model_parallel_initialized(1, 1)
        ours = MLASelfAttention(config, 256, HEADS, HEADS, prefix="model.layers.0.self_attn")
        q_proj = ColumnParallelLinear(256, HEADS * (NOPE + ROPE), bias=False)
        kv_a_proj = ReplicatedLinear(256, LATENT + ROPE, bias=False)
        config.rotary_query_map = True
        mapped = MLASelfAttention(config, 256, HEADS, HEADS, prefix="model.layers.2.self_attn")
        for parameter in (*ours.parameters(), *mapped.parameters()):
            parameter.data.normal_(std=1 / 16)
        own = [part for x in (ours, mapped) for part in (x.query_latent_proj, x.kv_b_proj, x.o_proj)]
        for projection in (*own, q_proj, kv_a_proj):
            projection.quant_method.process_weights_after_loading(projection)
        modules = MLAModules(
            kv_a_layernorm=RMSNorm(LATENT),
            kv_b_proj=ours.kv_b_proj,
            rotary_emb=ours.rotary_emb,
            o_proj=ours.o_proj,
            fused_qkv_a_proj=None,
            kv_a_proj_with_mqa=kv_a_proj,
            q_a_layernorm=None,
            q_b_proj=None,
            q_proj=q_proj,
            indexer=None,
            is_sparse=False,
            topk_indices_buffer=None,
        )
        theirs = MultiHeadLatentAttentionWrapper(
            256, HEADS, 1.0, NOPE, ROPE, NOPE, None, LATENT, modules, prefix="model.layers.1.self_attn"
        )
        for layer in (ours.attn, mapped.attn, theirs.mla_attn):
            layer.process_weights_after_loading(torch.float32)
        yield ours, mapped, theirs
        cleanup_dist_env_and_memory()


@torch.inference_mode()
def operations(layer: torch.nn.Module, attention: str, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The operations that a layer runs for 5 tokens, without those of its attention."""
    output = torch.zeros(5, HEADS * NOPE)
    monkeypatch.setattr(getattr(layer, attention), "forward", lambda *args, **kwargs: output)
    positions, hidden_states = torch.arange(5), torch.randn(5, 256)
    with Operations() as counted:
        layer(positions, hidden_states)
    return counted.counts


def test_nothing_that_deepseek_does_not_run(layers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _, theirs = layers
    own = operations(ours, "attn", monkeypatch)
    deepseek = operations(theirs, "mla_attn", monkeypatch)
    products = [
        sum(count for name, count in counts.items() if "mm" in name or "linear" in name) for counts in (own, deepseek)
    ]
    assert products == [2, 3], f"the projections are not counted: {own}, {deepseek}"
    # Our layer joins the rotated part of queries to the rest; DeepSeek's layer writes it into place.
    assert own - deepseek == {"aten.cat.default": 1}
    assert (deepseek - own)["aten.copy_.default"] == 1
    assert own.total() + 2 <= deepseek.total(), "a product and DeepSeek's norm of the latent, at least, come on top"


@torch.inference_mode()
def test_launches_of_a_decode_step(layers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, ``q_rope_map`` saves a launch, and the query needs no concatenation in kernels that want it whole."""
    counts: Counter[str] = Counter()
    handed: dict[int, Any] = {}

    def launch(name: str, result: Any) -> Any:
        def launched(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return result(*args)

        return launched

    monkeypatch.setattr(mapped_queries, "current_platform", SimpleNamespace(is_cuda_alike=lambda: True))
    absorb = launch("absorb and rotate", lambda q, weight, *_: q.new_empty(*q.shape[:2], weight.shape[-1]))
    monkeypatch.setattr(mapped_queries, "absorb", absorb)
    # In place, as on a GPU.
    rotate = launch("rotate", lambda _, positions, query, key=None: (query, key))
    monkeypatch.setattr(FrequencyRotaryEmbedding, "forward", rotate)
    norm = launch("norm", lambda _, x: x)
    monkeypatch.setattr(RMSNorm, "forward", norm)
    context = SimpleNamespace(attn_metadata=METADATA, slot_mapping={})
    monkeypatch.setattr("vllm.model_executor.layers.attention.mla_attention.get_forward_context", lambda: context)
    launches = []
    for index, layer in enumerate(layers):
        attention = layer.mla_attn if index == 2 else layer.attn
        attention.use_direct_call = True

        def attend(q: Any, *_: Any, index: int = index) -> Any:
            handed[index] = q
            return torch.empty(5, HEADS, LATENT), None

        monkeypatch.setattr(attention.impl, "forward_mqa", launch("attend", attend))
        counts.clear()
        inputs = torch.arange(5), torch.randn(5, 256)
        with Operations() as operations:
            layer(*inputs)
        launches.append({name: n for name, n in (counts + operations.counts).items() if "empty" not in name})
    assert [sum(each.values()) for each in launches] == [7, 6, 9], launches  # and one to write the cache, in each
    assert launches[1]["absorb and rotate"] == launches[1]["rotate"] == 1, "the key is rotated as before"
    assert all(isinstance(handed[index], tuple) for index in (0, 2))
    assert handed[1].shape == (5, HEADS, LATENT + ROPE) and handed[1].is_contiguous()


@torch.inference_mode()
def test_decode_with_the_map(layers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One product absorbs and maps, and RoPE comes after it: the same as rotary queries first, and vLLM's product."""
    _, mapped, _ = layers
    positions = torch.tensor([0, 3, 17, 40, 5])
    q, _ = mapped.project(torch.randn(5, 256))
    handed: list[torch.Tensor] = []

    def attend(q: Any, *_: Any) -> Any:
        handed.append(torch.cat(q, dim=-1) if isinstance(q, tuple) else q)
        return torch.ones(5, HEADS, LATENT), None

    monkeypatch.setattr(mapped.attn.impl, "forward_mqa", attend)
    outputs = []
    for only_decodes in (True, False):
        monkeypatch.setattr(mapped.attn, "_only_decodes", lambda *_, answer=only_decodes: answer)
        output = torch.zeros(5, HEADS * NOPE)
        empty = torch.empty(5, 0)
        mapped.attn.forward_impl(q, empty, empty, empty, METADATA, output, q_dcp_replicated=positions)
        outputs.append(output)
    torch.testing.assert_close(*handed, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*outputs)
    turns = mapped.rotary_emb.cos_sin_cache
    torch.testing.assert_close(
        handed[0].double(), absorbed(q, mapped.attn.query_weight, positions, turns), atol=1e-4, rtol=1e-4
    )


def test_rotation_is_vllms() -> None:
    """Only the table of frequencies is ours. The kernel that rotates on a GPU is the one of every model."""
    assert FrequencyRotaryEmbedding.forward_cuda is RotaryEmbedding.forward_cuda
