"""What can be done without a conversion: the source's own GQA cache in fewer bits, simulated in transformers.

Each rival is an attention function of transformers. Keys are quantised after RoPE, as caches hold them, and every token
is attended as it is cached: the newest too, and each token of a prompt as if it were decoded. All is computed in
float32.

- ``fp8``, ``int4_per_token_head`` and ``turboquant_*`` are formats of vLLM 0.32's ``--kv-cache-dtype``. The bytes are
  those that vLLM allocates. With ``turboquant_*``, vLLM attends the tokens of a prompt's first chunk before it
  quantises them; here they count as decoded ones.
- ``kivi`` (Liu et al. 2024) quantises keys by channel and values by token, in groups of 32. It also keeps recent tokens
  in 16 bits: values of the last 128, and keys since the last multiple of 128. Rows without these show what long texts
  come down to. A group of keys is then quantised together with tokens that follow, which a decoder could not do.
- ``hadamard`` continues ``int4_per_token_head`` below 4 bits, which vLLM does not offer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig

from benchmarks.quantisers import (
    Quantiser,
    by_channel,
    fp8,
    hadamard_uniform,
    lloyd_max,
    per_token_head,
    uniform,
)
from mla_converters.checkpoints.families import source_head_dim
from mla_converters.checkpoints.models import Model, read_config
from mla_converters.evaluation.hf_engine import hf_scores
from mla_converters.options import TextProtocol
from mla_converters.text.read import read_text
from mla_converters.text.scoring import shared_windows

GROUP = 32  # KIVI's
RECENT = 128  # KIVI's
BOUNDARY = 2  # vLLM leaves so many layers at each end in 16 bits, where a turboquant format is asked for
QUERIES = 256  # for which scores exist at the same time


@dataclass(frozen=True)
class Rival:
    """A way to keep the source's cache in fewer bits.

    Attributes:
        keys, values: what they become.
        head_bytes: bytes of a token's key and value in one KV head, by head size.
        recent: tokens that stay in 16 bits, as in KIVI.
        boundary: layers at each end of the model that stay in 16 bits.
    """

    keys: Quantiser
    values: Quantiser
    head_bytes: Callable[[int], float]
    recent: int = 0
    boundary: int = 0

    def share(self, config: PretrainedConfig, tokens: int) -> float:
        """Bytes of a sequence of so many tokens, as a share of a 16-bit cache."""
        head_dim, layers = source_head_dim(config), config.num_hidden_layers
        packed = self.head_bytes(head_dim) / (4 * head_dim)
        # Of values, the last tokens are whole; of keys, half as many on average.
        whole = min(1.0, 0.75 * self.recent / tokens)
        packed = whole + (1 - whole) * packed
        ends = 2 * self.boundary / layers
        return ends + (1 - ends) * packed

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend causally; an attention function as transformers calls it.

        Args:
            module: the layer's attention.
            query: ``[batch, heads, tokens, head_dim]``.
            key, value: ``[batch, kv_heads, tokens, head_dim]``.
            attention_mask: None, because windows have no padding.
            kwargs: ``scaling`` of the scores, among others.

        Returns:
            ``[batch, tokens, heads, head_dim]``, and no weights.
        """
        assert attention_mask is None and query.shape[2] == key.shape[2], "only whole windows are simulated"
        layers: int = module.config.num_hidden_layers  # type: ignore[union-attr, assignment]
        if not self.boundary <= module.layer_idx < layers - self.boundary:  # type: ignore[operator]
            return sdpa_attention_forward(module, query, key, value, None, **kwargs)
        if self.recent:
            return self._attend_recent(query, key, value, kwargs["scaling"]), None
        return sdpa_attention_forward(module, query, self.keys(key), self.values(value), None, **kwargs)

    def _attend_recent(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """As :meth:`attend`, with recent tokens as they are: of values the last ``recent`` before the query's own, of
        keys those since the last multiple of ``recent``."""
        groups = query.shape[1] // key.shape[1]
        pairs = ((key, self.keys(key)), (value, self.values(value)))
        (key, old_key), (value, old_value) = ((x.repeat_interleave(groups, 1) for x in pair) for pair in pairs)
        tokens = torch.arange(query.shape[2])
        outputs = []
        for part, rows in zip(query.split(QUERIES, dim=2), tokens.split(QUERIES), strict=True):
            own = rows[:, None]
            scores = torch.where(
                tokens >= own // self.recent * self.recent,
                part @ key.transpose(-1, -2),
                part @ old_key.transpose(-1, -2),
            )
            weights = (scores * scaling).masked_fill(tokens > own, -math.inf).softmax(-1)
            old = tokens < own - self.recent
            outputs.append((weights * ~old) @ value + (weights * old) @ old_value)
        return torch.cat(outputs, dim=2).transpose(1, 2)


def _per_token_head(bits: int) -> Rival:
    quantiser = partial(per_token_head, bits=bits)
    return Rival(quantiser, quantiser, lambda head_dim: 2 * (head_dim * bits / 8 + 4))


def _turboquant(name: str) -> Rival:
    preset = TurboQuantConfig.from_cache_dtype(name, head_dim=64)
    return Rival(
        partial(lloyd_max, bits=preset.key_mse_bits),
        lambda value: uniform(value, preset.effective_value_quant_bits, value.shape[-1]),
        lambda head_dim: TurboQuantConfig.from_cache_dtype(name, head_dim).slot_size_aligned,
        boundary=BOUNDARY,
    )


def _grouped_bytes(bits: int) -> Callable[[int], float]:
    """A minimum and a step in float16 for each group."""
    return lambda head_dim: 2 * head_dim * (bits / 8 + 4 / GROUP)


def _kivi(bits: int, recent: int = 0) -> Rival:
    keys, values = partial(by_channel, bits=bits, group=GROUP), partial(uniform, bits=bits, group=GROUP)
    return Rival(keys, values, _grouped_bytes(bits), recent)


def _hadamard_groups(bits: int) -> Rival:
    quantiser = partial(hadamard_uniform, bits=bits, group=GROUP)
    return Rival(quantiser, quantiser, _grouped_bytes(bits))


RIVALS = {
    "fp8": Rival(fp8, fp8, lambda head_dim: 2 * head_dim),
    "int4_per_token_head": _per_token_head(4),
    "turboquant_4bit_nc": _turboquant("turboquant_4bit_nc"),
    "turboquant_3bit_nc": _turboquant("turboquant_3bit_nc"),
    "kivi 4 bits": _kivi(4),
    "kivi 4 bits, recent in 16": _kivi(4, RECENT),
    "kivi 2 bits": _kivi(2),
    "kivi 2 bits, recent in 16": _kivi(2, RECENT),
    "hadamard 3 bits": _per_token_head(3),
    "hadamard 2 bits, groups of 32": _hadamard_groups(2),
}


def perplexity(source: Path, rival: Rival, text: Path, windows: int, length: int) -> float:
    """Perplexity of the source with a rival's cache, in float32, on the first windows of a text.

    Args:
        source: folder of the model.
        rival: its cache.
        text: UTF-8 file.
        windows: how many.
        length: tokens in each.
    """
    AttentionInterface.register("rival", rival.attend)
    config = read_config(source, trust_remote_code=False)
    config._attn_implementation = "rival"
    model = Model(source.name, str(source), config)
    ids = shared_windows(read_text(text, None, TextProtocol.STREAM), [model], windows, length).ids
    ((scores, _),) = hf_scores([model], None, ids, torch.float32, "cpu", lambda _: None)
    return math.exp(scores.loss)
