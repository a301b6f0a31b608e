"""A new method needs one file and one line in the registry. Every command then accepts it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.files import ROOT
from support.models import RandomModel

COMMAND = "import support.toy_method; from mla_converters.cli.main import main; main()"


def vllm_mla(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command line of a package that has the toy method in its registry."""
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT / "tests",
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return RandomModel().save(tmp_path_factory.mktemp("new") / "source")


def test_help_and_plan(source: Path, tmp_path: Path) -> None:
    told = vllm_mla("convert", "--help").stdout
    assert "Method toy" in told and "--kept-values" in told and "How many values the latent keeps" in told
    report = tmp_path / "plan.json"
    assert vllm_mla("plan", source, "--method", "toy", "--json", report).returncode == 0
    planned = json.loads(report.read_text())["conversion"]
    assert planned["method"] == "toy" and planned["settings"] == {"kept_values": 8}
    assert set(planned["core_seconds"]) > {"toy", "exact"}


@pytest.mark.slow
def test_convert_card_and_verify(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert (
        "--kept-values is 0, but must be 1 or more."
        in vllm_mla("convert", source, out, "--method", "toy", "--kept-values", 0).stderr
    )
    assert "an option of --method toy" in vllm_mla("convert", source, out, "--kept-values", 4).stderr
    made = vllm_mla("convert", source, out, "--method", "toy", "--kept-values", 4)
    assert made.returncode == 0, made.stderr
    report = json.loads((out / "conversion_report.json").read_text())
    assert (report["kv_lora_rank"], report["qk_rope_head_dim"], report["settings"]) == (4, 32, {"kept_values": 4})
    assert "--method toy --kept-values 4" in report["command"]
    card = (out / "README.md").read_text()
    assert "- Method: `toy`, the first values and no others ([paper](https://example.org/toy))\n" in card
    assert "- kept_values: 4\n" in card
    verified = vllm_mla("verify", out, "--source", source)
    assert "Whole." in verified.stdout or "likeliest token" in verified.stdout, verified.stderr
