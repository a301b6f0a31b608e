"""Loading tokenizers: those of sources as transformers opens them, and those that bring Python code of their own."""

from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.integrations.mistral import convert_tekken_tokenizer
from transformers.utils import cached_file

from mla_converters.errors import ConversionError

MISTRAL = "MistralCommonBackend"  # transformers' class for what mistral-common tokenises
SPACED, JOINED = "two words", "twowords"


def load_tokenizer(source: str | Path, trust_remote_code: bool, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or hub id.

    transformers 5 corrects tokenizers whose files say something wrong, some by the ``model_type`` beside them and some
    by the repository's id. So what the user gave must arrive here as the user gave it: an id as an id, not as the
    folder in which the hub's cache keeps it.

    Args:
        source: where it is.
        trust_remote_code: whether code that it brings may run. Said either way, or transformers would ask on a
            terminal.
        revision: of a hub id.

    Raises:
        ConversionError: it cannot be loaded, or brings code.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, revision=revision)
        return _from_tekken(tokenizer, source, revision) if type(tokenizer).__name__ == MISTRAL else tokenizer
    except Exception as error:  # tokenizers raises bare Exception
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise ConversionError(
                f"The tokenizer in {source} brings Python code, which does not run unasked: read it, and if you trust "
                "it give --trust-remote-code."
            ) from error
        raise ConversionError(f"The tokenizer in {source} cannot be loaded: {error}") from error


def _from_tekken(
    tokenizer: PreTrainedTokenizerBase, source: str | Path, revision: str | None
) -> PreTrainedTokenizerBase:
    """The same ids as mistral-common gives, from a tokenizer that can be saved and that has a Jinja chat template."""
    converted = convert_tekken_tokenizer(cached_file(source, "tekken.json", revision=revision))
    converted.padding_side = tokenizer.padding_side
    converted.add_bos_token = True  # as mistral-common does; transformers' converter leaves it out
    return converted


def drops_spaces(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    """Whether a tokenizer was opened as one of another kind, which shows by spaces that its own file would keep.

    ``LlamaTokenizer`` over a ByteLevel ``tokenizer.json`` looks for spaces as ``▁``, which that vocabulary has not.

    Args:
        tokenizer: as transformers opened it.
        folder: with its files.
    """
    path = folder / "tokenizer.json"
    if _ids(tokenizer, SPACED) != _ids(tokenizer, JOINED) or not path.is_file():
        return False
    own = Tokenizer.from_file(str(path))
    return own.encode(SPACED).ids != own.encode(JOINED).ids


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids
