"""Runs this plugin's Triton decode kernel in Triton's interpreter.

The argument holds cases as JSON; their errors are printed as JSON. This runs in a process of its own, because
TRITON_INTERPRET must be set before Triton is imported.
"""

import json
import sys

import torch
import triton
import triton.language
import vllm.triton_utils

# Without a GPU, vLLM has put an empty module in Triton's place.
vllm.triton_utils.triton, vllm.triton_utils.tl = triton, triton.language

from support.packed_attention import projection_error
from vllm.platforms import current_platform

from vllm_mla_plugin.backends.gpu_decode import decode
from vllm_mla_plugin.checkpoint.layouts import suited_tiles
from vllm_mla_plugin.testing.layer import Sizes, cached_tokens, make_cache, reference

type(current_platform).num_compute_units = classmethod(lambda cls, device_id=0: UNITS)

UNITS = 200  # so many that some cases share a head's output between programs
LENGTHS = [5, 170, 97]
PARTS = 3
GPU = 232448  # bytes of shared memory
FILLING = 1  # rows without tokens at the end, as in CUDA graphs


def error(heads: int, latent: int, rope: int, queries: int, causal: bool) -> float:
    """Largest error of outputs and log-sum-exps, if each request asks with its ``queries`` newest tokens."""
    torch.manual_seed(0)
    row = latent + rope
    scale = row**-0.5
    cache, table = make_cache(Sizes(latent=latent, rope=rope), [*LENGTHS, FILLING], torch.float32)
    rows = (len(LENGTHS) + FILLING) * queries
    # The rotary part is a slice of the projection's result, as when vLLM hands it over.
    q_latent, q_rope = torch.randn(rows, heads, latent), torch.randn(rows, heads, 3 + rope)[..., 3:]
    parts = decode(
        q_latent,
        q_rope,
        cache,
        table,
        torch.tensor([*LENGTHS, 0], dtype=torch.int32),
        torch.full((rows, heads, PARTS, latent + 1), float("nan")),
        torch.tensor(1.0),
        scale=scale,
        causal=causal,
        tiles=suited_tiles(latent, rope, heads, False, GPU),
    )
    output, lse = parts.merge()
    worst = output[-queries:].abs().max().item()
    if heads == 1 or latent in (100, 500):  # the interpreter is slow
        worst = max(worst, projection_error(parts, output))
    q = torch.cat((q_latent, q_rope), dim=-1)
    for i in range(len(LENGTHS) * queries):
        request, token = divmod(i, queries)
        length = LENGTHS[request] - (queries - 1 - token if causal else 0)
        keys = cached_tokens(cache, table[request], length)[:, None].expand(-1, heads, -1)
        expected = reference(q[i : i + 1], keys, keys[..., :latent], scale)
        scores = torch.einsum("hd,khd->hk", q[i].double(), keys) * scale
        worst = max(worst, (output[i : i + 1] - expected).abs().max().item())
        worst = max(worst, (lse[i] - scores.logsumexp(-1)).abs().max().item())
    return worst


if __name__ == "__main__":
    print(json.dumps({str(tuple(case)): error(*case) for case in json.loads(sys.argv[1])}))
