"""vLLM's Triton decode kernel in Triton's interpreter: cases as JSON in the argument, their errors as JSON on stdout.

A process of its own, because TRITON_INTERPRET must be set before Triton is imported.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
import triton
import triton.language
import vllm.triton_utils
from test_backend_cpu import Sizes, cached_tokens, make_cache, reference

from vllm_mla_plugin.backends.gpu import decode_width


def load_kernel() -> ModuleType:
    """vLLM's module of the kernel. Without a GPU, vLLM has put an empty module in Triton's place."""
    path = Path(vllm.__file__).parent / "v1/attention/ops/triton_decode_attention.py"
    spec = importlib.util.spec_from_file_location("interpreted", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with patch.multiple(vllm.triton_utils, triton=triton, tl=triton.language):
        spec.loader.exec_module(module)
    return module


def error(kernel: ModuleType, heads: int, latent: int, rope: int) -> float:
    """Largest error of outputs and log-sum-exps for three sequences whose contexts are cut into two splits."""
    torch.manual_seed(0)
    width, row = decode_width(latent, rope), latent + rope
    lengths, scale, one = [5, 70, 33], row**-0.5, torch.tensor(1.0)
    cache, table = make_cache(Sizes(latent=latent, rope=rope), lengths, torch.float32)
    q = torch.randn(len(lengths), heads, row)
    output, lse = torch.zeros(len(lengths), heads, width), torch.zeros(len(lengths), heads)
    kernel.decode_attention_fwd(
        q,
        cache[:, :, None],
        cache[:, :, None, :width],
        output,
        lse,
        table,
        torch.tensor(lengths, dtype=torch.int32),
        torch.empty(len(lengths), heads, 2, width + 1),
        2,
        scale,
        cache.shape[1],
        k_scale=one,
        v_scale=one,
        is_mla=True,
    )
    worst = 0.0
    for i, length in enumerate(lengths):
        keys = cached_tokens(cache, table[i], length)[:, None].expand(-1, heads, -1)
        expected = reference(q[i : i + 1], keys, keys[..., :latent], scale)
        scores = torch.einsum("hd,khd->hk", q[i].double(), keys) * scale
        worst = max(worst, (output[i : i + 1, :, :latent] - expected).abs().max().item())
        worst = max(worst, (lse[i] - scores.logsumexp(-1)).abs().max().item())
    return worst


if __name__ == "__main__":
    loaded = load_kernel()
    print(json.dumps({str(tuple(case)): error(loaded, *case) for case in json.loads(sys.argv[1])}))
