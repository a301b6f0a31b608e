"""Reading the model to convert: a Hugging Face folder, a hub id, or a GGUF file."""

import math
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mla_converters.checkpoints.families import check_config, find_family, source_head_dim
from mla_converters.checkpoints.kinds import (
    files_below,
    refuse_no_checkpoint,
    refuse_other_tasks,
    refuse_other_tensors,
)
from mla_converters.checkpoints.locate import local_path, not_a_model_file
from mla_converters.checkpoints.reader import Checkpoint
from mla_converters.checkpoints.repository import fetch_checkpoint
from mla_converters.checkpoints.shape import Shape, shape_of
from mla_converters.checkpoints.side_files import has_tokenizer, side_files
from mla_converters.checkpoints.tokenizer import load_tokenizer
from mla_converters.errors import ConversionError
from mla_converters.support.json_files import read_json_object
from vllm_mla_plugin.checkpoint.families import Family

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Source:
    """A checkpoint folder, opened and checked; tensors are read one at a time.

    Attributes:
        name: hub id or path, as the user gave it.
        revision: hub revision asked for, or None.
        trust_remote_code: whether code that comes with the tokenizer may run.
        folder: where the files are.
        family: the source's family.
        raw_config: its ``config.json``.
        config: its transformers configuration.
        warnings: what the user should know of it.
    """

    def __init__(self, name: str, folder: Path, revision: str | None = None, trust_remote_code: bool = False) -> None:
        self.name = name
        self.revision = revision
        self.trust_remote_code = trust_remote_code
        self.folder = folder
        self.warnings: list[str] = []
        if not (folder / "config.json").exists():
            refuse_no_checkpoint(folder, name, files_below(folder))
        self.raw_config = read_json_object(folder / "config.json")
        refuse_other_tasks(folder, self.raw_config)
        self.family: Family = find_family(self.raw_config)
        try:
            self.config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # transformers validates with many exception types
            raise ConversionError(f"{folder / 'config.json'} is not a valid configuration: {error}") from error
        check_config(self.config)
        self._checkpoint = Checkpoint(folder, self.family.experts)
        refuse_other_tensors(self._checkpoint.names())
        self._settle_head()
        try:
            skeleton = self.skeleton()
            freqs, scale = self.rope
        except Exception as error:  # torch and transformers raise whatever the numbers provoke
            reason = str(error).strip().split("\n")[0]
            raise ConversionError(f"{folder / 'config.json'} describes no model that can be built: {reason}") from error
        if not (torch.isfinite(freqs).all() and math.isfinite(scale)):
            raise ConversionError(f"{folder / 'config.json'} gives RoPE frequencies that are not finite numbers.")
        self._check_tensors(skeleton)
        self._check_side_files()

    def _check_tensors(self, skeleton: PreTrainedModel) -> None:
        """Compare names, shapes and dtypes with what the configuration asks for; report all at once."""
        # Derived tensors that some checkpoints carry along; the model does not read them.
        for name in self._checkpoint.names():
            if name.endswith("rotary_emb.inv_freq"):
                self._checkpoint.ignore(name)
        problems = self._checkpoint.problems(skeleton)
        if problems:
            more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise ConversionError(
                f"The weights in {self.folder} do not fit config.json: {'; '.join(problems[:5])}{more}."
            )

    def _settle_head(self) -> None:
        """Where the configuration ties the output head to the embedding, but the file has a head: keep another one, as
        transformers does."""
        if not (self.config.tie_word_embeddings and HEAD in self._checkpoint and EMBEDDING in self._checkpoint):
            return
        head, embedding = self.tensor(HEAD), self.tensor(EMBEDDING)
        if head.shape == embedding.shape and bool((head == embedding).all()):
            self._checkpoint.ignore(HEAD)
            return
        self.config.tie_word_embeddings = self.raw_config["tie_word_embeddings"] = False
        self.warnings.append(
            "The source's config.json ties the output head to the embedding, but its weights hold another head: OUT "
            "has that head, and does not tie."
        )

    def _check_side_files(self) -> None:
        """Load the files that are carried over unread, because one that cannot be loaded here would fail in serving."""
        if has_tokenizer(self.folder):
            _ = self.tokenizer
        if (self.folder / "generation_config.json").exists():
            try:
                GenerationConfig.from_pretrained(self.folder)
            except Exception as error:  # transformers takes any content for its fields
                reason = str(error).strip().split("\n")[0]
                raise ConversionError(f"generation_config.json in {self.folder} cannot be loaded: {reason}") from error

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

    @cached_property
    def shape(self) -> Shape:
        """Its sizes."""
        return shape_of(self.config, self.skeleton(), self.dtype().itemsize)

    def skeleton(self) -> PreTrainedModel:
        """The source's transformers model without weights (meta device)."""
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return self._checkpoint.names()

    def dtype(self) -> torch.dtype:
        """The dtype of most of the numbers, which stands for the checkpoint's."""
        numbers: Counter[torch.dtype] = Counter()
        for name in self.names():
            numbers[self.meta(name).dtype] += self.meta(name).numel()
        return numbers.most_common(1)[0][0]

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor; see :meth:`Checkpoint.tensor`."""
        return self._checkpoint.tensor(name)

    def meta(self, name: str) -> torch.Tensor:
        """A tensor's shape and dtype, on the meta device."""
        return self._checkpoint.meta(name)

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
        """Names of a layer's tensors outside its attention, as below ``model.layers.N.``."""
        return [name for name in self.layer_names(index) if not name.startswith("self_attn.")]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The source's tokenizer, as transformers opens what the user named."""
        if local_path(self.name) is None:
            return load_tokenizer(self.name, self.trust_remote_code, self.revision)
        return load_tokenizer(self.folder, self.trust_remote_code)

    def files(self) -> list[Path]:
        """All files that are read or carried over."""
        return [self.folder / "config.json", *self._checkpoint.files(), *self.side_files()]

    def side_files(self) -> Iterator[Path]:
        """Files to carry over unchanged."""
        return side_files(self.folder, self.trust_remote_code)


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
    with ExitStack() as stack:
        path = local_path(source)
        if path is None:
            folder = fetch_checkpoint(source, revision, trust_remote_code)
        elif path.is_dir():
            folder = path
        else:
            folder = unpacked_gguf(source, stack)
        yield Source(source, folder, revision, trust_remote_code)


def unpacked_gguf(name: str, stack: ExitStack) -> Path:
    """A GGUF file as a folder, for as long as ``stack`` is open.

    Raises:
        ConversionError: ``name`` is not a GGUF file.
    """
    path = Path(name)
    if path.suffix != ".gguf":
        raise not_a_model_file(name)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-mla-gguf-")))
    unpack_gguf(path, folder)
    return folder


def unpack_gguf(path: Path, folder: Path) -> None:
    """Write a GGUF file as a float32 Hugging Face folder, through transformers' own reader."""
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # gguf and transformers raise whatever the bytes provoke
        raise ConversionError(f"{path} is not a GGUF file that transformers can read: {error}") from error
    # The tensors are plain floats by now, but transformers still calls the model quantised and would not save it.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
