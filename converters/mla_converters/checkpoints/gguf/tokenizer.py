"""A GGUF model's tokenizer as the files of a Hugging Face folder."""

from pathlib import Path
from typing import Any

from gguf.constants import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers.convert_slow_tokenizer import generate_merges

from mla_converters.checkpoints.gguf.parts import Gguf
from mla_converters.checkpoints.gguf.vocabulary import Vocabulary
from mla_converters.errors import ConversionError
from mla_converters.support.json_files import write_json

SPACE = "▁"  # SentencePiece's
TEMPLATE = "tokenizer.chat_template"
ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def write_tokenizer(gguf: Gguf, vocabulary: Vocabulary, folder: Path) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json``, ``generation_config.json`` and the chat template.

    Raises:
        ConversionError: the tokenizers library refuses the vocabulary.
    """
    try:
        tokenizer = build_tokenizer(vocabulary)
    except Exception as error:  # the library raises bare Exception
        raise ConversionError(f"{gguf.path} has a tokenizer that cannot be built: {error}") from error
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "TokenizersBackend", "clean_up_tokenization_spaces": False}
    config |= {role: vocabulary.tokens[vocabulary.ids[name]] for role, name in ROLES.items() if name in vocabulary.ids}
    templates = _templates(gguf)
    if templates.keys() == {"default"}:
        (folder / "chat_template.jinja").write_text(templates["default"], encoding="utf-8")
    elif templates:
        config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "generation_config.json", _generation(vocabulary))


def _generation(vocabulary: Vocabulary) -> dict[str, Any]:
    """``generation_config.json``, with every token that ends a text."""
    named = {"bos_token_id": vocabulary.ids.get("bos"), "pad_token_id": vocabulary.ids.get("padding")}
    ends = vocabulary.ends()
    return {name: i for name, i in named.items() if i is not None} | ({"eos_token_id": ends} if ends else {})


def build_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer that gives the ids that llama.cpp gives."""
    tokens = {text: i for i, text in enumerate(vocabulary.tokens) if text and not _is_filler(vocabulary, i)}
    tokenizer = _sentencepiece(vocabulary, tokens) if vocabulary.cutting is None else _byte_level(vocabulary, tokens)
    tokenizer.post_processor = _template(vocabulary)
    for special in (True, False):
        added = [AddedToken(text, normalized=False, special=special) for text in _added(vocabulary, special)]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    return tokenizer


def _byte_level(vocabulary: Vocabulary, tokens: dict[str, int]) -> Tokenizer:
    assert vocabulary.cutting is not None
    merges = []
    for merge in vocabulary.merges:
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    tokenizer = Tokenizer(BPE(vocab=tokens, merges=merges, ignore_merges=vocabulary.cutting.whole_words))
    if vocabulary.cutting.composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = vocabulary.cutting.steps()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(vocabulary: Vocabulary, tokens: dict[str, int]) -> Tokenizer:
    # SentencePiece merges pieces into ordinary tokens only.
    ordinary = {text: vocabulary.scores[i] for text, i in tokens.items() if vocabulary.types[i] == TokenType.NORMAL}
    unknown = vocabulary.ids.get("unknown")
    model = BPE(
        vocab=tokens,
        merges=generate_merges({text: tokens[text] for text in ordinary}, ordinary),
        unk_token=None if unknown is None else vocabulary.tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    before = [normalizers.Prepend(SPACE)] if vocabulary.adds_space else []
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    after = [decoders.Strip(" ", 1, 0)] if vocabulary.adds_space else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    return tokenizer


def _template(vocabulary: Vocabulary) -> TemplateProcessing:
    """The step that puts ``bos`` and ``eos`` around a text, where the model wants them."""
    begin, end = (
        [vocabulary.tokens[vocabulary.ids[role]]] if added else []
        for role, added in (("bos", vocabulary.adds_bos), ("eos", vocabulary.adds_eos))
    )
    special = [(text, vocabulary.tokens.index(text)) for text in {*begin, *end}]
    return TemplateProcessing(single=[*begin, "$A", *end], special_tokens=special)


def _added(vocabulary: Vocabulary, special: bool) -> list[str]:
    """Tokens that are found in text before it is cut. Decoding can leave out the special ones, and not the others."""
    roles = set(vocabulary.ids.values())
    found = []
    for i, (text, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        is_special = i in roles or kind in (TokenType.CONTROL, TokenType.UNKNOWN)
        if text and (is_special if special else kind == TokenType.USER_DEFINED and not is_special):
            found.append(text)
    return found


def _is_filler(vocabulary: Vocabulary, token: int) -> bool:
    """Whether a token only fills a row of the embedding, which has more rows than the vocabulary has tokens."""
    return vocabulary.types[token] == TokenType.UNUSED and vocabulary.tokens[token] == f"[PAD{token}]"


def _templates(gguf: Gguf) -> dict[str, str]:
    """The chat templates by name; the key without a name is the default."""
    found = {}
    for name, text in gguf.keys.items():
        if name == TEMPLATE or name.startswith(f"{TEMPLATE}."):
            if not isinstance(text, str):
                raise ConversionError(f"{gguf.path} has something else than text in {name}.")
            found[name.removeprefix(TEMPLATE).removeprefix(".") or "default"] = text
    return found
