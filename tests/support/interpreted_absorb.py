"""Runs this plugin's Triton kernel that absorbs and rotates queries in Triton's interpreter.

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

from vllm_mla_plugin.backends.gpu_absorb import absorb
from vllm_mla_plugin.testing.layer import absorbed, absorption


def error(heads: int, own: int, latent: int, rope: int, rows: int) -> float:
    """Largest error relative to the largest number."""
    torch.manual_seed(0)
    case = absorption(heads, own, latent, rope, rows, torch.float32)
    expected = absorbed(*case)
    return ((absorb(*case) - expected).abs().max() / expected.abs().max()).item()


if __name__ == "__main__":
    print(json.dumps({str(tuple(case)): error(*case) for case in json.loads(sys.argv[1])}))
