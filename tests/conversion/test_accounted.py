"""Every tensor and every configuration key of a source is accounted for: the conversion is right, or refused by name.

A valid source is changed in one place at random. Set ``ACCOUNTED_CASES`` to run more cases than the suite does.
"""

import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import MIXTRAL_EXPERTS, QWEN3_EXPERTS, RandomModel, load
from transformers import AutoConfig

from mla_converters.convert import convert
from mla_converters.errors import ConversionError
from mla_converters.options import ConvertOptions, ExactOptions

CASES = int(os.environ.get("ACCOUNTED_CASES", "24"))
SOURCES = {
    "llama": RandomModel(),
    "llama-biases": RandomModel(bias=True, tied=True),
    "mistral": RandomModel("mistral"),
    "qwen2": RandomModel("qwen2"),
    "qwen3": RandomModel("qwen3", heads=6, kv_heads=3, hidden=96),
    "qwen3_moe": RandomModel("qwen3_moe", layers=1, experts=QWEN3_EXPERTS | {"mlp_only_layers": []}),
    "mixtral": RandomModel("mixtral", layers=1, experts=MIXTRAL_EXPERTS),
}
# Values that a family's transformers code reads, each beside values that people have in their files.
KEYS: dict[str, list[Any]] = {
    "rms_norm_eps": [1e-3, 1e-6],
    "hidden_act": ["gelu", "relu", "silu"],
    "attention_bias": [True, False],
    "mlp_bias": [True, False],
    "tie_word_embeddings": [True, False],
    "rope_theta": [500000.0, 10000.0],
    "rope_parameters": [
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        {"rope_type": "default", "rope_theta": 20000.0, "partial_rotary_factor": 0.5},
    ],
    "rope_scaling": [{"type": "linear", "factor": 4.0}, {"rope_type": "yarn", "factor": 2.0}, None],
    "head_dim": [8, 16, 32],
    "num_attention_heads": [2, 4, 8],
    "num_key_value_heads": [1, 2, 4],
    "num_hidden_layers": [1, 3],
    "hidden_size": [32, 128],
    "intermediate_size": [24, 96],
    "vocab_size": [100, 300],
    "max_position_embeddings": [64, 4096],
    "sliding_window": [16, None],
    "use_sliding_window": [True, False],
    "layer_types": [["sliding_attention", "full_attention"], ["full_attention", "full_attention"]],
    "attn_logit_softcapping": [30.0, None],
    "final_logit_softcapping": [30.0],
    "query_pre_attn_scalar": [24.0],
    "attention_multiplier": [0.5],
    "residual_multiplier": [0.5, 1.0],
    "embedding_multiplier": [2.0],
    "logits_scaling": [4.0],
    "attention_chunk_size": [32],
    "use_qk_norm": [True],
    "partial_rotary_factor": [0.5, 1.0],
    "num_experts_per_tok": [1, 2],
    "norm_topk_prob": [True, False],
    "decoder_sparse_step": [1, 2],
    "router_scale": [2.0],
    "attention_sink": [True],
    "pretraining_tp": [1, 2],
    "dual_chunk_attention_config": [{"chunk_size": 64, "local_size": 16}],
    "some_new_scaling": [2.0],
    "unsloth_version": ["2026.1"],
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {name: model.save(folder / name) for name, model in SOURCES.items()}


def change_tensor(source: Path, chance: random.Random) -> str:
    """Remove, rename, add or reshape one tensor; its name, which a refusal must say."""
    path = source / "model.safetensors"
    tensors = load_file(path)
    name = chance.choice(sorted(tensors))
    how = chance.choice(("remove", "rename", "add", "reshape"))
    if how == "remove":
        del tensors[name]
    elif how == "rename":
        tensors[name.replace("weight", "wieght")] = tensors.pop(name)
    elif how == "add":
        name = f"{name.rpartition('.')[0]}.extra"
        tensors[name] = torch.ones(3)
    else:
        tensors[name] = torch.cat((tensors[name], tensors[name][:1])).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    return name


def change_key(source: Path, chance: random.Random) -> str:
    """Add or change one configuration key; its name."""
    path = source / "config.json"
    key = chance.choice(sorted(KEYS))
    config = json.loads(path.read_text())
    config[key] = chance.choice(KEYS[key])
    if key in ("rope_theta", "rope_scaling"):  # the older spelling, which newer files do not have beside the newer
        config.pop("rope_parameters", None)
    path.write_text(json.dumps(config))
    return key


def logits(folder: Path) -> torch.Tensor:
    ids = torch.arange(40)[None] % 90
    with torch.inference_mode():
        return load(folder)(ids).logits


def outcome(source: Path, out: Path, changed: str, is_key: bool) -> str:
    """Convert; ``refused`` if one sentence names what was changed, ``right`` if OUT computes what the source does."""
    try:
        convert(str(source), out, ConvertOptions(method=ExactOptions(), device="cpu"), quiet=True)
    except ConversionError as error:
        sentence = " ".join(str(error).split())  # as the command line prints it
        assert not out.exists()
        # A key may be refused by what it means: the tensors that no longer fit it, or its kind.
        assert is_key or changed in sentence, sentence
        return "refused"
    AutoConfig.from_pretrained(source)  # the source itself is valid
    assert (logits(out) - logits(source)).abs().max() < 1e-3, f"silently wrong: {changed}"
    return "right"


def test_right_or_refused_by_name(sources: dict[str, Path], tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    for case in range(CASES):
        chance = random.Random(case)
        family = chance.choice(sorted(SOURCES))
        source, out = tmp_path / f"source-{case}", tmp_path / f"out-{case}"
        shutil.copytree(sources[family], source)
        is_key = chance.random() < 0.6
        changed = (change_key if is_key else change_tensor)(source, chance)
        print(case, family, changed, flush=True)
        counts[("key " if is_key else "tensor ") + outcome(source, out, changed, is_key)] += 1
        shutil.rmtree(source)
        shutil.rmtree(out, ignore_errors=True)
    print(dict(counts))
    assert counts["tensor refused"] and counts["key right"] and counts["key refused"]
