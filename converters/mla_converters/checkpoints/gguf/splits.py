"""How byte-level tokenizers cut text before they merge bytes, by the name that a GGUF file gives in
``tokenizer.ggml.pre``."""

from dataclasses import dataclass

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Sequence, Split

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"
QWEN2 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
)


DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}")


@dataclass(frozen=True)
class Cutting:
    """How one kind of byte-level tokenizer prepares text.

    Attributes:
        patterns: of pieces that are cut out, one pattern after the other.
        words: whether GPT-2's own pattern cuts what these leave.
        composed: whether text is brought into Unicode's composed form (NFC) first.
        whole_words: whether a piece that is a token is taken whole, without merging.
        begins: whether the beginning-of-sequence token is added where the file does not say.
    """

    patterns: tuple[str, ...] = ()
    words: bool = False
    composed: bool = False
    whole_words: bool = False
    begins: bool = False

    def steps(self) -> PreTokenizer:
        """The steps as the tokenizers library takes them."""
        cuts = [Split(Regex(pattern), "isolated") for pattern in self.patterns]
        return Sequence([*cuts, ByteLevel(add_prefix_space=False, use_regex=self.words)])


_DIGITS = Cutting((r"\p{N}",), words=True)
_LLAMA3 = Cutting((LLAMA3,), whole_words=True, begins=True)
_QWEN2 = Cutting((QWEN2,), composed=True)
CUTTINGS = {
    "gpt-2": Cutting(words=True),
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "falcon3": _LLAMA3,
    "smaug-bpe": Cutting((LLAMA3,)),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "deepseek-coder": Cutting(DEEPSEEK_CODER),
    "tekken": Cutting((TEKKEN,), whole_words=True, begins=True),
}
