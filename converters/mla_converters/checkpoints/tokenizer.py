"""Tokenizers that may bring Python code of their own, which runs only where the user asks for it."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mla_converters.errors import ConversionError


def load_tokenizer(source: str | Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or hub id.

    Args:
        source: where it is.
        trust_remote_code: whether code that it brings may run. Said either way, or transformers would ask on a
            terminal.

    Raises:
        ConversionError: it cannot be loaded, or brings code.
    """
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises bare Exception
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise ConversionError(
                f"The tokenizer in {source} brings Python code, which does not run unasked: read it, and if you trust "
                "it give --trust-remote-code."
            ) from error
        raise ConversionError(f"The tokenizer in {source} cannot be loaded: {error}") from error
