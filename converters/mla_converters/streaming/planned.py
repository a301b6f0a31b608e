"""The tensors of a converted checkpoint: which they are, known from shapes alone, and writing them layer by layer."""

from math import isnan

import torch
from rich.progress import Progress

from mla_converters.checkpoints.source import Source
from mla_converters.checkpoints.writer import Shards
from mla_converters.latent.cache_size import CacheBudget
from mla_converters.latent.maps import LatentMap, mla_weights
from mla_converters.methods.base import ConvertedLayer, Measured
from mla_converters.methods.registry import Prepared
from mla_converters.resume.layer_pass import Record, Streams

LAYERS = "model.layers."
FREQS = "rope_freqs"
MEASURES = 2  # numbers of a :class:`Measured`


def planned_tensors(
    source: Source, budgets: list[CacheBudget], nope_dim: int, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Every tensor of the converted checkpoint, on the meta device.

    Args:
        source: the model.
        budgets: sizes of each layer.
        nope_dim: ``qk_nope_head_dim``.
        dtype: of the written weights; None keeps the dtype of each, and gives converted projections that of the
            projections that they are made of.
    """
    tensors = {name: source.meta(name) for name in source.names() if not name.startswith(LAYERS)}
    for index, budget in enumerate(budgets):
        attention = {name: source.meta(f"{LAYERS}{index}.self_attn.{name}") for name in source.attention_names(index)}
        maps = _meta_map(source.config.num_key_value_heads, source.head_dim, nope_dim, budget)
        converted = mla_weights(attention, maps)
        for name, tensor in converted.items():
            tensors[f"{LAYERS}{index}.self_attn.{name}"] = tensor.to(_converted_dtype(name, attention))
        for name in source.other_names(index):
            tensors[f"{LAYERS}{index}.{name}"] = source.meta(f"{LAYERS}{index}.{name}")
    if dtype is None:
        return tensors
    return {name: tensor if name.endswith(FREQS) else tensor.to(dtype) for name, tensor in tensors.items()}


def _meta_map(kv_heads: int, head_dim: int, nope_dim: int, budget: CacheBudget) -> LatentMap:
    width, rope, latent = kv_heads * head_dim, budget.qk_rope_head_dim, budget.kv_lora_rank
    with torch.device("meta"):
        return LatentMap(
            rope_freqs=torch.empty(rope // 2),
            key_to_rope=torch.empty(rope, width, dtype=torch.float64),
            query_to_rope=torch.empty(kv_heads, rope, head_dim, dtype=torch.float64),
            query_to_nope=torch.empty(kv_heads, nope_dim, head_dim, dtype=torch.float64),
            kv_to_latent=torch.empty(latent, 2 * width, dtype=torch.float64),
            latent_to_key=torch.empty(kv_heads, nope_dim, latent, dtype=torch.float64),
            latent_to_value=torch.empty(kv_heads, head_dim, latent, dtype=torch.float64),
        )


def _converted_dtype(name: str, attention: dict[str, torch.Tensor]) -> torch.dtype:
    """Of a converted tensor, by those of the source's attention."""
    if name == FREQS:
        return torch.float32  # rounded to 16 bits, a frequency is off by whole turns after a few hundred tokens
    if name in attention:
        return attention[name].dtype
    return torch.promote_types(attention["k_proj.weight"].dtype, attention["v_proj.weight"].dtype)


def write_weights(
    source: Source, prepared: Prepared, shards: Shards, record: Record, device: str, progress: Progress
) -> list[Measured]:
    """Convert all layers and write all tensors; what an earlier run has written stays.

    Args:
        source: the model.
        prepared: the conversion.
        shards: where tensors go.
        record: of the layers that are done.
        device: where layers run.
        progress: for the bar.

    Returns:
        What was measured of each layer; nothing without calibration.

    Raises:
        OSError: the disk is full.
    """
    if shards.allocate():
        record.forget()
    for name in source.names():
        if not name.startswith(LAYERS):
            shards.write(name, source.tensor(name))
    count = source.config.num_hidden_layers

    def start() -> Streams:
        return prepared.conversion.start() | {"measured": torch.full((count, MEASURES), torch.nan, dtype=torch.float64)}

    streams = record.begin(start)
    for index in range(record.done):
        shards.written_before(f"{LAYERS}{index}.")
    for layer in record.layers(source, device, progress, "Converting"):
        converted = prepared.conversion.convert(layer, streams)
        _write_layer(shards, source, layer.index, converted)
        if converted.measured is not None:
            row = converted.measured
            streams["measured"][layer.index] = torch.tensor((row.energy_kept, row.output_error), dtype=torch.float64)
    shards.finish()
    return [Measured(*row) for row in streams["measured"].tolist() if not any(map(isnan, row))]


def _write_layer(shards: Shards, source: Source, index: int, converted: ConvertedLayer) -> None:
    for name, tensor in converted.weights.items():
        shards.write(f"{LAYERS}{index}.self_attn.{name}", tensor)
    for name in source.other_names(index):
        shards.write(f"{LAYERS}{index}.{name}", source.layer_tensor(index, name))
