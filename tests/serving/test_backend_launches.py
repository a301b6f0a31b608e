"""Outside the attention, a converted layer runs no operation that DeepSeek's layer in vLLM does not run.

``test_layers_gpu.py`` counts what the attention launches.
"""

from collections import Counter
from collections.abc import Iterator
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

from vllm_mla_plugin import register
from vllm_mla_plugin.attention import MLASelfAttention
from vllm_mla_plugin.rope import FrequencyRotaryEmbedding

HEADS, LATENT, ROPE, NOPE = 8, 512, 64, 128  # DeepSeek's sizes, except the number of heads


@pytest.fixture
def layers(tmp_path: Any) -> Iterator[tuple[MLASelfAttention, MultiHeadLatentAttentionWrapper]]:
    """Our layer and DeepSeek's. Without a query rank, DeepSeek's cannot compute queries and latent in one product."""
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
        for projection in (ours.query_latent_proj, ours.kv_b_proj, ours.o_proj, q_proj, kv_a_proj):
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
        yield ours, theirs
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
    ours, theirs = layers
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


def test_rotation_is_vllms() -> None:
    """Only the table of frequencies is ours. The kernel that rotates on a GPU is the one of every model."""
    assert FrequencyRotaryEmbedding.forward_cuda is RotaryEmbedding.forward_cuda
