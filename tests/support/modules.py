"""Runs modules of this folder in processes of their own."""

import json
import os
import subprocess
import sys
from typing import Any

from support.files import ROOT


def run_support(module: str, *arguments: str, **environment: str) -> dict[str, Any]:
    """What a module of ``tests/support`` prints as JSON in its last line."""
    result = subprocess.run(
        [sys.executable, "-m", f"support.{module}", *arguments],
        env={**os.environ, **environment},
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])
