"""Reading the model to convert: a Hugging Face folder, a hub id, or a GGUF file."""

import math
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from mla_converters.checkpoints.attention_layout import AttentionLayout
from mla_converters.checkpoints.families import source_head_dim
from mla_converters.checkpoints.folder import write_folder
from mla_converters.checkpoints.locate import local_path, model_file
from mla_converters.checkpoints.repository import fetch_checkpoint
from mla_converters.checkpoints.shape import Shape, shape_of
from mla_converters.checkpoints.side_files import has_tokenizer, side_files
from mla_converters.checkpoints.stored import Stored, stored_in_folder, stored_in_gguf
from mla_converters.checkpoints.tensors import check_tensors
from mla_converters.checkpoints.tokenizer import load_tokenizer
from mla_converters.errors import ConversionError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYERS = "model.layers."


class Source:
    """A model, opened and checked; tensors are read one at a time.

    Args:
        name: hub id or path, as the user gave it.
        stored: where all of it is.
        revision: hub revision asked for, or None.
        trust_remote_code: whether code that comes with the tokenizer may run.

    Attributes:
        folder: where the tokenizer and other side files are.
        family: the source's family.
        raw_config: its ``config.json``.
        config: its transformers configuration.
        quantisation: how its weights are quantised; None if they are not.
        unknown_keys: keys of its configuration that were not understood, and that may or may not matter.
        warnings: what the user should know of it.
    """

    def __init__(self, name: str, stored: Stored, revision: str | None = None, trust_remote_code: bool = False) -> None:
        self.name = name
        self.revision = revision
        self.trust_remote_code = trust_remote_code
        self.folder = stored.folder
        configuration = stored.configuration
        self.family, self.config, self.raw_config = configuration.family, configuration.config, configuration.raw
        self.quantisation = configuration.quantisation
        self.unknown_keys, self.warnings = configuration.unknown_keys, list(configuration.warnings)
        self._tensors, self._unpacked = stored.tensors, stored.unpacked
        self._settle_head()
        try:
            skeleton = self.skeleton()
            freqs, scale = self.rope
        except Exception as error:  # torch and transformers raise whatever the numbers provoke
            reason = str(error).strip().split("\n")[0]
            raise ConversionError(f"{configuration.name} describes no model that can be built: {reason}") from error
        if not (torch.isfinite(freqs).all() and math.isfinite(scale)):
            raise ConversionError(f"{configuration.name} gives RoPE frequencies that are not finite numbers.")
        check_tensors(self._tensors, skeleton, configuration.name)
        self._check_side_files()

    def _settle_head(self) -> None:
        """Where the configuration ties the output head to the embedding, but the file has a head: keep another one, as
        transformers does."""
        if not (self.config.tie_word_embeddings and HEAD in self._tensors and EMBEDDING in self._tensors):
            return
        head, embedding = self.tensor(HEAD), self.tensor(EMBEDDING)
        if head.shape == embedding.shape and bool((head == embedding).all()):
            self._tensors.ignore(HEAD)
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

    @cached_property
    def model_folder(self) -> Path:
        """A folder from which transformers and vLLM load the model; of a GGUF file, a copy that lasts as long as the
        source is open.

        Raises:
            ConversionError: there is no room for the copy.
        """
        if self._unpacked is None:
            return self.folder
        self.write_folder(self._unpacked)
        return self._unpacked

    def write_folder(self, folder: Path) -> None:
        """Write the model as a Hugging Face folder; see :func:`mla_converters.checkpoints.folder.write_folder`."""
        write_folder(folder, self.raw_config, self._tensors, self.folder)

    @property
    def head_dim(self) -> int:
        """Head size ``d``."""
        return source_head_dim(self.config)

    @cached_property
    def rope(self) -> tuple[torch.Tensor, float]:
        """RoPE: ``[rotary / 2]`` frequencies in float32, and the attention factor on cos and sin."""
        rotary = type(self.skeleton().model.rotary_emb)(self.config)
        return rotary.inv_freq.float(), float(rotary.attention_scaling)

    @cached_property
    def layout(self) -> AttentionLayout:
        """How it lays out its attention."""
        return AttentionLayout(
            self.config.num_attention_heads,
            self.config.num_key_value_heads,
            self.head_dim,
            rotary_dim=2 * len(self.rope[0]),
            interleaved=self.family.interleaved,
        )

    def frequencies(self, index: int) -> torch.Tensor:
        """``[d / 2]`` RoPE frequencies of a layer in radians per position, float32; 0 for what never turns."""
        with_rope = getattr(self.config, "no_rope_layers", None)  # 1 for a layer with RoPE, in spite of the name
        frequencies = self.layout.frequencies(self.rope[0])
        return frequencies if with_rope is None or with_rope[index] else torch.zeros_like(frequencies)

    @cached_property
    def softmax_scale(self) -> float:
        """Factor on the scores, the RoPE attention factor included."""
        return self.skeleton().model.layers[0].self_attn.scaling * self.rope[1] ** 2

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
        return self._tensors.names()

    def dtype(self) -> torch.dtype:
        """The dtype of most of the numbers, which stands for the checkpoint's."""
        numbers: Counter[torch.dtype] = Counter()
        for name in self.names():
            numbers[self.meta(name).dtype] += self.meta(name).numel()
        return numbers.most_common(1)[0][0]

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor; see :meth:`mla_converters.checkpoints.tensors.Tensors.tensor`."""
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
        """The tensors of a layer's attention in the common layout, named as below ``self_attn.``; see
        :class:`AttentionLayout`."""
        weights = {name: self.layer_tensor(index, f"self_attn.{name}") for name in self.attention_names(index)}
        return self.layout.canonical(weights, self._factors(index))

    def converted_attention(self, index: int, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A layer's converted projections, with queries as this source stores them; see
        :meth:`AttentionLayout.in_source_order`."""
        return self.layout.in_source_order(weights, self._factors(index))

    def _factors(self, index: int) -> torch.Tensor | None:
        """Factors ``[d]`` on queries and keys: the attention factor is a part of the softmax scale, but is not for
        components that never turn."""
        still = self.frequencies(index).repeat(2) == 0
        return torch.where(still, 1 / self.rope[1], 1.0) if self.rope[1] != 1 and still.any() else None

    def attention_meta(self, index: int) -> dict[str, torch.Tensor]:
        """Shapes and dtypes of the same, on the meta device."""
        names = self.attention_names(index)
        return self.layout.canonical({name: self.meta(f"{LAYERS}{index}.self_attn.{name}") for name in names})

    def attention_names(self, index: int) -> list[str]:
        """Names of the tensors of a layer's attention, as below ``self_attn.``."""
        prefix = "self_attn."
        return [name.removeprefix(prefix) for name in self.layer_names(index) if name.startswith(prefix)]

    def other_names(self, index: int) -> list[str]:
        """Names of a layer's tensors outside its attention, as below ``model.layers.N.``."""
        return [name for name in self.layer_names(index) if not name.startswith("self_attn.")]

    def carried_names(self, index: int | None = None) -> list[str]:
        """Names of the stored tensors that OUT keeps as they are: those of a layer outside its attention, or with None
        those of no layer."""
        if index is None:
            names = [name for name in self.names() if not name.startswith(LAYERS)]
        else:
            names = [f"{LAYERS}{index}.{name}" for name in self.other_names(index)]
        return [part for name in names for part in self._tensors.parts(name)]

    def carried(self, name: str) -> torch.Tensor:
        """Read one of the tensors that OUT keeps; see :meth:`tensor`."""
        return self._tensors.stored.tensor(name)

    def carried_meta(self, name: str) -> torch.Tensor:
        """The shape and dtype of a tensor that OUT keeps, on the meta device."""
        return self._tensors.stored.meta(name)

    def carried_saving(self) -> int:
        """Bytes by which the tensors that OUT keeps are smaller than as plain floats."""
        names = [name for name in self.names() if ".self_attn." not in name and self._tensors.parts(name) != [name]]
        kept = [self.carried_meta(part) for name in names for part in self._tensors.parts(name)]
        plain = [self.meta(name) for name in names]
        return sum(tensor.nbytes for tensor in plain) - sum(tensor.nbytes for tensor in kept)

    def is_quantised(self, name: str) -> bool:
        """Whether a stored tensor belongs to a quantised module."""
        return name not in self._tensors or self._tensors.parts(name) != [name]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The source's tokenizer, as transformers opens what the user named."""
        if local_path(self.name) is None:
            return load_tokenizer(self.name, self.trust_remote_code, self.revision)
        return load_tokenizer(self.folder, self.trust_remote_code)

    def files(self) -> list[Path]:
        """All files of the user's that are read or carried over."""
        described = [] if self._unpacked else [self.folder / "config.json", *self.side_files()]
        return [*described, *self._tensors.files()]

    def side_files(self) -> Iterator[Path]:
        """Files to carry over unchanged."""
        return side_files(self.folder, self.trust_remote_code)


@contextmanager
def open_source(
    source: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    rope_scaling: dict[str, Any] | None = None,
) -> Iterator[Source]:
    """Open ``source`` for the time of a ``with`` block.

    Args:
        source: a folder, a ``.gguf`` file, or a hub id.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: whether code that comes with the tokenizer may run.
        rope_scaling: a RoPE scaling to add; see :func:`mla_converters.checkpoints.rope_scaling.scale_rope`.

    Raises:
        ConversionError: it does not exist or cannot be converted.
    """
    path = local_path(source)
    if path is not None and not path.is_dir():
        with tempfile.TemporaryDirectory(prefix="vllm-mla-gguf-") as scratch:
            yield Source(source, stored_in_gguf(model_file(path), Path(scratch), rope_scaling), revision)
        return
    folder = fetch_checkpoint(source, revision, trust_remote_code) if path is None else path
    yield Source(source, stored_in_folder(folder, source, rope_scaling), revision, trust_remote_code)
