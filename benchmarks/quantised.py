"""Does a quantised source convert as well, and in as little memory, as its plain twin?

    python -m benchmarks.quantised --valid wiki.valid.tokens --test wiki.test.raw --folder /scratch [--model MODEL]

- Quality: the model's projections (SmolLM2's, unless another folder or GGUF file is named) are rounded to 4 bits in
  groups of 32 (W4A16 of compressed-tensors). Both models are converted to half of their cache, and each conversion's
  perplexity is divided by that of its own source.
- Memory: a model of Llama-3-8B's shape with ``--layers`` layers, and its twin in FP8 with blocks of 128 x 128. The
  folder needs 3 GB and 1.4 GB for each layer.

Rows that are in the result file already are kept.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from benchmarks.common import convert, cost, evaluate, measured_rows, plain_text, text_parser, write_result
from benchmarks.large import COMMON, SIZES, SMALL, write_source
from mla_converters.checkpoints.source import open_source
from scripts.demo_model import ROOT, demo_folder

GROUP, BLOCK = 32, 128
TOKENS = "16384"
ENDS = [-8 + step / 4 for step in range(9)]  # what a group's largest number may become
W4A16 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP},
        }
    },
}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
Quantise = Callable[[torch.Tensor], dict[str, torch.Tensor]]


def four_bits(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A weight in groups of 4 bits, each with the scale of the least squared error."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best, scale = torch.full_like(largest, torch.inf), torch.ones_like(largest)
    for end in ENDS:
        tried = (largest / end).to(torch.bfloat16).float()
        error = (_rounded(groups, tried) * tried - groups).square().sum(-1, keepdim=True)
        scale = torch.where(error < best, tried, scale)
        best = torch.minimum(error, best)
    numbers = _rounded(groups, scale).flatten(1).to(torch.int8)
    return {
        "weight_packed": pack_to_int32(numbers, 4),
        "weight_scale": scale[..., 0].to(torch.bfloat16),
        "weight_shape": torch.tensor(weight.shape),
    }


def _rounded(groups: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (groups / torch.where(scale == 0, 1, scale)).round().clamp(-8, 7)


def eight_bit_floats(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A weight in FP8 with blocks."""
    blocks = weight.float().unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    scale = blocks.abs().amax((1, 3), keepdim=True) / 448
    numbers = (blocks / scale).flatten(2).flatten(0, 1).to(torch.float8_e4m3fn)
    return {"weight": numbers, "weight_scale_inv": scale[:, 0, :, 0]}


def quantise(source: Path, folder: Path, settings: dict[str, Any], how: Quantise) -> Path:
    """Copy a model's folder, with its projections quantised."""
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            tensors: dict[str, torch.Tensor] = {}
            for name, tensor in load_file(path).items():
                if name.endswith("_proj.weight"):
                    tensors |= {f"{name.removesuffix('weight')}{part}": x for part, x in how(tensor).items()}
                else:
                    tensors[name] = tensor.to(torch.bfloat16)
            save_file(tensors, folder / path.name, metadata={"format": "pt"})
        elif path.is_file() and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": settings, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def quality(source: Path, out: Path, text: Path, test: Path) -> dict[str, Any]:
    """A source and its conversion to half of the cache."""
    options = ("--calibration", str(text), "--calibration-tokens", TOKENS, "--refit-steps", "0")
    convert(source, out, *options, "--cache-ratio", "0.5", "--latent-bits", "16")
    before, after = (evaluate(model, test)["perplexity"] for model in (source, out))
    return {
        "source_perplexity": round(before, 3),
        "perplexity": round(after, 3),
        "growth": round(after / before, 4),
    }


def memory(source: Path, out: Path) -> dict[str, Any]:
    """Time and peak memory of a conversion."""
    text = ("--calibration", str(ROOT / "LICENSE"), "--calibration-tokens", "4096")
    return cost(convert(source, out, "--method", "transmla", "--freqfold", "8", *SIZES, *text))


def main() -> None:
    """Measure, and write the result file."""
    parser = text_parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for models, which stay in it")
    parser.add_argument("--layers", type=int, default=4, help="of the model whose memory is measured; the whole has 32")
    parser.add_argument("--model", type=Path, help="whose quality is measured, in place of SmolLM2's")
    arguments = parser.parse_args()
    folder, rows = arguments.folder, measured_rows("quantised")
    folder.mkdir(exist_ok=True)
    text = folder / "text.txt"
    text.write_text(plain_text(arguments.valid))

    def large() -> Path:
        path = folder / f"{arguments.layers}-layers"
        if not path.exists():
            write_source(path, LlamaConfig(**COMMON | SMALL | {"num_hidden_layers": arguments.layers}))
        return path

    def twin(path: Path, settings: dict[str, Any], how: Quantise) -> Path:
        copy = folder / f"{path.name}-{settings['quant_method']}"
        return copy if copy.exists() else quantise(path, copy, settings, how)

    def model() -> Path:
        if not arguments.model:
            return demo_folder()
        path = folder / arguments.model.stem
        if not path.exists():
            with open_source(str(arguments.model)) as source:
                source.write_folder(path)
        return path

    layers = f"memory of {arguments.layers} layers"
    named = f"quality of {arguments.model.stem}" if arguments.model else "quality"
    measurements: dict[str, Callable[[], dict[str, Any]]] = {
        f"{layers}, bfloat16": lambda: memory(large(), folder / "mla"),
        f"{layers}, fp8": lambda: memory(twin(large(), FP8, eight_bit_floats), folder / "mla"),
        f"{named}, plain": lambda: quality(model(), folder / "mla", text, arguments.test),
        f"{named}, w4a16": lambda: quality(twin(model(), W4A16, four_bits), folder / "mla", text, arguments.test),
    }
    command = "python -m benchmarks.quantised --valid wiki.valid.tokens --test wiki.test.raw --folder /scratch"
    if arguments.layers != parser.get_default("layers"):
        command += f" --layers {arguments.layers}"
    if arguments.model:
        command += f" --model {arguments.model.name}"
    for name, measure in measurements.items():
        if name not in rows:
            rows[name] = measure()
            print(name, rows[name], flush=True)
            write_result("quantised", command, {"rows": rows})


if __name__ == "__main__":
    main()
