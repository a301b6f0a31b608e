"""Tokenizers of the kinds that people's models have, small, and a vLLM process that tells the ids they give."""

import json
import os
from pathlib import Path
from typing import Any

from support.files import ROOT, TEXT
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL = ("<|begin|>", "<|end|>", "<|turn|>")
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
TURNS = [
    {"role": "user", "content": "  What is 12 * 12?\tShow it."},
    {"role": "assistant", "content": "It's 144.\n\n```python\nprint(12 * 12)\n```"},
    {"role": "user", "content": "Größer? 你好 🎉"},
]
LINES = (
    "Größe, naïve façade, Ærøskøbing, Łódź; e\u0301 or \u00e9. Ελλάδα Россия שלום مرحبا नमस्ते สวัสดี",
    "天気がいいから、散歩しましょう。 你好\uff0c世界\uff01 안녕하세요 1234567890 ①½ 👩‍👩‍👧🇪🇺 ∑∫≠",
    "two  three   four    \tfive\r\n\n\n  it's THEY'LL don't \u00a0\u200b $1,234.56 50% a_b-c/d\\e <b>&amp;</b>",
)


def mixed_text(length: int = 10_000) -> str:
    """Prose, code, several scripts, odd spaces and chat turns."""
    code = (ROOT / "tests" / "support" / "engine.py").read_text()
    turns = "\n".join(f"{turn['role']}: {turn['content']}" for turn in TURNS)
    piece = "\n".join((*LINES, turns))
    text = "".join(f"{TEXT[i : i + 700]}{piece}{code[i : i + 900]}" for i in range(0, 4000, 500))
    assert len(text) >= length
    return text[:length]


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3, Qwen and DeepSeek have it: any text is bytes, a space is the first byte of a word."""
    tokenizer = Tokenizer(models.BPE())
    pattern = r"'(?i:s|t|re|ll)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(tokenizer, trainers.BpeTrainer(vocab_size=900, special_tokens=list(SPECIAL), initial_alphabet=alphabet))
    begin = (SPECIAL[0], tokenizer.token_to_id(SPECIAL[0]))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[0]} $A", pair=f"{SPECIAL[0]} $A $B", special_tokens=[begin]
    )
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """As Llama 2 and the first Mistral have it: spaces are ``▁``, also before the first word after a special token;
    unknown characters are bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    _train(tokenizer, trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>", *SPECIAL, *bytes_]))
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = [token for token in description["added_tokens"] if token["content"] not in bytes_]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    description["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    description["pre_tokenizer"] = None
    return Tokenizer.from_str(json.dumps(description))


def wrongly_cutting() -> Tokenizer:
    """As Mistral's files of 2024 and 2025 have it, which transformers corrects where ``fix_mistral_regex`` says so: of
    more than 100,000 tokens, and cut by another pattern than the model was trained with."""
    tokenizer = byte_level()
    description = json.loads(tokenizer.to_str())
    vocabulary = description["model"]["vocab"]
    for number in range(len(vocabulary), 100_100):
        vocabulary[f"{number} never"] = number
    return Tokenizer.from_str(json.dumps(description))


def _train(tokenizer: Tokenizer, trainer: Any) -> None:
    tokenizer.train_from_iterator([(ROOT / "LICENSE").read_text(), TEXT], trainer)


def give_tokenizer(folder: Path, tokenizer: Tokenizer, **settings: Any) -> Path:
    """Put a tokenizer into a model's folder; ``settings`` are those of its ``tokenizer_config.json``."""
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "chat_template": TEMPLATE, "model_max_length": 256}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | settings))
    return folder


def vllm_ids(folders: list[str], text: str, answer: Path) -> None:
    """Write what vLLM's tokenizers of ``folders`` make of a text and of ``TURNS``; for a process of its own."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from vllm.plugins import load_general_plugins
    from vllm.tokenizers import get_tokenizer

    load_general_plugins()
    found = {}
    for folder in folders:
        tokenizer = get_tokenizer(folder)
        found[folder] = {
            "text": tokenizer.encode(text),
            "bare": tokenizer.encode(text, add_special_tokens=False),
            "chat": tokenizer.apply_chat_template(TURNS, tokenize=True, return_dict=False),
            "decoded": tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)),
        }
    answer.write_text(json.dumps(found))
