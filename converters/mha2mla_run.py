"""Method ``mha2mla`` over a whole model: measuring pairs if the choice needs it, and converting layer by layer."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat

import torch

from mla_converters.budget import CacheBudget
from mla_converters.latent_map import LatentMap, mla_weights
from mla_converters.layers import BATCH, SourceLayer, calibration_autocast, embed, source_layers
from mla_converters.methods.mha2mla import Keep, PairNorms, Svd, kept_pairs, latent_bias, mha2mla_map
from mla_converters.source import Source


@dataclass(frozen=True)
class Mha2mlaOptions:
    """How the method is run; the defaults are the paper's.

    Attributes:
        keep: which pairs keep RoPE.
        svd: one latent for keys and values, or one each.
    """

    keep: Keep = Keep.TWO_NORM
    svd: Svd = Svd.JOINT

    @property
    def calibrated(self) -> bool:
        """Whether calibration text is needed."""
        return self.keep == Keep.TWO_NORM


@torch.inference_mode()
def pair_contributions(layer: SourceLayer, hidden: torch.Tensor) -> torch.Tensor:
    """``[g, d / 2]`` contributions of a layer's pairs on its inputs ``[windows, tokens, D]``."""
    norms = PairNorms(layer.heads, layer.kv_heads, layer.head_dim)
    for batch in hidden.split(BATCH):
        with calibration_autocast(layer.device):
            q, k, _ = layer.project(layer.normed(batch))
        norms.add(q, k)
    return norms.contributions()


def _contributions(source: Source, windows: torch.Tensor, device: str) -> Iterator[torch.Tensor]:
    """Every layer's contributions, measured in the source."""
    hidden = embed(source, windows)
    for layer in source_layers(source, device):
        yield pair_contributions(layer, hidden)
        layer.advance(hidden, layer.attend)


def layer_weights(weights: dict[str, torch.Tensor], maps: LatentMap) -> dict[str, torch.Tensor]:
    """Fold a map into one layer's projections, see :func:`mla_weights`; biases of the values as :func:`latent_bias`."""
    converted = mla_weights(weights, maps)
    if "v_proj.bias" in weights:
        bias = latent_bias(maps, weights["v_proj.bias"])
        converted["kv_a_proj_with_mqa.bias"][: len(bias)] = bias
    return converted


def mha2mla_layers(
    source: Source, windows: torch.Tensor | None, budget: CacheBudget, options: Mha2mlaOptions, device: str
) -> Iterator[dict[str, torch.Tensor]]:
    """Every layer's converted projections.

    Args:
        source: the model.
        windows: ``[windows, tokens]`` token ids; None if ``options`` need no calibration.
        budget: sizes.
        options: the choices that the paper compares.
        device: where layers run for calibration.

    Raises:
        ConversionError: see :func:`mla_converters.methods.mha2mla.check_sizes`.
        ValueError: ``2-norm`` without windows.
    """
    kv_heads, head_dim = source.config.num_key_value_heads, source.head_dim
    freqs, _ = source.rope
    contributions: Iterable[torch.Tensor | None] = repeat(None)
    if options.calibrated and windows is not None:
        contributions = _contributions(source, windows, device)
    for index, measured in zip(range(source.config.num_hidden_layers), contributions, strict=False):
        weights = source.attention_weights(index)
        kept = kept_pairs(options.keep, budget.qk_rope_head_dim // 2, kv_heads, head_dim, measured)
        k, v = weights["k_proj.weight"], weights["v_proj.weight"]
        yield layer_weights(weights, mha2mla_map(k, v, freqs, kept, budget.kv_lora_rank, options.svd))
