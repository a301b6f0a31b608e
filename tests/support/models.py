"""Small random models of every family, and loading models with transformers."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

import vllm_mla_plugin.hf  # noqa: F401 - registers the MLA models with transformers
from mla_converters.checkpoints.source import Source
from mla_converters.methods.layer_conversion import LayerConversion
from mla_converters.streaming.layers import source_layers

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
QWEN3_EXPERTS = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "mlp_only_layers": [0],
}
QWEN2_EXPERTS = QWEN3_EXPERTS | {"shared_expert_intermediate_size": 40}
GLM_EXPERTS = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "use_qk_norm": True,
}
MULTIPLIERS = {
    "embedding_multiplier": 5.0,
    "attention_multiplier": 0.1,
    "residual_multiplier": 0.3,
    "logits_scaling": 4.0,
}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
UNPADDED = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
MIXTRAL_EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}


@dataclass
class RandomModel:
    """A small random model; the defaults are an ordinary GQA Llama."""

    family: str = "llama"
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    hidden: int = 64
    layers: int = 2
    bias: bool = False
    tied: bool = False
    rope: dict = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    window: int | None = None
    experts: dict[str, Any] = field(default_factory=dict)
    vocab: int = 199
    std: float = 0.2  # of weights
    dtype: torch.dtype = torch.float32
    intermediate: int = 48

    def save(self, folder: Path) -> Path:
        """Write the model; biases and norms get random values, which initialisation leaves at 0 and 1."""
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            self.family,
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            tie_word_embeddings=self.tied,
            rope_parameters=dict(self.rope),
            max_position_embeddings=256,
            initializer_range=self.std,
            dtype=self.dtype,
            **({"attention_bias": True} if self.bias else {}),
            **({"mlp_bias": True} if self.bias and self.family == "llama" else {}),
            **({"sliding_window": self.window} if self.family in ("mistral", "mixtral") else {}),
            **self.experts,
        )
        model = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
        for name, parameter in model.named_parameters():
            if "bias" in name or "norm" in name:
                parameter.data += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        # One token per ASCII character, so that text can calibrate the model.
        vocabulary = {chr(i): i for i in range(128)} | {"<unk>": 128}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer.save(str(folder / "tokenizer.json"))
        return folder


def save_random_mla(folder: Path, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """Write a random Llama with MLA, in which each of the four layers has its own rotary frequencies.

    Args:
        fields: of its configuration, such as those of :class:`vllm_mla_plugin.checkpoint.config.MLAFields`.
    """
    torch.manual_seed(0)
    shape = {"vocab_size": 199, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    sizes = {"qk_nope_head_dim": 16, "v_head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.2}
    config = AutoConfig.for_model("llama_mla", **shape | heads | sizes | fields)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for layer in model.model.layers:
        layer.self_attn.rope_freqs.uniform_(0.001, 1)
    model.save_pretrained(folder)
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32, **kwargs: Any) -> torch.nn.Module:
    """A model in transformers, converted or not, for evaluation."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **kwargs).eval()


def converted_layers(source: Source, conversion: LayerConversion) -> Iterator[dict[str, torch.Tensor]]:
    """Each layer's converted projections."""
    streams = conversion.start()
    for layer in source_layers(source, "cpu"):
        yield conversion.convert(layer, streams).weights


ONE_EXPERT = MIXTRAL_EXPERTS | {"num_experts_per_tok": 1}
# One model of every family.
FAMILY_MODELS = {
    "llama": RandomModel(heads=9, kv_heads=3, head_dim=32, hidden=144, bias=True),
    "mistral": RandomModel("mistral", heads=9, kv_heads=3, head_dim=32),
    "qwen2": RandomModel("qwen2", heads=9, kv_heads=3, head_dim=32),
    "qwen3": RandomModel("qwen3", kv_heads=1, head_dim=80, tied=True),
    "qwen3_moe": RandomModel("qwen3_moe", heads=9, kv_heads=3, head_dim=32, layers=3, experts=QWEN3_EXPERTS),
    "mixtral": RandomModel("mixtral", heads=9, kv_heads=3, head_dim=32, hidden=96, experts=MIXTRAL_EXPERTS),
    "arcee": RandomModel("arcee", heads=9, kv_heads=3, hidden=288, head_dim=32, bias=True),
    "seed_oss": RandomModel("seed_oss", kv_heads=1, head_dim=80, bias=True),
    "qwen2_moe": RandomModel("qwen2_moe", heads=9, kv_heads=3, head_dim=48, layers=3, experts=QWEN2_EXPERTS),
    "smollm3": RandomModel("smollm3", heads=9, kv_heads=3, head_dim=32, layers=4, tied=True, experts=UNPADDED),
    "granite": RandomModel("granite", heads=3, kv_heads=3, head_dim=32, hidden=96, experts=MULTIPLIERS),
    "olmo2": RandomModel("olmo2", heads=9, kv_heads=3, head_dim=32),
    "phi3": RandomModel("phi3", heads=9, kv_heads=3, hidden=288, head_dim=32, rope=PARTIAL, experts=UNPADDED),
    "glm4": RandomModel("glm4", heads=9, kv_heads=3, head_dim=48, bias=True, rope=PARTIAL, experts=UNPADDED),
    "glm4_moe": RandomModel("glm4_moe", kv_heads=1, head_dim=80, layers=3, rope=PARTIAL, experts=GLM_EXPERTS),
    "minimax_m2": RandomModel(
        "minimax_m2", heads=9, kv_heads=3, head_dim=32, rope=PARTIAL, experts=ONE_EXPERT | UNPADDED
    ),
}
