"""What decides a conversion's result: an interrupted one goes on only if none of it has changed."""

import hashlib
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

import vllm_mla_plugin
from mla_converters.calibration import WRITTEN
from mla_converters.locate import local_path
from mla_converters.options import Options, as_json
from mla_converters.source import Source

VERSIONS = {
    "vllm-mla-plugin": vllm_mla_plugin.__version__,
    "torch": torch.__version__,
    "transformers": transformers.__version__,
}


def conversion_identity(source: Source, options: Options) -> dict[str, Any]:
    """Source files by size and time, options, calibration text and versions, each under the name a user knows."""
    path = local_path(source.name)
    files = source.files() if path is None or path.is_dir() else [path]
    identity: dict[str, Any] = {"source": source.name if path is None else str(path.resolve())}
    identity |= {str(file.name): _describe(file) for file in files}
    for name, value in asdict(options).items():
        identity[f"--{name.replace('_', '-')}"] = as_json(value)
    for origin in options.calibration:
        if origin not in WRITTEN and Path(origin).is_file():
            identity[f"calibration text {origin}"] = hashlib.sha256(Path(origin).read_bytes()).hexdigest()[:16]
    return identity | VERSIONS


def _describe(file: Path) -> str:
    status = file.stat()
    modified = datetime.fromtimestamp(status.st_mtime, UTC).isoformat()
    return f"{status.st_size:,} bytes of {modified}"
