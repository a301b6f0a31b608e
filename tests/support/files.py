"""The repository, and the English texts in it that tests use."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "scripts" / "demo_text.txt").read_text()
CALIBRATION = ROOT / "LICENSE"  # some English that is no test text
