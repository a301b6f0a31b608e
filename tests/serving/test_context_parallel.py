"""Decode context parallelism: two ranks, each of which keeps a part of every context."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.commands import convert
from support.engine import run_engine
from support.files import ROOT
from support.models import RandomModel

from vllm_mla_plugin.backends import context_parallel
from vllm_mla_plugin.backends.context_parallel import refuse_context_parallel

# latent, rope, how many tokens in turn go to one rank
CASES = [(64, 16, 1), (32, 8, 16)]


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
    for rank in ranks:
        output, complaint = rank.communicate(timeout=300)
        assert rank.returncode == 0, complaint[-3000:]
        for case, (decode, prefill) in json.loads(output.splitlines()[-1]).items():
            assert decode < 1e-5 and prefill < 1e-5, (case, decode, prefill)


@pytest.mark.engine
def test_cpus(tmp_path: Path) -> None:
    """On CPUs it is refused in one sentence, before weights are loaded."""
    source = RandomModel(heads=2, kv_heads=1, head_dim=16, hidden=32, layers=1).save(tmp_path / "source")
    out = convert(source, tmp_path / "mla", "--method", "exact")
    engine = {"max_model_len": 64, "tensor_parallel_size": 2, "decode_context_parallel_size": 2}
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    with pytest.raises(AssertionError, match="CPUs do not serve decode context parallelism"):
        run_engine(out, [[1, 2, 3]], no_tokenizer=True, engine=engine, environment=environment)


@pytest.mark.parametrize("ranks", [1, 2])
def test_latents_on_gpus(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one rank, and with a power of two, every latent is served."""
    monkeypatch.setattr(context_parallel, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    config = SimpleNamespace(parallel_config=SimpleNamespace(decode_context_parallel_size=ranks))
    refuse_context_parallel(config, 512)
    if ranks == 1:
        refuse_context_parallel(config, 960)
    else:
        with pytest.raises(ValueError, match=r"256, 512 or another power of two, .* have 960 numbers"):
            refuse_context_parallel(config, 960)
