"""Which attention trains faster on this GPU: torch's on padded keys and values, or xFormers' on unequal widths?

    python -m benchmarks.xformers_attention

One MLA attention layer of a model with 8 billion parameters, forward and backward in bfloat16, by window length.
Writes ``results/xformers_attention.json``.
"""

import json
import sys
from importlib.util import find_spec

import torch

from benchmarks.common import plain_parser, write_result
from vllm_mla_plugin.checkpoint.config import LlamaMLAConfig
from vllm_mla_plugin.hf.attention import MLASelfAttention

HIDDEN, HEADS, HEAD_DIM, LATENT, ROPE = 4096, 32, 128, 512, 64
LENGTHS = (1024, 2048, 4096, 8192)
TOKENS = 8192  # in a step
REPEATS = 10


def milliseconds(name: str, length: int) -> float:
    """Time of one step, the median of some."""
    config = LlamaMLAConfig(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
        kv_lora_rank=LATENT,
        qk_rope_head_dim=ROPE,
        qk_nope_head_dim=HEAD_DIM,
        v_head_dim=HEAD_DIM,
    )
    config._attn_implementation = name
    layer = MLASelfAttention(config, 0).to("cuda", torch.bfloat16)
    hidden = torch.randn(TOKENS // length, length, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    positions = torch.arange(length, device="cuda")[None]
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        layer(hidden, positions)[0].sum().backward()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return round(sorted(times)[REPEATS // 2], 3)


def main() -> None:
    """Measure all lengths."""
    plain_parser(__doc__).parse_args()
    if not torch.cuda.is_available() or find_spec("xformers") is None:
        sys.exit("This benchmark needs a GPU and the package xformers.")
    rows = {str(length): {name: milliseconds(name, length) for name in ("sdpa", "xformers")} for length in LENGTHS}
    print(json.dumps(rows, indent=2))
    write_result("xformers_attention", "python -m benchmarks.xformers_attention", {"milliseconds": rows})


if __name__ == "__main__":
    main()
