"""GGUF files that cannot be converted exactly: each is refused in one sentence that names the tensor or key."""

from pathlib import Path

import numpy as np
import pytest
from support.commands import Refused
from support.gguf_files import Case, GgufFile
from support.models import MIXTRAL_EXPERTS, RandomModel

EXACT = ("--method", "exact")


REFUSED: dict[str, tuple[GgufFile, str]] = {
    "architecture": (
        GgufFile(keys={"general.architecture": "gemma3"}),
        "architecture 'gemma3', which is not",
    ),
    "adapter": (GgufFile(keys={"general.type": "adapter"}), "general.type 'adapter'"),
    "missing": (GgufFile(tensors={"blk.1.ffn_down.weight": None}), "blk.1.ffn_down.weight is missing"),
    "no-embedding": (GgufFile(tensors={"token_embd.weight": None}), "lacks token_embd.weight"),
    "surplus": (
        GgufFile(tensors={"blk.0.attn_sinks.weight": np.ones(4, np.float32)}),
        "attn_sinks.weight is no part",
    ),
    "foreign-name": (
        GgufFile(tensors={"lm_head.weight": np.ones((199, 64), np.float32)}),
        ": lm_head.weight is no part",
    ),
    "foreign-names": (
        GgufFile(tensors={"output_norm.weight": None, "model.norm.weight": np.ones(64, np.float32)}),
        ": output_norm.weight is missing; model.norm.weight is no part",
    ),
    "bias": (GgufFile(tensors={"blk.0.attn_k.bias": np.ones(32, np.float32)}), "blk.0.attn_k.bias is no part"),
    "shape": (
        GgufFile(tensors={"blk.0.attn_q.weight": np.ones((64, 32), np.float32)}),
        "blk.0.attn_q.weight has",
    ),
    "integers": (GgufFile(tensors={"output_norm.weight": np.ones(64, np.int8)}), "output_norm.weight has dtype I8"),
    "nan": (GgufFile(tensors={"output_norm.weight": np.full(64, np.nan, np.float32)}), "output_norm.weight of"),
    "no-key": (GgufFile(keys={"llama.block_count": None}), "lacks llama.block_count"),
    "text-key": (GgufFile(keys={"llama.block_count": "two"}), "has llama.block_count 'two'"),
    "layers-differ": (
        GgufFile(keys={"llama.attention.head_count_kv": [2, 1]}),
        "attention.head_count_kv [2, 1], where",
    ),
    "scale": (GgufFile(keys={"llama.logit_scale": 0.5}), "has llama.logit_scale 0.5"),
    "gating": (GgufFile(keys={"llama.expert_gating_func": 2}), "has llama.expert_gating_func 2"),
    "partial": (GgufFile(keys={"llama.rope.dimension_count": 8}), "rotates 8 of the 16"),
    "longrope": (GgufFile(keys={"llama.rope.scaling.type": "longrope"}), "rope.scaling.type 'longrope'"),
    "factor": (GgufFile(keys={"llama.rope.scaling.attn_factor": 1.5}), "rope.scaling.attn_factor 1.5"),
    "yarn-extrapolation": (
        GgufFile(
            keys={
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.yarn_ext_factor": 0.5,
            }
        ),
        "yarn_ext_factor 0.5",
    ),
    "yarn-no-factor": (GgufFile(keys={"llama.rope.scaling.type": "yarn"}), "lacks llama.rope.scaling.factor"),
    "frequencies": (
        GgufFile(tensors={"rope_freqs.weight": np.arange(1, 9, dtype=np.float32)}),
        "rope_freqs.weight that no setting",
    ),
    "fewer-frequencies": (
        GgufFile(tensors={"rope_freqs.weight": np.full(4, 2, np.float32)}),
        "rope_freqs.weight that are not 8 positive numbers",
    ),
    "twice": (
        GgufFile(
            keys={"llama.rope.scaling.factor": 2.0}, tensors={"rope_freqs.weight": np.arange(1, 9, dtype=np.float32)}
        ),
        "by rope_freqs.weight and by rope.scaling too",
    ),
    "tokenizer": (GgufFile(keys={"tokenizer.ggml.model": "bert"}), "tokenizer.ggml.model 'bert'"),
    "pre": (GgufFile(keys={"tokenizer.ggml.pre": "default"}), "tokenizer.ggml.pre 'default'"),
    "no-pre": (GgufFile(keys={"tokenizer.ggml.pre": None}), "tokenizer.ggml.pre 'missing'"),
    "no-merges": (GgufFile(keys={"tokenizer.ggml.merges": None}), "tokenizer.ggml.merges"),
    "same-tokens": (GgufFile(keys={"tokenizer.ggml.tokens": ["a"] * 199}), "the token 'a' 199 times"),
    "types": (GgufFile(keys={"tokenizer.ggml.token_type": [1] * 10}), "10 values in tokenizer.ggml.token_type"),
    "more-tokens": (
        GgufFile(tensors={"token_embd.weight": np.ones((150, 64), np.float32)}),
        "199 tokens in its tokenizer, and token_embd.weight has 150 rows",
    ),
    "special": (GgufFile(keys={"tokenizer.ggml.eos_token_id": 500}), "tokenizer.ggml.eos_token_id 500"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path, refusal: Refused) -> None:
    """Nothing is left behind."""
    file, reason = REFUSED[case]
    _, (path,) = Case(RandomModel(), file).write(tmp_path)
    assert reason in refusal("convert", path, tmp_path / "out", *EXACT)
    assert not list(tmp_path.glob("out*"))


def test_refused_experts(tmp_path: Path, refusal: Refused) -> None:
    """A mixture whose experts are missing, or too few, names the file's own tensor once."""
    model = RandomModel("mixtral", experts=MIXTRAL_EXPERTS)
    few, one = np.ones((2, 48, 64), np.float32), np.ones((48, 64), np.float32)
    for tensors, reason in (
        ({"blk.1.ffn_up_exps.weight": None}, ": blk.1.ffn_up_exps.weight is missing."),
        ({"blk.0.ffn_gate_exps.weight": few}, ": blk.0.ffn_gate_exps.weight is missing."),
        (
            {"blk.0.ffn_gate.1.weight": one},
            "holds blk.0.ffn_gate_exps.weight and, for the same, blk.0.ffn_gate.1.weight",
        ),
    ):
        _, (path,) = Case(model, GgufFile(tensors=tensors)).write(tmp_path)
        assert reason in refusal("convert", path, tmp_path / "out", *EXACT)


def test_refused_window(tmp_path: Path, refusal: Refused) -> None:
    """Mistral's, which all layers have, with the way out; Qwen's, because not all do."""
    _, (path,) = Case(RandomModel("mistral", window=100)).write(tmp_path)
    assert "--max-context 100" in refusal("convert", path, tmp_path / "out", *EXACT)
    _, (path,) = Case(RandomModel("qwen2"), GgufFile(keys={"qwen2.attention.sliding_window": 100})).write(tmp_path)
    assert "window of 100 tokens in some layers" in refusal("convert", path, tmp_path / "out", *EXACT)


def test_refused_parts(tmp_path: Path, refusal: Refused) -> None:
    _, parts = Case(RandomModel(), GgufFile(tensors_per_part=8)).write(tmp_path)
    first, second, third = parts
    third.rename(tmp_path / "elsewhere.gguf")
    assert f"lacks {third.name}" in refusal("convert", first, tmp_path / "out", *EXACT)
    assert "one of 3 parts" in refusal("convert", tmp_path / "elsewhere.gguf", tmp_path / "out", *EXACT)
    third.write_bytes(second.read_bytes())
    assert "its name does not" in refusal("convert", first, tmp_path / "out", *EXACT)
    assert "does not exist" in refusal("convert", tmp_path / "model-00004-of-00003.gguf", tmp_path / "out", *EXACT)


def test_refused_files(tmp_path: Path, refusal: Refused) -> None:
    _, (path,) = Case(RandomModel()).write(tmp_path)
    whole = path.read_bytes()
    for content, reason in (
        (b"GGML" + whole[4:], "does not begin with GGUF"),
        (whole[:4] + (1).to_bytes(4, "little") + whole[8:], "its version is 1"),
        (whole[:100], "ends in the middle of its header"),
        (whole[:16] + (2**60).to_bytes(8, "little") + whole[24:], "not a readable GGUF file"),
        (whole[:-1000], "ends after"),
        (b"", "not a readable GGUF file"),
    ):
        path.write_bytes(content)
        assert reason in refusal("convert", path, tmp_path / "out", *EXACT)
        assert "not a readable GGUF file" in refusal("plan", path)
