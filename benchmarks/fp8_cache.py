"""Measures how much perplexity an 8-bit latent cache costs: every cached number is rounded to fp8 (e4m3, scale 1).

    python -m benchmarks.fp8_cache --test wiki.test.raw MODEL...

Runs converted checkpoints in transformers, in float32, on the first 8 windows of 1,024 tokens of the text: with the
cache as it is, with latents rounded, and with latents and rotary keys rounded. Then it multiplies each latent component
by a random factor between 10 ** -4 and 10 ** 4, which the up-projection takes back, and rounds latents again: the model
is the same, but nobody chose the scale of its latents.
"""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import vllm_mla_plugin.hf  # noqa: F401 - registers the MLA models
from benchmarks.common import plain_parser, write_result


def rounded(x: torch.Tensor) -> torch.Tensor:
    """``x`` rounded to e4m3, saturated."""
    limit = torch.finfo(torch.float8_e4m3fn).max
    return x.clamp(-limit, limit).to(torch.float8_e4m3fn).to(x.dtype)


class Fp8Latents(DynamicCache):
    """Returns latents rounded, and rotary keys as they are."""

    def update(self, latent: torch.Tensor, k_rope: torch.Tensor, *args: Any, **kwargs: Any) -> tuple:
        return super().update(rounded(latent), k_rope, *args, **kwargs)


class Fp8Cache(DynamicCache):
    """Returns latents and rotary keys rounded, as vLLM's fp8 KV cache does."""

    def update(self, latent: torch.Tensor, k_rope: torch.Tensor, *args: Any, **kwargs: Any) -> tuple:
        return super().update(rounded(latent), rounded(k_rope), *args, **kwargs)


@torch.inference_mode()
def perplexity(model: torch.nn.Module, windows: torch.Tensor, cache: type[DynamicCache]) -> float:
    """``exp`` of the mean next-token loss of windows ``[windows, tokens]``."""
    loss = 0.0
    for window in windows.split(1):
        logits = model(window, past_key_values=cache(), use_cache=True).logits[0, :-1]
        loss += F.cross_entropy(logits, window[0, 1:], reduction="sum").item()
    return math.exp(loss / windows[:, 1:].numel())


@torch.inference_mode()
def scramble(model: torch.nn.Module) -> None:
    """Scale every latent component by a random factor, without changing the model's function."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        attention = layer.self_attn
        scale = 10 ** (8 * torch.rand(attention.latent_dim, generator=generator) - 4)
        attention.kv_a_proj_with_mqa.weight[: attention.latent_dim] *= scale[:, None]
        attention.kv_b_proj.weight /= scale


def main() -> None:
    """Measure, print, and write the result file."""
    parser = plain_parser(__doc__)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="converted checkpoints")
    parser.add_argument("--test", type=Path, required=True, help="text to score")
    arguments = parser.parse_args()
    rows = []
    for folder in arguments.models:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ids = AutoTokenizer.from_pretrained(folder)(arguments.test.read_text(), return_tensors="pt").input_ids
        windows = ids[0, : 8 * 1024].view(8, 1024)
        row: dict[str, Any] = {"model": folder.name, "method": model.config.mla_conversion["method"]}
        row["float32"] = perplexity(model, windows, DynamicCache)
        row["fp8_latents"] = perplexity(model, windows, Fp8Latents)
        row["fp8"] = perplexity(model, windows, Fp8Cache)
        scramble(model)
        row["fp8_latents_scale_not_chosen"] = perplexity(model, windows, Fp8Latents)
        row |= {f"cost_of_{name}": row[name] / row["float32"] - 1 for name in ("fp8_latents", "fp8")}
        rows.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
        print(rows[-1], flush=True)
    names = " ".join(model.name for model in arguments.models)
    write_result("fp8_cache", f"python -m benchmarks.fp8_cache --test wiki.test.raw {names}", {"rows": rows})


if __name__ == "__main__":
    main()
