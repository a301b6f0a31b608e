"""The real OpenAI-compatible server on a converted model, without any flag that a user would not give."""

from pathlib import Path

import demo
import pytest
from conftest import TEXT


def test_serve_and_chat(exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chat works with the carried-over template, and the answer makes sense."""
    monkeypatch.setattr(demo, "DEMO", tmp_path)
    with demo.server(exact) as (url, log):
        assert "Paris" in demo.chat(url, exact)
        body = {"model": str(exact), "prompt": TEXT[:200], "max_tokens": 8, "temperature": 0, "logprobs": 1}
        answer = demo.post(f"{url}/v1/completions", body)
        assert answer["usage"]["completion_tokens"] == 8
        assert len(answer["choices"][0]["logprobs"]["tokens"]) == 8
    assert "KV cache size" in log.read_text()
