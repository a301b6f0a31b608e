"""The kernel that absorbs and rotates queries, in Triton's interpreter. ``tests/gpu`` runs it on a GPU."""

import json

import pytest
from support.modules import run_support

pytest.importorskip("triton", reason="without Triton, vLLM has no such kernel")

# heads, numbers of a head's own query, latent, rope, rows
CASES = [(9, 64, 128, 64, 1), (3, 128, 512, 64, 70), (2, 80, 300, 48, 20), (1, 100, 120, 8, 5), (2, 16, 8, 130, 40)]


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    """The largest error of each case, in the interpreter."""
    return run_support("interpreted_absorb", json.dumps(CASES), TRITON_INTERPRET="1")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_absorb(errors: dict[str, float], case: tuple) -> None:
    """Right for sizes that no tile divides, for several tiles of rows, and for queries that do not lie end to end."""
    assert errors[str(case)] < 1e-5
