"""Makes an environment that runs the Python of one version of vLLM over the CPU libraries of another.

    python -m scripts.stand_in 0.33.0 .venv .venv-0.33.0

It stands in for a version of which there is no CPU build. The environment takes everything but vLLM's own package from
that of the other version (``.venv``), which must stay where it is, so it needs about 600 MB. What it shows is that the
plugin fits vLLM's Python. It shows nothing about the version's own libraries, on CPUs or GPUs, nor about its torch.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MODULE = "vllm"
NEW_PACKAGES = ("orjson",)
"""What newer versions import on CPUs, and older ones do not need."""


def make_stand_in(version: str, base: Path, venv: Path) -> None:
    """Make the environment.

    Args:
        version: of vLLM, whose wheel for GPUs is downloaded.
        base: an environment with a CPU build of vLLM, and with this package.
        venv: the folder to make.
    """
    if venv.exists():
        shutil.rmtree(venv)
    subprocess.run([base / "bin" / "python", "-m", "venv", "--without-pip", venv], check=True)
    packages, base_packages = (next(folder.resolve().glob("lib/python*/site-packages")) for folder in (venv, base))
    with tempfile.TemporaryDirectory() as scratch:
        pip = [base / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "-q"]
        subprocess.run([*pip, "install", "--target", packages, *NEW_PACKAGES], check=True)
        subprocess.run([*pip, "download", "--no-deps", f"{MODULE}=={version}", "--dest", scratch], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            kept = [name for name in archive.namelist() if not name.endswith(".so")]
            archive.extractall(packages, kept)
    for library in (base_packages / MODULE).glob("*.so"):
        shutil.copy(library, packages / MODULE)
    # By the local version "+cpu", vLLM recognises its CPU build.
    (info,) = packages.glob(f"{MODULE}-*.dist-info")
    metadata = (info / "METADATA").read_text().replace(f"\nVersion: {version}\n", f"\nVersion: {version}+cpu\n", 1)
    (info / "METADATA").write_text(metadata)
    info.rename(packages / f"{MODULE}-{version}+cpu.dist-info")
    # Not a plain path: files that name further paths, such as that of an editable install, are then read too.
    (packages / "base.pth").write_text(f"import site; site.addsitedir({str(base_packages)!r})\n")
    for script in ("vllm", "vllm-mla"):
        text = (base / "bin" / script).read_text().split("\n", 1)[1]
        (venv / "bin" / script).write_text(f"#!{venv.resolve() / 'bin' / 'python'}\n{text}")
        (venv / "bin" / script).chmod(0o755)


if __name__ == "__main__":
    make_stand_in(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
