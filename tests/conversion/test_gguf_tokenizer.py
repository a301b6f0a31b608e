"""Tokenizers of GGUF files."""

from pathlib import Path
from typing import Any

import pytest
from support.commands import convert
from support.files import TEXT
from support.gguf_files import CONTROL, OWN, TEMPLATE, Case, GgufFile
from support.models import RandomModel
from transformers import AutoTokenizer, GenerationConfig

from mla_converters.checkpoints.gguf.parts import Gguf
from mla_converters.checkpoints.gguf.tokenizer import build_tokenizer
from mla_converters.checkpoints.gguf.vocabulary import read_vocabulary

EXACT = ("--method", "exact")


def opened_tokenizer(tmp_path: Path, keys: dict[str, Any]) -> Any:
    _, (path,) = Case(RandomModel(), GgufFile(keys=keys)).write(tmp_path)
    return AutoTokenizer.from_pretrained(convert(path, tmp_path / "out", *EXACT))


def test_tokenizer(tmp_path: Path) -> None:
    """Pieces, special tokens, chat template and the ids at which a text ends."""
    tokenizer = opened_tokenizer(tmp_path, {})
    assert tokenizer.tokenize("a th 12<think>") == ["a", "Ġth", "Ġ", "1", "2", "<think>"]
    assert tokenizer.tokenize("".join(CONTROL)) == CONTROL
    text = "The 12th.\n<|im_end|><think> \tx"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text.replace("<|im_end|>", "")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert len(tokenizer) == 128 + 4 + len(CONTROL) + len(OWN)  # without rows that only pad the embedding
    assert tokenizer.chat_template == TEMPLATE
    ends = GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|endoftext|>", "<|im_end|>"]


def test_tokenizer_variants(tmp_path: Path) -> None:
    """Digits by the file's cutting, the beginning by its own word or by the kind's, templates by name."""
    keys = {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": None}
    tokenizer = opened_tokenizer(tmp_path / "a", keys | {"tokenizer.chat_template.tools": "tools"})
    assert tokenizer.convert_ids_to_tokens(tokenizer("12").input_ids) == ["<|im_start|>", "12"]
    assert tokenizer.chat_template == {"default": TEMPLATE, "tools": "tools"}
    keys = {"tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    tokenizer = opened_tokenizer(tmp_path / "b", keys)
    assert tokenizer.convert_ids_to_tokens(tokenizer("12").input_ids) == ["<|im_start|>", "1", "2", "<|im_end|>"]


def test_sentencepiece(tmp_path: Path) -> None:
    """Merged by scores, with a space before the text, and bytes for what no token has."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(128))]
    pieces += ["▁", "a", "b", "ab", "▁a", "bb", "▁ab"]
    rest = [f"[PAD{i}]" for i in range(len(pieces), 199)]
    types = [2, 3, 3] + [6] * 128 + [1] * 7 + [5] * len(rest)
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [*pieces, *rest],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [0.0] * 131 + [-9.0, -8.0, -7.0, -3.0, -2.0, -1.0, -4.0] + [0.0] * len(rest),
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.add_bos_token": None,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    tokenizer = opened_tokenizer(tmp_path / "a", keys)
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab abb\n").input_ids) == ["<s>", "▁ab", "▁a", "bb", "<0x0A>"]
    assert tokenizer.decode(tokenizer("ab abb\n").input_ids, skip_special_tokens=True) == "ab abb\n"
    tokenizer = opened_tokenizer(tmp_path / "b", keys | {"tokenizer.ggml.add_space_prefix": False})
    assert tokenizer.tokenize("ab") == ["ab"]


def test_without_tokenizer(tmp_path: Path) -> None:
    _, (path,) = Case(RandomModel(), GgufFile(keys={"tokenizer.ggml.model": "no_vocab"})).write(tmp_path)
    out = convert(path, tmp_path / "out", *EXACT)
    assert not list(out.glob("tokenizer*"))


@pytest.mark.parametrize("version", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"])
def test_mistral(version: str) -> None:
    """Mistral's own SentencePiece models, which come with mistral_common, give the same ids."""
    data = Path(pytest.importorskip("mistral_common").__file__).parent / "data" / version
    processor = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_file=str(data))
    ids = range(processor.vocab_size())
    types = {"is_unknown": 2, "is_control": 3, "is_unused": 5, "is_byte": 6}
    keys = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [processor.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [processor.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": [
            next((kind for name, kind in types.items() if getattr(processor, name)(i)), 1) for i in ids
        ],
    }
    vocabulary = read_vocabulary(Gguf(data, (data,), keys, {}))
    assert vocabulary is not None
    tokenizer = build_tokenizer(vocabulary)
    foreign = "Ünïcödé: naïve café, e\u0301 你好\uff0c世界 Привет 안녕하세요 🙂👩\u200d👧 ½"
    code = "\n\tdef f(x):  return x**2\r\n  # 12345"
    for text in (TEXT, foreign, code, " leading", "  two", " "):
        assert tokenizer.encode(text).ids == [processor.bos_id(), *processor.encode(text)]
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
