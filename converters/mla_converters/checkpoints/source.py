"""Reading the model to convert: a Hugging Face folder, a hub id, or a GGUF file."""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mla_converters.checkpoints.families import Family, check_config, find_family, source_head_dim
from mla_converters.checkpoints.folder import write_folder
from mla_converters.checkpoints.locate import local_path, model_file, not_on_the_hub
from mla_converters.checkpoints.reader import INDEX
from mla_converters.checkpoints.stored import Stored, config_from_dict, stored_in_folder, stored_in_gguf
from mla_converters.checkpoints.tensors import check_tensors
from mla_converters.checkpoints.tokenizer import load_tokenizer
from mla_converters.errors import ConversionError

# Everything that travels with a model besides its configuration and weights.
SIDE_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
)
CODE = "*.py"  # travels too where it is trusted


class Source:
    """A model, opened and checked; tensors are read one at a time.

    Args:
        name: hub id or path, as the user gave it.
        stored: where all of it is.
        revision: hub revision asked for, or None.
        trust_remote_code: whether code that comes with the tokenizer may run.

    Attributes:
        folder: where the tokenizer and other side files are.
        unknown_keys: keys that were not understood, of a GGUF file.
        family: the source's family.
        raw_config: its ``config.json``.
        config: its transformers configuration.
    """

    def __init__(self, name: str, stored: Stored, revision: str | None = None, trust_remote_code: bool = False) -> None:
        self.name = name
        self.revision = revision
        self.trust_remote_code = trust_remote_code
        self.folder = stored.folder
        self.unknown_keys = stored.unknown_keys
        self.raw_config = stored.config
        self.family: Family = find_family(self.raw_config)
        self.config: PretrainedConfig = config_from_dict(stored.config, stored.config_name)
        check_config(self.config)
        self._stored = stored
        self._tensors = stored.tensors
        try:
            skeleton = self.skeleton()
            freqs, scale = self.rope
        except Exception as error:  # torch and transformers raise whatever the numbers provoke
            reason = str(error).strip().split("\n")[0]
            raise ConversionError(f"{stored.config_name} describes no model that can be built: {reason}") from error
        if not (torch.isfinite(freqs).all() and math.isfinite(scale)):
            raise ConversionError(f"{stored.config_name} gives RoPE frequencies that are not finite numbers.")
        check_tensors(self._tensors, skeleton, stored.config_name)
        self._check_side_files()

    def _check_side_files(self) -> None:
        """Load what is carried over unread, for what cannot be loaded here would fail when it is served."""
        if any(self.folder.glob("tokenizer*")):
            _ = self.tokenizer
        if (self.folder / "generation_config.json").exists():
            try:
                GenerationConfig.from_pretrained(self.folder)
            except Exception as error:  # transformers takes any content for its fields
                reason = str(error).strip().split("\n")[0]
                raise ConversionError(f"generation_config.json in {self.folder} cannot be loaded: {reason}") from error

    @cached_property
    def model_folder(self) -> Path:
        """A folder from which transformers and vLLM load the model; of a GGUF file, a copy that lasts as long as the
        source is open.

        Raises:
            ConversionError: there is no room for the copy.
        """
        if self._stored.unpacked is None:
            return self.folder
        self.write_folder(self._stored.unpacked)
        return self._stored.unpacked

    def write_folder(self, folder: Path) -> None:
        """Write the model as a Hugging Face folder; see :func:`mla_converters.checkpoints.folder.write_folder`."""
        write_folder(folder, self.raw_config, self._tensors, self.side_files())

    @property
    def head_dim(self) -> int:
        """Head size ``d``."""
        return source_head_dim(self.config)

    @cached_property
    def rope(self) -> tuple[torch.Tensor, float]:
        """RoPE: ``[d / 2]`` frequencies in float32, and the attention factor on cos and sin."""
        rotary = type(self.skeleton().model.rotary_emb)(self.config)
        return rotary.inv_freq.float(), float(rotary.attention_scaling)

    @property
    def softmax_scale(self) -> float:
        """Factor on the scores, the RoPE attention factor included."""
        return self.head_dim**-0.5 * self.rope[1] ** 2

    @property
    def has_qk_norm(self) -> bool:
        """Whether queries and keys are normalised before RoPE."""
        return "model.layers.0.self_attn.k_norm.weight" in self._tensors

    def skeleton(self) -> PreTrainedModel:
        """The source's transformers model without weights (meta device)."""
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return self._tensors.names()

    def dtype(self) -> torch.dtype:
        """The dtype of the embedding, which stands for the checkpoint's."""
        dtype = self._tensors.dtype("model.embed_tokens.weight")
        assert dtype is not None, "checked when the source was opened"
        return dtype

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor; see :meth:`Tensors.tensor`."""
        return self._tensors.tensor(name)

    def meta(self, name: str) -> torch.Tensor:
        """A tensor's shape and dtype, on the meta device."""
        return self._tensors.meta(name)

    def layer_names(self, index: int) -> list[str]:
        """Names of a layer's tensors, as below ``model.layers.N.``, sorted."""
        prefix = f"model.layers.{index}."
        return [name.removeprefix(prefix) for name in self.names() if name.startswith(prefix)]

    def layer_tensor(self, index: int, name: str) -> torch.Tensor:
        """Read one tensor of a layer, named as below ``model.layers.N.``; see :meth:`tensor`."""
        return self.tensor(f"model.layers.{index}.{name}")

    def attention_weights(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors of a layer's attention, named as below ``self_attn.``."""
        return {name: self.layer_tensor(index, f"self_attn.{name}") for name in self.attention_names(index)}

    def attention_names(self, index: int) -> list[str]:
        """Names of the tensors of a layer's attention, as below ``self_attn.``."""
        prefix = "self_attn."
        return [name.removeprefix(prefix) for name in self.layer_names(index) if name.startswith(prefix)]

    def other_names(self, index: int) -> list[str]:
        """Names of a layer's tensors that are none of its attention's, as below ``model.layers.N.``."""
        return [name for name in self.layer_names(index) if not name.startswith("self_attn.")]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The source's tokenizer."""
        return load_tokenizer(self.folder, self.trust_remote_code)

    def files(self) -> list[Path]:
        """All files of the user's that are read or carried over."""
        described = [] if self._stored.unpacked else [self.folder / "config.json", *self.side_files()]
        return [*described, *self._tensors.files()]

    def side_files(self) -> Iterator[Path]:
        """Files to carry over unchanged."""
        for pattern in _side_patterns(self.trust_remote_code):
            yield from sorted(path for path in self.folder.glob(pattern) if path.is_file())


def _side_patterns(trust_remote_code: bool) -> tuple[str, ...]:
    return (*SIDE_FILES, CODE) if trust_remote_code else SIDE_FILES


@contextmanager
def open_source(source: str, revision: str | None = None, trust_remote_code: bool = False) -> Iterator[Source]:
    """Open ``source`` for the time of a ``with`` block.

    Args:
        source: a folder, a ``.gguf`` file, or a hub id.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: whether code that comes with the tokenizer may run.

    Raises:
        ConversionError: it does not exist or cannot be converted.
    """
    path = local_path(source)
    if path is not None and not path.is_dir():
        with tempfile.TemporaryDirectory(prefix="vllm-mla-gguf-") as scratch:
            yield Source(source, stored_in_gguf(model_file(path), Path(scratch)), revision)
        return
    folder = _download(source, revision, trust_remote_code) if path is None else path
    yield Source(source, stored_in_folder(folder), revision, trust_remote_code)


def _download(repo: str, revision: str | None, trust_remote_code: bool) -> Path:
    patterns = ("config.json", "README.md", "*.safetensors", INDEX, *_side_patterns(trust_remote_code))
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise not_on_the_hub(repo, error) from error
