"""Saying what a folder is that is no checkpoint to convert, and what to do with it."""

import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mla_converters.errors import ConversionError

ADAPTER = "adapter_config.json"
OTHER_FORMATS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("params.json", "consolidated*.pth"),
        "a model in Meta's own format (params.json and pickles, which are never loaded): give the same model in "
        "Hugging Face's format, with config.json and model.safetensors",
    ),
    (
        ("params.json",),
        "a model in Mistral's own format (params.json, consolidated.safetensors): give the same model in Hugging "
        "Face's format, with config.json and model.safetensors",
    ),
    (("*.gguf",), "GGUF files: give the path of the one to convert"),
    (("model_index.json",), "a diffusion pipeline, which is no language model: there is nothing to convert"),
    (("*.onnx",), "a model in ONNX format: convert the safetensors model that it was exported from"),
    (("onnx/*.onnx",), "a model in ONNX format: convert the safetensors model that it was exported from"),
    (("openvino_model.xml",), "a model in OpenVINO's format: convert the safetensors model that it was exported from"),
    (("*.engine",), "a TensorRT engine: convert the safetensors model that it was built from"),
    (("*.mlpackage/*",), "a model in Core ML's format: convert the safetensors model that it was exported from"),
    (("*.tflite",), "a model in TensorFlow Lite's format: convert the safetensors model that it was exported from"),
    (("tf_model.h5",), "TensorFlow weights: load them in transformers and save the model with safetensors first"),
    (("flax_model*.msgpack",), "Flax weights: load them in transformers and save the model with safetensors first"),
    (("*.nemo",), "a model in NeMo's format: export it to Hugging Face's format first"),
    (("*.distcp",), "a distributed checkpoint of a training run: save the model with safetensors first"),
    (("zero_to_fp32.py",), "a DeepSpeed checkpoint: run its zero_to_fp32.py, and save the model with safetensors"),
    (("*.bin",), "only pickle files (.bin), which are never loaded: save the model with safetensors first"),
    (("*.pt",), "only pickle files (.pt), which are never loaded: save the model with safetensors first"),
    (("*.pth",), "only pickle files (.pth), which are never loaded: save the model with safetensors first"),
    (("*.ckpt",), "only pickle files (.ckpt), which are never loaded: save the model with safetensors first"),
    (("*.safetensors",), "safetensors under other names: rename the weights to model.safetensors, if they are whole"),
)
"""File patterns, all of which a format has, and the name of that format. The first that fits is named."""
EMBEDDING_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
NO_GENERATION = ("Model", "ForSequenceClassification", "ForTokenClassification", "ForRewardModel", "ForMaskedLM")
QUANTISED_BY = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
}
QUANTISED_TENSORS = (".qweight", ".qzeros", ".weight_packed", ".weight_scale", ".scales", ".absmax", ".quant_map")
SHOWN_FILES = 2000  # of a folder that are looked at: it may be anything, the root of a disk included


def files_below(folder: Path) -> list[str]:
    """Files of a folder and of its sub-folders, as paths below it; at most ``SHOWN_FILES``."""
    found: list[str] = []
    for path in (*sorted(folder.glob("*")), *sorted(folder.glob("*/*"))):
        if len(found) < SHOWN_FILES and path.is_file():
            found.append(path.relative_to(folder).as_posix())
    return found


def other_format(files: Iterable[str]) -> str | None:
    """The format that files without a ``config.json`` or without safetensors weights are in; None if not known.

    Args:
        files: names of all files, those of sub-folders as ``folder/name``.
    """
    files = list(files)
    for patterns, kind in OTHER_FORMATS:
        if all(any(_fits(file, pattern) for file in files) for pattern in patterns):
            return kind
    inner = sorted({file.partition("/")[0] for file in files if file.endswith("/config.json")})
    return f"sub-folders with models ({', '.join(inner[:3])}): give the one to convert" if inner else None


def _fits(file: str, pattern: str) -> bool:
    return file.count("/") == pattern.count("/") and fnmatch(file, pattern)


def refuse_adapter(folder: Path, name: str) -> None:
    """Refuse an adapter.

    Args:
        folder: without weights of a model.
        name: as the user gave it.

    Raises:
        ConversionError: it holds one.
    """
    path = folder / ADAPTER
    if not path.is_file():
        return
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        base, kind = description.get("base_model_name_or_path"), description.get("peft_type")
    except (ValueError, OSError, AttributeError):
        base = kind = None
    base = base or "the model that it was trained on"
    raise ConversionError(
        f"{name} is an adapter ({kind or 'of PEFT'}) for {base}, not a model: merge it into {base} first (PEFT's "
        "merge_and_unload), save that with its tokenizer, and convert the result."
    )


def refuse_no_checkpoint(folder: Path, name: str, files: Iterable[str]) -> None:
    """Refuse what has no ``config.json``.

    Args:
        folder: where the files are, as far as they are here.
        name: as the user gave it.
        files: names of all files; on the hub there may be more of them than in the folder.

    Raises:
        ConversionError: always, with what it is instead.
    """
    refuse_adapter(folder, name)
    kind = other_format(files)
    reason = f"it holds {kind}" if kind else "it has no config.json"
    raise ConversionError(f"{name} is not a model folder: {reason}.")


def refuse_other_tasks(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse what does not generate text, and what is quantised in a way that ``config.json`` does not name.

    Raises:
        ConversionError: with what it is.
    """
    architectures = config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    if any((folder / file).exists() for file in EMBEDDING_FILES) or (
        name.endswith(NO_GENERATION) and not name.endswith("LMHeadModel")
    ):
        raise ConversionError(
            f"The source ({name or 'an embedding model'}) gives embeddings or scores and does not generate text, so "
            "it has no KV cache to shrink: serve it as it is."
        )
    quantised = set()
    if not config.get("quantization_config"):
        quantised = {kind for file, kind in QUANTISED_BY.items() if (folder / file).exists()}
    if isinstance(config.get("quantization"), Mapping):
        quantised.add("MLX")
    if quantised:
        raise ConversionError(
            f"The source's weights are quantised ({', '.join(sorted(quantised))}): convert the unquantised model and "
            "quantise after."
        )


def refuse_other_tensors(names: Iterable[str]) -> None:
    """Refuse weights that are no causal language model's, by their names.

    Raises:
        ConversionError: with what they are.
    """
    names = set(names)
    if "embed_tokens.weight" in names and "model.embed_tokens.weight" not in names:
        raise ConversionError(
            "The source's tensors are those of a model without a head for text (embed_tokens.weight instead of "
            "model.embed_tokens.weight), which is an embedding model: serve it as it is."
        )
    for name in sorted(names):
        if name.endswith(QUANTISED_TENSORS):
            raise ConversionError(
                f"The source's weights are quantised (it has {name}): convert the unquantised model and quantise after."
            )
        if ".lora_A." in name or ".lora_B." in name:
            raise ConversionError(
                f"The source holds an adapter that is not merged (it has {name}): merge it into its model first "
                "(PEFT's merge_and_unload), and convert the result."
            )
