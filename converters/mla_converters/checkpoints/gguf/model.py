"""A GGUF model, opened: its configuration, its tensors, and the files that go beside them."""

from pathlib import Path

from mla_converters.checkpoints.gguf.config import describe
from mla_converters.checkpoints.gguf.parts import read_parts
from mla_converters.checkpoints.gguf.reader import GgufTensors
from mla_converters.checkpoints.gguf.tokenizer import write_tokenizer
from mla_converters.checkpoints.gguf.vocabulary import read_vocabulary
from mla_converters.support.json_files import write_json


class GgufModel:
    """A model in a GGUF file, or in several. Only headers are read until tensors are asked for.

    Args:
        path: the file, or any part of a split one.

    Attributes:
        config: as in a Hugging Face ``config.json``.
        config_name: where it stands, for messages.
        tensors: under the names of a Hugging Face checkpoint.
        unknown_keys: keys of the header that were not understood, and may or may not matter.

    Raises:
        ConversionError: it is no GGUF file, is not whole, or cannot be converted.
    """

    def __init__(self, path: Path) -> None:
        self._gguf = read_parts(path)
        self._vocabulary = read_vocabulary(self._gguf)
        described = describe(self._gguf, self._vocabulary)
        self.config = described.config
        self.config_name = f"the header of {path}"
        self.unknown_keys = described.unknown_keys
        self.tensors = GgufTensors(self._gguf, described.family, described.heads)

    def write_side_files(self, folder: Path) -> None:
        """Write ``config.json`` and the tokenizer's files, which a Hugging Face folder has besides the weights.

        Raises:
            ConversionError: the tokenizer cannot be built.
        """
        write_json(folder / "config.json", self.config)
        if self._vocabulary is not None:
            write_tokenizer(self._gguf, self._vocabulary, folder)
