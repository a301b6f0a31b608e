"""GGUF files as llama.cpp's converter writes them, of small Hugging Face folders."""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from support.models import RandomModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

ARCHITECTURES = {"mistral": "llama", "mixtral": "llama", "qwen3_moe": "qwen3moe"}  # where llama.cpp has other names
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    r"model.layers.(\d+).input_layernorm": r"blk.\1.attn_norm",
    r"model.layers.(\d+).post_attention_layernorm": r"blk.\1.ffn_norm",
    r"model.layers.(\d+).self_attn.([qkv])_proj": r"blk.\1.attn_\2",
    r"model.layers.(\d+).self_attn.o_proj": r"blk.\1.attn_output",
    r"model.layers.(\d+).self_attn.([qk])_norm": r"blk.\1.attn_\2_norm",
    r"model.layers.(\d+).mlp.(gate|up|down)_proj": r"blk.\1.ffn_\2",
    r"model.layers.(\d+).(?:mlp|block_sparse_moe).gate": r"blk.\1.ffn_gate_inp",
    r"model.layers.(\d+).mlp.experts.(\d+).(gate|up|down)_proj": r"blk.\1.ffn_\3.\2",
    r"model.layers.(\d+).block_sparse_moe.experts.(\d+).w1": r"blk.\1.ffn_gate.\2",
    r"model.layers.(\d+).block_sparse_moe.experts.(\d+).w2": r"blk.\1.ffn_down.\2",
    r"model.layers.(\d+).block_sparse_moe.experts.(\d+).w3": r"blk.\1.ffn_up.\2",
}
LETTERS = [bytes_to_unicode()[byte] for byte in range(128)]
MERGES = ["t h", "Ġ th", "1 2", "Ġ a"]
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<\uff5codd▁one\uff5c>"]
OWN = ["<think>"]  # added to the vocabulary, and not special
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def vocabulary(size: int) -> dict[str, Any]:
    """The keys of a byte-level tokenizer with as many tokens as an embedding has rows."""
    words = [merge.replace(" ", "") for merge in MERGES]
    tokens = [*LETTERS, *words, *CONTROL, *OWN]
    types = [1] * (len(LETTERS) + len(words)) + [3] * len(CONTROL) + [4] * len(OWN)
    tokens += [f"[PAD{i}]" for i in range(len(tokens), size)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types + [5] * (size - len(types)),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": tokens.index("<|im_start|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


@dataclass
class GgufFile:
    """How a folder is written.

    Attributes:
        stacked: whether experts are one tensor, as newer files have them.
        kind: how matrices are stored whose rows allow it.
        tensors_per_part: with it, the file is split.
        keys: to add, or to leave out (None).
        tensors: to add, change, or leave out (None).
    """

    stacked: bool = True
    kind: str = "F32"
    tensors_per_part: int = 0
    keys: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, np.ndarray | None] = field(default_factory=dict)

    def write(self, source: Path, path: Path) -> list[Path]:
        """Write a folder's model to ``path``; the files, several if it is split."""
        config = json.loads((source / "config.json").read_text())
        architecture = ARCHITECTURES.get(config["model_type"], config["model_type"])
        keys = {"general.name": "Tiny", **shape_keys(config, architecture), **vocabulary(config["vocab_size"])}
        tensors: dict[str, np.ndarray | None] = dict(renamed(load_file(source / "model.safetensors"), config))
        if self.stacked:
            tensors = stack(tensors)
        if config["rope_parameters"]["rope_type"] == "llama3":
            tensors["rope_freqs.weight"] = llama3_factors(config)
        architecture = self.keys.get("general.architecture", architecture)
        writer = gguf.GGUFWriter(path, architecture, split_max_tensors=self.tensors_per_part)
        for name, value in (keys | self.keys).items():
            if value is not None and name != "general.architecture":
                add_key(writer, name, value)
        for name, array in (tensors | self.tensors).items():
            if array is not None:
                self._add(writer, name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return sorted(path.parent.glob(f"{path.stem}*.gguf"))

    def _add(self, writer: gguf.GGUFWriter, name: str, array: np.ndarray) -> None:
        kind = gguf.GGMLQuantizationType[self.kind]
        if array.ndim < 2 or array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] or self.kind == "F32":
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)


@dataclass
class Case:
    """A model, and how its file is written."""

    model: RandomModel
    file: GgufFile = field(default_factory=GgufFile)

    def write(self, folder: Path) -> tuple[Path, list[Path]]:
        source = self.model.save(folder / "source")
        return source, self.file.write(source, folder / "model.gguf")


def shape_keys(config: dict[str, Any], architecture: str) -> dict[str, Any]:
    """The keys that say what ``config.json`` says, without its RoPE scaling of Llama 3.1, which is a tensor."""
    rope = config["rope_parameters"]
    keys = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": rope["rope_theta"],
        "rope.dimension_count": config["head_dim"],
        "vocab_size": config["vocab_size"],
    }
    if rope["rope_type"] in ("linear", "yarn"):
        keys |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
    if rope["rope_type"] == "yarn":
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if experts := config.get("num_local_experts") or config.get("num_experts"):
        keys |= {"expert_count": experts, "expert_used_count": config["num_experts_per_tok"]}
    if config["model_type"] == "qwen3_moe":
        keys["expert_feed_forward_length"] = config["moe_intermediate_size"]
    if config["model_type"] == "mistral" and config["sliding_window"]:
        keys["attention.sliding_window"] = config["sliding_window"]
    return {f"{architecture}.{name}": value for name, value in keys.items()}


def add_key(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


def renamed(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """The tensors under llama.cpp's names; of a Llama, rows of queries and keys in its order too."""
    found = {}
    for name, tensor in tensors.items():
        module, kind = name.rsplit(".", 1)
        (own,) = {re.sub(old, new, module) for old, new in NAMES.items() if re.fullmatch(old, module)}
        array = tensor.float().numpy()
        heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}.get(own[-1])
        if ".attn_" in own and heads and config["model_type"] in ("llama", "mistral", "mixtral"):
            halves = array.reshape(heads, 2, config["head_dim"] // 2, -1)
            array = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))
        found[f"{own}.{kind}"] = array
    return found


def stack(tensors: dict[str, Any]) -> dict[str, Any]:
    """Experts' tensors put together, expert first."""
    experts: dict[str, list[np.ndarray]] = {}
    for name in sorted(tensors, key=lambda name: [int(part) for part in re.findall(r"\d+", name)]):
        if match := re.fullmatch(r"(blk\.\d+\.ffn_(?:gate|up|down))\.\d+\.weight", name):
            experts.setdefault(f"{match[1]}_exps.weight", []).append(tensors.pop(name))
    return tensors | {name: np.stack(arrays) for name, arrays in experts.items()}


def llama3_factors(config: dict[str, Any]) -> np.ndarray:
    """By how much each frequency is divided."""
    rope, factors = config["rope_parameters"], []
    context = rope["original_max_position_embeddings"]
    for i in range(0, config["head_dim"], 2):
        turns = context / (2 * math.pi * rope["rope_theta"] ** (i / config["head_dim"]))
        share = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
        share = min(max(share, 0.0), 1.0)
        factors.append(1 / (share + (1 - share) / rope["factor"]))
    return np.array(factors, dtype=np.float32)
