"""The conversion, start to end. :func:`convert` is the Python API behind ``vllm-mla convert``."""

import resource
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

import vllm_mla_plugin
from mla_converters.budget import CacheBudget
from mla_converters.errors import ConversionError
from mla_converters.families import active_window, window_refusal
from mla_converters.manifest import write_manifest
from mla_converters.method_run import Layers, converted_layers
from mla_converters.options import DTYPES, Method, Options, check_options
from mla_converters.source import Source, open_source
from mla_converters.writer import ShardWriter, output_folder, write_json

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def convert(
    source: str,
    out: Path,
    options: Options,
    *,
    revision: str | None = None,
    force: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Convert a GQA or MHA checkpoint to MLA.

    Args:
        source: a Hugging Face folder, a hub id, or a ``.gguf`` file.
        out: folder to create; appears when it is complete.
        options: method, cache size, calibration.
        revision: of a hub id.
        force: replace ``out``.
        quiet: no progress bars.

    Returns:
        The report: what was converted, sizes, seconds, peak memory.

    Raises:
        ConversionError: the input cannot be converted; nothing is left behind.
    """
    started = time.monotonic()
    check_options(options)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, disable=quiet) as progress,
        open_source(source, revision) as opened,
        output_folder(out, force) as folder,
    ):
        context = _context(opened, options)
        budget, layers, details = converted_layers(opened, options, progress)
        details |= _convert_weights(opened, folder, layers, options, progress)
        _copy_side_files(opened, folder)
        config = _mla_config(opened, budget, context, options, details)
        write_json(folder / "config.json", config)
        write_json(folder / "conversion_report.json", config["mla_conversion"])
        write_manifest(folder)
    return {
        **config["mla_conversion"],
        "out": str(out),
        "seconds": round(time.monotonic() - started, 1),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _context(source: Source, options: Options) -> int:
    """The converted model's context: within it, no sliding window of the source is active."""
    longest = source.config.max_position_embeddings
    if options.max_context is not None and not 1 <= options.max_context <= longest:
        raise ConversionError(f"--max-context is {options.max_context}, but must be 1 to the source's {longest}.")
    context = options.max_context or longest
    window = active_window(source.config)
    if window is not None and context > window:
        raise ConversionError(window_refusal(window))
    return context


def _convert_weights(
    source: Source, folder: Path, layers: Layers, options: Options, progress: Progress
) -> dict[str, Any]:
    """Write all weights; return what the report says of them."""
    dtype = DTYPES[options.dtype] if options.dtype else source.dtype()
    writer = ShardWriter(folder)
    for name in source.names():
        if not name.startswith("model.layers."):
            writer.add(name, source.tensor(name).to(dtype))
    count = source.config.num_hidden_layers
    for index, converted in enumerate(progress.track(layers, total=count, description="Converting")):
        _write_layer(writer, source, index, converted, dtype)
    writer.finish()
    return {"dtype": str(dtype).removeprefix("torch."), "weights_bytes": writer.total_bytes}


def _write_layer(
    writer: ShardWriter, source: Source, index: int, converted: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """Write one layer: the converted projections, and everything else of the layer as it is."""
    prefix = f"model.layers.{index}."
    for name, tensor in converted.items():
        # Rounded to 16 bits, a frequency is off by whole turns after a few hundred tokens.
        writer.add(f"{prefix}self_attn.{name}", tensor.to(torch.float32 if name == "rope_freqs" else dtype))
    for name in source.layer_names(index):
        replaced = name.removeprefix("self_attn.") in converted
        if not replaced and not any(name.startswith(f"self_attn.{projection}.") for projection in PROJECTIONS):
            writer.add(prefix + name, source.layer_tensor(index, name).to(dtype))


def _copy_side_files(source: Source, folder: Path) -> None:
    for path in source.side_files():
        if not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def _mla_config(
    source: Source, budget: CacheBudget, context: int, options: Options, details: dict[str, Any]
) -> dict[str, Any]:
    """``config.json`` of the converted model; its block ``mla_conversion`` is the report."""
    head_dim = source.head_dim
    cached, width = 2 * source.config.num_key_value_heads * head_dim, float(budget.width)
    sizes: dict[str, list[int]] = {
        name: details[name] for name in ("kv_lora_ranks", "qk_rope_head_dims") if name in details
    }
    if sizes:
        width = sum(map(sum, sizes.values())) / source.config.num_hidden_layers
    config: dict[str, Any] = {name: value for name, value in source.raw_config.items() if not name.startswith("_")}
    for stale in ("torch_dtype", "layer_types", "max_window_layers"):  # dtype's older name; sliding windows
        config.pop(stale, None)
    config |= {
        "architectures": [source.family.mla_architecture],
        "model_type": source.family.mla_model_type,
        "dtype": details["dtype"],
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "sliding_window": None,
        "use_sliding_window": False,
        "kv_lora_rank": budget.kv_lora_rank,
        "q_lora_rank": None,
        "qk_rope_head_dim": budget.qk_rope_head_dim,
        "qk_nope_head_dim": 0 if options.method == Method.EXACT else head_dim,
        "v_head_dim": head_dim,
        "softmax_scale": source.softmax_scale,
        **sizes,
        "mla_conversion": {
            "method": options.method.value,
            "source": source.name,
            "revision": source.revision,
            "kv_lora_rank": budget.kv_lora_rank,
            "qk_rope_head_dim": budget.qk_rope_head_dim,
            "cached_per_token_and_layer": {"source": cached, "mla": round(width, 3) if width % 1 else int(width)},
            "cache_ratio": round(width / cached, 6),
            "layers": source.config.num_hidden_layers,
            "versions": {
                "vllm-mla-plugin": vllm_mla_plugin.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            **details,
        },
    }
    return config
