"""One of two ranks that share out contexts: this plugin's Triton backend in Triton's interpreter, with vLLM's own code
that gathers queries and merges results, and gloo between the processes.

The arguments are this process's rank, a file for the processes to meet, and cases as JSON; errors are printed as JSON.
"""

import json
import sys
from types import SimpleNamespace

import torch
import triton
import triton.language
import vllm.triton_utils

# Without a GPU, vLLM has put an empty module in Triton's place.
vllm.triton_utils.triton, vllm.triton_utils.tl = triton, triton.language

from vllm.config import ParallelConfig, SchedulerConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonPrefillMetadata,
    build_mla_chunked_context_metadata,
)
from vllm.v1.attention.backends.mla.prefill.cpu_sdpa import CPUSDPAMLAPrefillBackend
from vllm.v1.attention.backends.utils import get_dcp_local_seq_lens
from vllm.v1.attention.ops import dcp

from vllm_mla_plugin.backends import gpu
from vllm_mla_plugin.testing.layer import Projection, Sizes, cached_tokens, make_cache, reference

RANKS = 2
LENGTHS = [5, 70, 1, 33]  # the second rank has nothing of the third
NEW = [3, 40, 1, 6]
SHARED_BYTES = 232448  # of a GPU


def main() -> None:
    """Compute every case."""
    rank, meeting, cases = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    gpu.shared_memory = lambda: SHARED_BYTES
    # vLLM counts the constants of its merging kernel, which interpreted kernels do not name.
    if hasattr(dcp, "CorrectAttnCPOutKernel"):
        dcp.CorrectAttnCPOutKernel.kernel.constexprs = ["HEAD_DIM", "N_ROUNDED", "IS_BASE_E"]
    parallel = ParallelConfig(tensor_parallel_size=RANKS, decode_context_parallel_size=RANKS)
    parallel.set_dcp_defaults()
    config = VllmConfig(parallel_config=parallel, scheduler_config=SchedulerConfig.default_factory())
    config.kernel_config.enable_jit_warmup = False
    with set_current_vllm_config(config):
        init_distributed_environment(RANKS, rank, f"file://{meeting}", rank, "gloo")
        initialize_model_parallel(RANKS, decode_context_model_parallel_size=RANKS)
        print(json.dumps({str(tuple(case)): errors(config, rank, *case) for case in cases}))


