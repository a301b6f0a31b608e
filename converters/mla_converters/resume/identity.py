"""The identity of a run: everything that decides its result. An interrupted run goes on only with the same identity."""

import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

import vllm_mla_plugin
from mla_converters.checkpoints.locate import local_path
from mla_converters.checkpoints.source import Source
from mla_converters.options import (
    WRITTEN,
    ConvertOptions,
    HealOptions,
    LogitsOptions,
    MethodOptions,
    OptionsModel,
    option_name,
)
from mla_converters.options.base import as_json
from mla_converters.options.text import parse_weighted
from mla_converters.text.documents import has_documents

VERSIONS = {
    "vllm-mla-plugin": vllm_mla_plugin.__version__,
    "torch": torch.__version__,
    "transformers": transformers.__version__,
}


def conversion_identity(source: Source, options: ConvertOptions) -> dict[str, Any]:
    """The identity of a conversion, under names that a user knows.

    It has the source's files (size and time), the options, the calibration text and the versions.
    """
    return (
        _source_identity(source)
        | _options_identity(options)
        | _texts_identity("calibration text", options.calibration)
        | VERSIONS
    )


def healing_identity(model: Path, source: Source, options: HealOptions) -> dict[str, Any]:
    """The identity of a healing: the files of all models, the options, the text and the versions."""
    teacher = None if options.teacher is None else local_path(options.teacher)
    return (
        {"model": str(model.resolve())}
        | _files_identity(model, model.name)
        | _source_identity(source)
        | ({} if teacher is None else _files_identity(teacher, f"teacher {teacher.name}"))
        | _options_identity(options)
        | _texts_identity("text", options.text)
        | VERSIONS
    )


def logits_identity(teacher: Source, options: LogitsOptions) -> dict[str, Any]:
    """The identity of predictions: the teacher's files, the options, the text and the versions."""
    return _source_identity(teacher) | _options_identity(options) | _texts_identity("text", options.text) | VERSIONS


def _source_identity(source: Source) -> dict[str, Any]:
    path = local_path(source.name)
    identity: dict[str, Any] = {"source": source.name if path is None else str(path.resolve())}
    return identity | {str(file.name): _describe(file) for file in source.files()}


def _files_identity(path: Path, name: str) -> dict[str, str]:
    """The size and the time of every file in a folder, or of a single file."""
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    return {f"{name}/{file.name}": _describe(file) for file in files}


def _options_identity(options: OptionsModel) -> dict[str, Any]:
    """Every option under its name on the command line. A method adds its name and its own options."""
    identity: dict[str, Any] = {}
    for name in type(options).model_fields:
        value = getattr(options, name)
        if isinstance(value, MethodOptions):
            identity |= {option_name(name): value.name} | _options_identity(value)
        else:
            identity[option_name(name)] = as_json(value)
    return identity


def _texts_identity(kind: str, origins: tuple[str, ...]) -> dict[str, str]:
    names = (parse_weighted(origin)[0] for origin in origins)
    return {
        f"{kind} {name}": _text_identity(Path(name)) for name in names if name not in WRITTEN and Path(name).is_file()
    }


def _text_identity(file: Path) -> str:
    """The content of a text; of documents, which may be larger than memory, size and time."""
    if has_documents(str(file)):
        return _describe(file)
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _describe(file: Path) -> str:
    status = file.stat()
    modified = datetime.fromtimestamp(status.st_mtime, UTC).isoformat()
    return f"{status.st_size:,} bytes of {modified}"
