"""Sources whose weights are quantised, made with vLLM's and compressed-tensors' own functions, which also say what the
stored numbers stand for."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    GroupShape,
    awq_pack,
    gptq_pack,
    pack_cols,
    quantize_weights,
    scaled_dequantize,
)
from vllm.scalar_type import scalar_types

WEIGHTS = "model.safetensors"
Quantised = tuple[dict[str, torch.Tensor], torch.Tensor]
"""The stored tensors of a module, and the weight that they stand for."""


@dataclass(frozen=True)
class Format:
    """A format of quantised checkpoints.

    Attributes:
        config: its ``quantization_config``.
        quantise: makes a module's tensors from a weight ``[rows, columns]``.
    """

    config: dict[str, Any]
    quantise: Callable[[torch.Tensor], Quantised]


def gptq(weight: torch.Tensor, group: int, bits: int, act_order: bool, zero_points: bool, offset: int) -> Quantised:
    columns = weight.shape[1]
    order = torch.randperm(columns) if act_order else torch.arange(columns)
    inverse = order.argsort()
    kind = {(4, False): scalar_types.uint4b8, (8, False): scalar_types.uint8b128, (4, True): scalar_types.uint4}
    # The last group may be short.
    quantised = [
        quantize_weights(rows, kind[bits, zero_points], len(rows), zero_points)
        for rows in weight.T[order].contiguous().split(group)
    ]
    reference, numbers, scales, zeros = zip(*quantised, strict=True)
    zero = torch.cat(zeros) if zero_points else torch.full((len(scales), len(weight)), 1 << (bits - 1))
    packed = gptq_pack(torch.cat(numbers)[inverse].contiguous(), bits, *weight.T.shape)
    stored = (zero - offset) & ((1 << bits) - 1)
    return {
        "qweight": packed,
        "qzeros": pack_cols(stored, bits, *stored.shape),
        "scales": torch.cat(scales),
        "g_idx": (torch.arange(columns) // group)[inverse].int(),
    }, torch.cat(reference)[inverse].T.contiguous()


def awq(weight: torch.Tensor, group: int) -> Quantised:
    columns_first = weight.T.contiguous()
    reference, numbers, scales, zeros = quantize_weights(columns_first, scalar_types.uint4, group, True)
    return {
        "qweight": awq_pack(numbers, 4, *numbers.shape),
        "qzeros": awq_pack(zeros, 4, *zeros.shape),
        "scales": scales,
    }, reference.T.contiguous()


def compressed(weight: torch.Tensor, format: str, scheme: QuantizationScheme) -> Quantised:
    arguments = scheme.weights
    rows, columns = weight.shape
    height, width = {
        "tensor": (rows, columns),
        "channel": (1, columns),
        "group": (1, arguments.group_size),
        "block": arguments.block_structure,
    }[str(arguments.strategy)]
    blocks = weight.unflatten(0, (-1, height)).unflatten(2, (-1, width))
    scale, zero = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), arguments)
    if str(arguments.strategy) == "tensor":
        scale, zero = scale.flatten(), zero.flatten()
    state = {"weight": weight, "weight_scale": scale.to(weight.dtype), "weight_zero_point": zero}
    if arguments.actorder is not None:
        state["weight_g_idx"] = torch.full((columns,), -1, dtype=torch.int32)  # as where no order was chosen
    compressor = BaseCompressor.get_value_from_registry(format)
    stored = compressor.compress(state, scheme)
    return stored, compressor.decompress(stored, scheme)["weight"]


def fp8(weight: torch.Tensor, block: int | None) -> Quantised:
    """vLLM's own FP8: a scale for the tensor, or for blocks of which the last may be cut off."""
    if block is None:
        scale = weight.float().abs().max() / 448
        numbers = (weight.float() / scale).to(torch.float8_e4m3fn)
        return {"weight": numbers, "weight_scale": scale}, scaled_dequantize(numbers, scale, out_dtype=weight.dtype)
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % block, 0, -rows % block))
    scale = padded.unflatten(0, (-1, block)).unflatten(2, (-1, block)).abs().amax((1, 3)) / 448
    wide = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)
    numbers = (padded / wide).to(torch.float8_e4m3fn)
    reference = scaled_dequantize(numbers, scale, GroupShape(block, block), weight.dtype)[:rows, :columns]
    return {"weight": numbers[:rows, :columns].contiguous(), "weight_scale_inv": scale}, reference.contiguous()


