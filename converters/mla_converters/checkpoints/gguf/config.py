"""The header of a GGUF model as a Hugging Face ``config.json``."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers

from mla_converters.checkpoints.gguf.header import StoredTensor
from mla_converters.checkpoints.gguf.keys import Keys
from mla_converters.checkpoints.gguf.parts import Gguf
from mla_converters.checkpoints.gguf.rope import FACTORS, rope_parameters
from mla_converters.checkpoints.gguf.values import read_values, value_dtype
from mla_converters.checkpoints.gguf.vocabulary import Vocabulary, unknown_keys
from mla_converters.errors import ConversionError
from vllm_mla_plugin.checkpoint.families import FAMILIES, Family

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
QWEN = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen3moe": "Qwen3MoeForCausalLM"}
BIASES = {"attention": ".attn_q.bias", "mlp": ".ffn_gate.bias"}
ROLES = {"bos": "bos", "eos": "eos", "pad": "padding"}
REORDERED = "llama"  # the architecture whose queries and keys llama.cpp's converter reorders


@dataclass(frozen=True)
class Description:
    """A header, understood.

    Attributes:
        config: as in ``config.json``.
        family: of the model.
        heads: heads of the projections whose rows are reordered, by ``attn_q`` or ``attn_k``.
        unknown_keys: keys that were not understood, and may or may not matter.
    """

    config: dict[str, Any]
    family: Family
    heads: dict[str, int]
    unknown_keys: list[str]


def describe(gguf: Gguf, vocabulary: Vocabulary | None) -> Description:
    """Understand a header.

    Raises:
        ConversionError: the model is of no supported family, the header lacks a key, or a key cannot be represented.
    """
    keys = Keys(gguf)
    family = FAMILIES[_architecture(keys)]
    ids, count = (vocabulary.ids, len(vocabulary.tokens)) if vocabulary else ({}, 0)
    heads = keys.integer("attention.head_count")
    kv_heads = keys.integer("attention.head_count_kv", heads)
    config = _common(gguf, keys, heads, kv_heads) | _special(gguf, keys, family)
    if count > config["vocab_size"]:
        raise ConversionError(
            f"{gguf.path} has {count:,} tokens in its tokenizer, and {EMBEDDING} has {config['vocab_size']:,} rows."
        )
    config |= {f"{role}_token_id": ids.get(name) for role, name in ROLES.items()}
    config |= {"architectures": [family.architecture], "model_type": family.model_type}
    config["transformers_version"] = transformers.__version__  # without, transformers warns of a tokenizer's old faults
    reordered = {"attn_q": heads, "attn_k": kv_heads} if keys.architecture == REORDERED else {}
    return Description(config, family, reordered, keys.rest() + unknown_keys(gguf))


def _architecture(keys: Keys) -> str:
    kind = keys.text("general.type", "model")
    if kind != "model":
        raise ConversionError(
            f"{keys.path} holds no model, but is of general.type {kind!r}: give the model's own file."
        )
    if keys.architecture in QWEN:
        return QWEN[keys.architecture]
    if keys.architecture != "llama":
        supported = ", ".join(("llama", *QWEN))
        raise ConversionError(
            f"{keys.path} is of the architecture {keys.architecture!r}, which is not supported; supported are: "
            f"{supported}."
        )
    # llama.cpp calls all three llama. Mistral computes what Llama does, except that it may have a window.
    if keys.integer("expert_count", 0):
        return "MixtralForCausalLM"
    return "MistralForCausalLM" if keys.integer("attention.sliding_window", 0) else "LlamaForCausalLM"


def _common(gguf: Gguf, keys: Keys, heads: int, kv_heads: int) -> dict[str, Any]:
    """Keys that the configurations of all families have."""
    hidden, embedding = keys.integer("embedding_length"), _embedding(gguf)
    head_dim = keys.integer("attention.key_length", max(1, hidden // heads))
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise ConversionError(f"{gguf.path} has keys and values of different lengths, which is not supported.")
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope_parameters(keys, _factors(gguf), head_dim),
        "tie_word_embeddings": HEAD not in gguf.tensors,
        "dtype": str(value_dtype(embedding.kind) or torch.float32).removeprefix("torch."),
    }


def _embedding(gguf: Gguf) -> StoredTensor:
    if EMBEDDING not in gguf.tensors:
        raise ConversionError(f"{gguf.path} lacks {EMBEDDING}, without which its model cannot be read.")
    return gguf.tensors[EMBEDDING]


def _factors(gguf: Gguf) -> torch.Tensor | None:
    if FACTORS not in gguf.tensors:
        return None
    stored = gguf.tensors[FACTORS]
    if value_dtype(stored.kind) is None:
        raise ConversionError(f"{gguf.path} has {FACTORS} of type {stored.kind.name}, which is no float.")
    return read_values(stored).float()


def _special(gguf: Gguf, keys: Keys, family: Family) -> dict[str, Any]:
    """Keys that not all families have."""
    attention, mlp = (
        {f"{part}_bias": any(tensor.endswith(name) for tensor in gguf.tensors)} for part, name in BIASES.items()
    )
    match family.model_type:
        case "llama":
            return attention | mlp
        case "mistral":
            return {"sliding_window": keys.integer("attention.sliding_window")}
        case "mixtral":
            return {
                "sliding_window": keys.integer("attention.sliding_window", 0) or None,
                "intermediate_size": keys.integer("expert_feed_forward_length", keys.integer("feed_forward_length")),
                "num_local_experts": keys.integer("expert_count"),
                "num_experts_per_tok": keys.integer("expert_used_count"),
            }
        case "qwen2":
            return _no_window(keys)
        case "qwen3":
            return _no_window(keys) | attention
    return {
        **_no_window(keys),
        **attention,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": keys.integer("expert_feed_forward_length"),
        "norm_topk_prob": keys.truth("expert_weights_norm", True),
        "num_experts": keys.integer("expert_count"),
        "num_experts_per_tok": keys.integer("expert_used_count"),
    }


def _no_window(keys: Keys) -> dict[str, Any]:
    """Qwen's windows are of some layers only, and a GGUF file does not say which."""
    window = keys.integer("attention.sliding_window", 0)
    if 0 < window < keys.integer("context_length"):
        raise ConversionError(f"{keys.path} has a sliding window of {window} tokens in some layers, not in all.")
    return {"use_sliding_window": False, "sliding_window": None}