def errors(config: VllmConfig, rank: int, latent: int, rope: int, interleave: int) -> tuple[float, float]:
    """Largest errors of decode and of prefill, of this rank's heads.

    Args:
        config: of the engine.
        rank: this process's.
        latent, rope: sizes of a row.
        interleave: how many tokens in turn go to one rank.
    """
    torch.manual_seed(0)  # both ranks make the same model and the same contexts
    sizes = Sizes(heads=3, latent=latent, rope=rope, nope=16, v=16)
    heads = RANKS * sizes.heads
    weight = torch.randn(heads, sizes.nope + sizes.v, latent) * latent**-0.5
    cache, table = make_cache(sizes, [*LENGTHS], torch.float32)
    contexts = [cached_tokens(cache, row, length) for row, length in zip(table, LENGTHS, strict=True)]
    q_latent, q_rope = torch.randn(len(LENGTHS), heads, latent), torch.randn(len(LENGTHS), heads, rope)
    q_new = torch.randn(sum(NEW), heads, sizes.nope + rope)
    new = torch.randn(sum(NEW), latent + rope)

    mine = slice(rank * sizes.heads, (rank + 1) * sizes.heads)
    own_cache, own_table = own_tokens(contexts, sizes, rank, interleave)
    impl = make_impl(sizes, weight[mine])
    manager = dcp.MLADCPManager(
        config, torch.device("cpu"), sizes.heads, latent + rope, latent, torch.float32, torch.float32, None, True, False
    )
    own_lengths = get_dcp_local_seq_lens(torch.tensor(LENGTHS), RANKS, rank, interleave)

    # Decode, as MLAAttention.forward_impl does it.
    query = manager.query_gather(torch.cat((q_latent[:, mine], q_rope[:, mine]), dim=-1))
    decode = SimpleNamespace(block_table=own_table, seq_lens=own_lengths)
    layer = SimpleNamespace(_k_scale=torch.tensor(1.0))
    partial, lse = impl.forward_mqa(query, own_cache, SimpleNamespace(decode=decode, causal=True), layer)
    starts = torch.arange(len(LENGTHS) + 1, dtype=torch.int32)
    output = manager.combine(partial, lse, seq_lens=own_lengths, query_start_loc=starts)
    q = torch.cat((q_latent, q_rope), dim=-1)
    decode_error = 0.0
    for i, context in enumerate(contexts):
        keys = context[:, None].expand(-1, heads, -1)
        expected = reference(q[i : i + 1], keys, keys[..., :latent], impl.scale)[:, mine]
        decode_error = max(decode_error, (output[i : i + 1] - expected).abs().max().item())

    # Prefill of new tokens after these contexts.
    starts = torch.tensor([0, *NEW], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    chunked = build_mla_chunked_context_metadata(
        context_lens_cpu=torch.tensor(LENGTHS, dtype=torch.int32),
        prefill_query_start_loc_cpu=starts,
        chunked_prefill_workspace=torch.empty(96, latent + rope),
        chunked_prefill_workspace_size=64,
        block_size=sizes.block,
        align_chunk_to_block=True,
        device=torch.device("cpu"),
        dcp_world_size=RANKS,
        dcp_local_block_size=interleave,
        dcp_virtual_block_size=interleave * RANKS,
        dcp_manager=manager,
    )
    assert len(chunked.chunks) > 1
    prefill = MLACommonPrefillMetadata(own_table, starts, max(NEW), chunked)
    prefill.prefill_backend = CPUSDPAMLAPrefillBackend(
        sizes.heads, impl.scale, latent, sizes.nope, rope, sizes.v, SimpleNamespace()
    )
    prefill.prefill_backend.prepare_metadata(prefill)
    output = torch.empty(sum(NEW), sizes.heads * sizes.v)
    new_latent, new_rope = new.split([latent, rope], dim=-1)
    metadata = SimpleNamespace(prefill=prefill)
    impl.forward_mha(q_new[:, mine], new_latent, new_rope[:, None], own_cache, metadata, None, output)
    prefill_error = 0.0
    for i, context in enumerate(contexts):
        tokens = slice(int(starts[i]), int(starts[i + 1]))
        everything = torch.cat((context, new[tokens].double()))
        kv = torch.einsum("tl,hdl->thd", everything[:, :latent], weight[mine].double())
        keys = torch.cat((kv[..., : sizes.nope], everything[:, None, latent:].expand(-1, sizes.heads, -1)), dim=-1)
        expected = reference(q_new[tokens, mine], keys, kv[..., sizes.nope :], impl.scale).flatten(1)
        prefill_error = max(prefill_error, (output[tokens] - expected).abs().max().item())
    return decode_error, prefill_error


def own_tokens(
    contexts: list[torch.Tensor], sizes: Sizes, rank: int, interleave: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache with this rank's part of each context, and its block table."""
    parts = [context[torch.arange(len(context)) // interleave % RANKS == rank] for context in contexts]
    cache, table = make_cache(sizes, [len(part) for part in parts], torch.float32)
    for part, row in zip(parts, table, strict=True):
        for j, token in enumerate(part):
            cache[row[j // sizes.block], j % sizes.block] = token
    return cache, table


def make_impl(sizes: Sizes, weight: torch.Tensor) -> gpu.AnySizeTritonMLAImpl:
    """The backend's implementation for one rank's heads; its constructor needs a GPU."""
    impl = gpu.AnySizeTritonMLAImpl.__new__(gpu.AnySizeTritonMLAImpl)
    assert impl.dcp_world_size == RANKS and impl.need_to_return_lse_for_decode and impl.lse_base_on_e
    impl.kv_b_proj = Projection(sizes.latent, sizes.heads * (sizes.nope + sizes.v), bias=False)
    impl.kv_b_proj.weight.data.copy_(weight.flatten(0, 1))
    impl.num_heads, impl.kv_lora_rank, impl.qk_rope_head_dim = sizes.heads, sizes.latent, sizes.rope
    impl.qk_nope_head_dim, impl.v_head_dim, impl.scale = sizes.nope, sizes.v, sizes.v**-0.5
    impl.kv_cache_dtype, impl._sm_count, impl._use_flashinfer_concat_mla_k = "auto", 4, False
    return impl


if __name__ == "__main__":
    main()
