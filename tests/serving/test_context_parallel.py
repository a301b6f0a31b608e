"""Decode context parallelism: two ranks, each of which keeps a part of every context."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.files import ROOT

from vllm_mla_plugin.backends import context_parallel
from vllm_mla_plugin.backends.context_parallel import refuse_context_parallel

# latent, rope, how many tokens in turn go to one rank
CASES = [(64, 16, 1), (32, 8, 16)]


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    """With vLLM's code between two processes, decode and prefill are those of attention to the whole contexts."""
    pytest.importorskip("triton", reason="without Triton, vLLM has no such kernel")
    command = [sys.executable, "-m", "support.context_parallel"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meeting"), json.dumps(CASES)],
            # With names of their own, the ranks use gloo, not vLLM's shared memory, which wants cores of its own.
            env={**os.environ, "TRITON_INTERPRET": "1", "GLOO_SOCKET_IFNAME": "lo", "VLLM_DIST_IDENT": f"rank{rank}"},
            cwd=ROOT / "tests",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            output, complaint = rank.communicate(timeout=300)
            assert rank.returncode == 0, complaint[-3000:]
            for case, (decode, prefill) in json.loads(output.splitlines()[-1]).items():
                assert decode < 1e-5 and prefill < 1e-5, (case, decode, prefill)
    finally:
        for rank in ranks:
            rank.kill()


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs refuse it; GPUs refuse latents that vLLM does not merge, where there is something to merge."""

    def config(ranks: int) -> SimpleNamespace:
        return SimpleNamespace(parallel_config=SimpleNamespace(decode_context_parallel_size=ranks))

    refuse_context_parallel(config(1), 960)
    with pytest.raises(ValueError, match="CPUs do not serve decode context parallelism"):
        refuse_context_parallel(config(2), 512)
    monkeypatch.setattr(context_parallel, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    refuse_context_parallel(config(1), 960)
    refuse_context_parallel(config(2), 512)
    with pytest.raises(ValueError, match=r"256, 512 or another power of two, .* have 960 numbers"):
        refuse_context_parallel(config(2), 960)
