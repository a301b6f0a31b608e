"""What decides a conversion's result: an interrupted one goes on only if none of it has changed."""

import hashlib
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

import vllm_mla_plugin
from mla_converters.checkpoints.locate import local_path
from mla_converters.checkpoints.source import Source
from mla_converters.options import HealOptions, Options, as_json, option_name
from mla_converters.text.calibration import WRITTEN

VERSIONS = {
    "vllm-mla-plugin": vllm_mla_plugin.__version__,
    "torch": torch.__version__,
    "transformers": transformers.__version__,
}


def conversion_identity(source: Source, options: Options) -> dict[str, Any]:
    """Source files by size and time, options, calibration text and versions, each under the name a user knows."""
    return (
        _source_identity(source)
        | _options_identity(options)
        | _texts_identity("calibration text", options.calibration)
        | VERSIONS
    )


def healing_identity(model: Path, source: Source, options: HealOptions) -> dict[str, Any]:
    """The same of a healing: of both models, options, text and versions."""
    files = {f"{model.name}/{path.name}": _describe(path) for path in sorted(model.iterdir()) if path.is_file()}
    return (
        {"model": str(model.resolve())}
        | files
        | _source_identity(source)
        | _options_identity(options)
        | _texts_identity("text", options.text)
        | VERSIONS
    )


def _source_identity(source: Source) -> dict[str, Any]:
    path = local_path(source.name)
    identity: dict[str, Any] = {"source": source.name if path is None else str(path.resolve())}
    return identity | {str(file.name): _describe(file) for file in source.files()}


def _options_identity(options: Options | HealOptions) -> dict[str, Any]:
    return {option_name(name): as_json(value) for name, value in asdict(options).items()}


def _texts_identity(kind: str, origins: tuple[str, ...]) -> dict[str, str]:
    return {
        f"{kind} {origin}": hashlib.sha256(Path(origin).read_bytes()).hexdigest()[:16]
        for origin in origins
        if origin not in WRITTEN and Path(origin).is_file()
    }


def _describe(file: Path) -> str:
    status = file.stat()
    modified = datetime.fromtimestamp(status.st_mtime, UTC).isoformat()
    return f"{status.st_size:,} bytes of {modified}"
