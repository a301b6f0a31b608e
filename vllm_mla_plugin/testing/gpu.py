"""The backends that a layer gets when it is served on this GPU: this plugin's or, for some sizes, vLLM's own."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.attention.backends.mla.prefill.base import MLADimensions, MLAPrefillBackend
from vllm.v1.attention.backends.mla.prefill.selector import get_mla_prefill_backend
from vllm.v1.attention.selector import get_attn_backend

from vllm_mla_plugin import register
from vllm_mla_plugin.backends import select_backend, select_prefill_backend
from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat
from vllm_mla_plugin.testing.layer import Projection, Sizes, impl_arguments

BLOCK = 64  # tokens of a page; every backend takes this number


@dataclass(frozen=True)
class Case:
    """Sizes of one layer, with pages of :data:`BLOCK` tokens; the names are those of :class:`Sizes`."""

    latent: int
    rope: int
    nope: int
    v: int
    heads: int = 16

    @property
    def scale(self) -> float:
        """Of the scores before the softmax."""
        return self.v**-0.5

    @property
    def sizes(self) -> Sizes:
        """The same as :class:`Sizes`."""
        return Sizes(self.heads, self.latent, self.rope, self.nope, self.v, BLOCK)


@contextmanager
def configured(case: Case, dtype: torch.dtype, cache_dtype: str = "auto") -> Iterator[VllmConfig]:
    """Configure vLLM to serve a model of one such layer, which has no weights."""
    register()
    config = AutoConfig.for_model(
        "llama_mla",
        num_hidden_layers=1,
        hidden_size=case.heads * case.v,
        num_attention_heads=case.heads,
        kv_lora_rank=case.latent,
        qk_rope_head_dim=case.rope,
        qk_nope_head_dim=case.nope,
        v_head_dim=case.v,
        architectures=["LlamaMLAForCausalLM"],
        dtype=dtype,
    )
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        arguments = EngineArgs(
            model=str(Path(folder)), skip_tokenizer_init=True, kv_cache_dtype=cache_dtype, block_size=BLOCK
        )
        vllm_config = arguments.create_engine_config()
    with set_current_vllm_config(vllm_config):
        yield vllm_config


@dataclass
class Decoder:
    """A decode backend and its metadata builder.

    Attributes:
        name: of the backend, and the GPU.
        impl: the backend's implementation.
        layer: what the backend reads of vLLM's MLA layer.
        vllm_config: for the builder.
    """

    name: str
    impl: Any
    layer: Any
    vllm_config: VllmConfig

    def as_read(self, q: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        """Queries in the dtype that the layer hands over: with an fp8 cache, some kernels take queries in fp8 too."""
        rounds = cache.dtype == torch.float8_e4m3fn and self.impl.supports_quant_query_input
        return q.to(cache.dtype) if rounds else q

    def decode(
        self, q: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, lengths: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of one query per sequence; arguments and results as in ``forward_mqa``."""
        return self.impl.forward_mqa(q, cache, self.metadata(cache, table, lengths), self.layer)

    def metadata(self, cache: torch.Tensor, table: torch.Tensor, lengths: list[int]) -> object:
        """The backend's metadata for sequences of these lengths, of which each asks with its newest token."""
        from vllm.v1.attention.backend import CommonAttentionMetadata
        from vllm.v1.kv_cache_interface import MLAAttentionSpec

        count = len(lengths)
        starts = torch.arange(count + 1, dtype=torch.int32)
        seq_lens = torch.tensor(lengths, dtype=torch.int32)
        common = CommonAttentionMetadata(
            query_start_loc=starts.cuda(),
            query_start_loc_cpu=starts,
            seq_lens=seq_lens.cuda(),
            seq_lens_cpu_upper_bound=seq_lens,
            num_reqs=count,
            num_actual_tokens=count,
            max_query_len=1,
            max_seq_len=max(lengths),
            block_table_tensor=table,
            slot_mapping=torch.zeros(count, dtype=torch.int64, device="cuda"),
        )
        spec = MLAAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=cache.shape[-1], dtype=cache.dtype)
        with set_current_vllm_config(self.vllm_config):
            builder = self.layer.attn_backend.get_builder_cls()(spec, ["layer"], self.vllm_config, cache.device)
            return builder.build(0, common)


@dataclass(frozen=True)
class Packing:
    """How a layer's cache is packed; see :class:`vllm_mla_plugin.packed_attention.PackedMLAAttention`."""

    format: CacheFormat
    mean: torch.Tensor | None
    freqs: torch.Tensor
    max_position: int

    def arguments(self) -> dict[str, Any]:
        """What the backend's implementation takes of it, on the GPU."""
        mean = None if self.mean is None else torch.nn.Parameter(self.mean.cuda(), requires_grad=False)
        freqs = torch.nn.Parameter(self.freqs.cuda(), requires_grad=False)
        tensors = {"cache_mean": mean, "rope_freqs": freqs}
        return tensors | {"cache_format": self.format, "max_position": self.max_position}


def impl_for(case: Case, dtype: torch.dtype, cache_dtype: str, packing: Packing | None = None) -> Decoder:
    """The backend that decodes for a layer of these sizes: this plugin's, or vLLM's own choice."""
    format = None if packing is None else packing.format
    with configured(case, dtype, cache_dtype) as vllm_config:
        backend = select_backend(case.latent, case.rope, format) or get_attn_backend(
            case.latent + case.rope, dtype, cache_dtype, use_mla=True, num_heads=case.heads
        )
        kv_b_proj = Projection(case.latent, case.heads * (case.nope + case.v), bias=False, dtype=dtype)
        arguments = impl_arguments(case.sizes, kv_b_proj.cuda(), cache_dtype)
        impl = backend.get_impl_cls()(**arguments, **({} if packing is None else packing.arguments()))
        if packing is not None:
            impl.process_weights_after_loading(dtype)
        one = torch.ones((), device="cuda")
        layer = SimpleNamespace(
            attn_backend=backend,
            impl=impl,
            cache_format=format,
            num_heads=case.heads,
            q_lora_rank=None,
            kv_lora_rank=case.latent,
            qk_nope_head_dim=case.nope,
            qk_rope_head_dim=case.rope,
            v_head_dim=case.v,
            prefill_backend=make_prefill(case, dtype),
            _q_scale=one,
            _k_scale=one,
            _v_scale=one,
            _k_scale_float=1.0,
            _q_scale_float=1.0,
        )
        vllm_config.compilation_config.static_forward_context["layer"] = layer
        return Decoder(f"{backend.get_name()} on {current_platform.get_device_name()}", impl, layer, vllm_config)


def make_prefill(case: Case, dtype: torch.dtype) -> MLAPrefillBackend:
    """The backend that prefills for a layer of these sizes: this plugin's, or vLLM's own choice."""
    with configured(case, dtype) as vllm_config:
        dims = MLADimensions(qk_nope_head_dim=case.nope, qk_rope_head_dim=case.rope, v_head_dim=case.v)
        cls = select_prefill_backend(dims) or get_mla_prefill_backend(vllm_config)
        return cls(case.heads, case.scale, case.latent, case.nope, case.rope, case.v, vllm_config)
