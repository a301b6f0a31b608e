"""CI here, CI on GitHub and the check before a commit run the same commands, which ``make help`` lists."""

import re
import subprocess
from typing import Any

import yaml
from support.files import ROOT


def read_yaml(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def test_same_commands_everywhere() -> None:
    commands = re.findall(r"^make .+$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert commands == ["make lint", "make test"]
    steps = read_yaml(".github/workflows/ci.yml")["jobs"]["ci"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == commands
    (hooks,) = (repository["hooks"] for repository in read_yaml(".pre-commit-config.yaml")["repos"])
    assert [hook["entry"] for hook in hooks] == ["make lint"]


def test_help_lists_every_target() -> None:
    (targets,) = re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    listed = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^make (\S+)", listed, re.MULTILINE) == targets.split()
