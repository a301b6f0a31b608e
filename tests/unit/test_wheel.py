"""The wheel: its contents, and that it works without this repository."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from email.message import Message
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest
from support.files import ROOT
from support.models import RandomModel

import vllm_mla_plugin

pytestmark = pytest.mark.slow

PACKAGES = {"mla_converters": ROOT / "converters" / "mla_converters", "vllm_mla_plugin": ROOT / "vllm_mla_plugin"}
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
WHERE = """
import mla_converters, vllm_mla_plugin
from importlib.metadata import entry_points
(entry,) = entry_points(group="vllm.general_plugins", name="mla")
print(mla_converters.__file__, vllm_mla_plugin.__file__, entry.load().__code__.co_filename)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that is built from a copy, because the repository may have leftovers of other builds."""
    folder = tmp_path_factory.mktemp("wheel")
    for path in (ROOT / name for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE")):
        (folder / "source").mkdir(exist_ok=True)
        shutil.copy(path, folder / "source")
    for path in PACKAGES.values():
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(path, folder / "source" / path.relative_to(ROOT), ignore=ignored)
    build = [*PIP, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", folder, folder / "source"]
    subprocess.run(build, check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, and after it the packages of this environment."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=True)
    install = ["--python", folder / "bin" / "python", "install", "--no-deps", "--no-index", wheel]
    subprocess.run([*PIP, *install], check=True)
    # Python does not read .pth files in a folder that a .pth file adds, so this repository stays out.
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def run(command: list[object], cwd: Path) -> str:
    """Run a command without this repository on Python's path; return its output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def metadata(wheel: Path) -> Message:
    with ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_contents(wheel: Path) -> None:
    """The wheel contains exactly the files of the packages."""
    with ZipFile(wheel) as archive:
        contents = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        str(package / path.relative_to(folder))
        for package, folder in ((Path(name), folder) for name, folder in PACKAGES.items())
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {f"{name}/py.typed" for name in PACKAGES} <= expected
    assert contents == expected


def test_metadata(wheel: Path) -> None:
    """The version is that of the package, and the metadata has links for a package index."""
    told = metadata(wheel)
    assert told["Version"] == vllm_mla_plugin.__version__
    urls = dict(url.split(", ") for url in told.get_all("Project-URL"))
    assert {"Homepage", "Documentation", "Changelog"} <= urls.keys()
    assert all(url.startswith("https://") for url in urls.values())


def test_works_from_another_folder(installed: Path, tmp_path: Path) -> None:
    """The modules, the entry point of vLLM and the command come from the wheel."""
    places = run([installed / "bin" / "python", "-c", WHERE], tmp_path).split()
    assert len(places) == 3
    assert all(Path(place).is_relative_to(installed) for place in places)
    source = RandomModel().save(tmp_path / "source")
    plan = run([installed / "bin" / "vllm-mla", "plan", source], tmp_path)
    assert "vllm-mla convert" in plan