def _compressed_format(format: str, weights: dict[str, Any], activations: dict[str, Any] | None = None) -> Format:
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    config = {"quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed"}
    config |= {"ignore": ["lm_head"], "config_groups": {"group_0": scheme}}
    parsed = QuantizationScheme.model_validate(scheme)
    return Format(config, lambda weight: compressed(weight, format, parsed))


def _gptq_format(
    group: int,
    bits: int = 4,
    act_order: bool = False,
    zero_points: bool = False,
    **more: Any,
) -> Format:
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order}
    offset = 0 if more.get("checkpoint_format") == "gptq_v2" else 1
    return Format(
        config | {"sym": not zero_points} | more,
        lambda weight: gptq(weight, group, bits, act_order, zero_points, offset),
    )


INT4, INT8 = ({"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False} for bits in (4, 8))
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
EACH_TOKEN = {"strategy": "token", "dynamic": True, "symmetric": True, "num_bits": 8}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
AWQ = {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm"}
FORMATS = {
    "fp8-tensor": Format(FP8, lambda weight: fp8(weight, None)),
    "fp8-block": Format(FP8 | {"weight_block_size": [40, 40]}, lambda weight: fp8(weight, 40)),
    "fp8-block-128": Format(FP8 | {"weight_block_size": [128, 128]}, lambda weight: fp8(weight, 128)),
    "fp8-channel": _compressed_format(
        "float-quantized", FLOAT8 | {"strategy": "channel"}, EACH_TOKEN | {"type": "float"}
    ),
    "fp8-compressed-block": _compressed_format(
        "float-quantized",
        FLOAT8 | {"strategy": "block", "block_structure": [32, 32]},
        EACH_TOKEN | {"type": "float"},
    ),
    "w8a8-int8": _compressed_format("int-quantized", INT8 | {"strategy": "channel"}, EACH_TOKEN | {"type": "int"}),
    "w4a16": _compressed_format("pack-quantized", INT4 | {"strategy": "group", "group_size": 32}),
    "w4a16-without-order": _compressed_format(
        "pack-quantized", INT4 | {"strategy": "group", "group_size": 32, "actorder": "group"}
    ),
    "w4a16-channel-zero-points": _compressed_format(
        "pack-quantized", INT4 | {"strategy": "channel", "symmetric": False}
    ),
    "w8a16": _compressed_format("pack-quantized", INT8 | {"strategy": "group", "group_size": 16}),
    "gptq": _gptq_format(32),
    "gptq-act-order-short-group": _gptq_format(64, act_order=True),
    "gptq-8-bits": _gptq_format(32, bits=8),
    "gptq-v2-zero-points": _gptq_format(32, zero_points=True, checkpoint_format="gptq_v2"),
    "awq": Format(AWQ | {"group_size": 32}, lambda weight: awq(weight, 32)),
}


def quantise_source(source: Path, name: str, out: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Path, Path]:
    """Quantise the projections of a model.

    Args:
        source: a folder with one safetensors file.
        name: of the format.
        out: folder to make.
        dtype: of scales and of all other weights.

    Returns:
        The quantised model, and its plain twin, whose weights are what the stored numbers stand for.
    """
    torch.manual_seed(0)
    folders = out / "quantised", out / "plain"
    for folder in folders:
        shutil.copytree(source, folder)
    stored: dict[str, torch.Tensor] = {}
    plain = {key: tensor.to(dtype) for key, tensor in load_file(source / WEIGHTS).items()}
    for key, tensor in plain.items():
        if "_proj.weight" not in key:
            stored[key] = tensor
            continue
        parts, plain[key] = FORMATS[name].quantise(tensor)
        stored |= {f"{key.removesuffix('weight')}{part}": value.contiguous() for part, value in parts.items()}
    config = json.loads((source / "config.json").read_text()) | {"dtype": str(dtype).removeprefix("torch.")}
    for folder, tensors, more in zip(
        folders, (stored, plain), ({"quantization_config": FORMATS[name].config}, {}), strict=True
    ):
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config | more))
    return folders
