"""Scores of HumanEval: whether the function that a model wrote passes the problem's tests."""

import subprocess
import sys
from typing import Any

SECONDS = 10  # for the tests of one problem


def passes(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Run the tests on a program, in a process of its own."""
    program = f"{doc['prompt']}{results[0]}\n{doc['test']}\ncheck({doc['entry_point']})\n"
    try:
        done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"passed": 0.0}
    return {"passed": float(done.returncode == 0)}
