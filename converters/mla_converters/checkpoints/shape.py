"""The model to plan for: its configuration, and what follows from that. No weights are read."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from mla_converters.checkpoints.configuration import Configuration, understand
from mla_converters.checkpoints.families import active_window, source_head_dim
from mla_converters.checkpoints.gguf.model import GgufModel
from mla_converters.checkpoints.kinds import files_below, refuse_no_checkpoint, refuse_other_tasks
from mla_converters.checkpoints.locate import local_path
from mla_converters.checkpoints.repository import fetch_config
from mla_converters.checkpoints.rope_scaling import context_length
from mla_converters.checkpoints.tensors import Tensors, check_tensors
from mla_converters.errors import ConversionError
from mla_converters.support.json_files import read_json_object

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Shape:
    """Sizes of a source that decide what a conversion gives and costs.

    Attributes:
        layers, hidden, query_heads, kv_heads, head_dim: of the transformer.
        context: longest context in tokens.
        window: the sliding window that is active within that context, or None.
        parameters: of the whole model, tied ones once.
        embedding_parameters: of the input embedding.
        layer_parameters: of one layer; of its experts only as many as a token uses.
        attention_parameters: of one layer's attention.
        expert_parameters: of all experts of all layers; 0 without experts.
        mlp_width: numbers inside a layer's MLP; 0 where all are mixtures of experts.
        qkv_parameters: of its projections to queries, keys and values.
        qkv_bias: whether these have a bias.
        qk_norm: whether each head's query and key are normalised.
        weight_bytes: of one parameter.
    """

    layers: int
    hidden: int
    query_heads: int
    kv_heads: int
    head_dim: int
    context: int
    window: int | None
    parameters: int
    embedding_parameters: int
    layer_parameters: int
    attention_parameters: int
    expert_parameters: int
    mlp_width: int
    qkv_parameters: int
    qkv_bias: bool
    qk_norm: bool
    weight_bytes: int

    @property
    def cached(self) -> int:
        """Numbers cached per token and layer: keys and values."""
        return 2 * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class PlannedSource:
    """A source of which only the configuration is known.

    Attributes:
        name: the name to give to ``vllm-mla convert``: a folder, a ``.gguf`` file or a hub id.
        revision: hub revision asked for, or None.
        architecture: as in ``config.json``.
        dtype: of the weights.
        cache_dtype: of the cache when it is served.
        shape: its sizes.
        config: its transformers configuration.
    """

    name: str
    revision: str | None
    architecture: str
    dtype: str
    cache_dtype: str
    shape: Shape
    config: PretrainedConfig

    @property
    def cache_bytes(self) -> int:
        """Bytes of one cached number."""
        return DTYPE_BYTES[self.cache_dtype]


def read_source(source: str, revision: str | None = None, dtype: str | None = None) -> PlannedSource:
    """Read and check a configuration.

    Args:
        source: a folder with ``config.json``, such a file, a ``.gguf`` file (of which only the header is read), or a
            hub id (of which only ``config.json`` is fetched).
        revision: branch, tag or commit of a hub id.
        dtype: to serve in; None is what ``vllm serve`` takes: the source's, but bfloat16 for float32.

    Raises:
        ConversionError: there is none, or ``convert`` would refuse it.
    """
    configuration, tensors = _description(source, revision)
    config, where = configuration.config, configuration.name
    try:
        # Read before building the skeleton, which overwrites it.
        stored = str(config.dtype or torch.float32).removeprefix("torch.")
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if stored not in DTYPE_BYTES:
            raise ConversionError(f"{where} says dtype {stored!r}; supported are: {', '.join(DTYPE_BYTES)}.")
        shape = shape_of(config, skeleton, DTYPE_BYTES[stored])
        if tensors is not None:
            check_tensors(tensors, skeleton, where)
    except ConversionError:
        raise
    except Exception as error:  # transformers and torch raise whatever the numbers provoke
        raise ConversionError(f"{where} is not a valid configuration: {error}") from error
    return PlannedSource(
        name=_convertible_name(source),
        revision=revision,
        architecture=configuration.family.architecture,
        dtype=stored,
        cache_dtype=dtype or ("bfloat16" if stored == "float32" else stored),
        shape=shape,
        config=config,
    )


def shape_of(config: PretrainedConfig, skeleton: torch.nn.Module, weight_bytes: int) -> Shape:
    """The sizes of a model.

    Args:
        config: its configuration.
        skeleton: transformers' model on the meta device.
        weight_bytes: of one parameter.
    """
    attention = skeleton.model.layers[0].self_attn
    fused = getattr(attention, "qkv_proj", None)
    inputs = [attention.q_proj, attention.k_proj, attention.v_proj] if fused is None else [fused]
    return Shape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        query_heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=source_head_dim(config),
        context=context_length(config),
        window=active_window(config),
        parameters=_count(skeleton),
        embedding_parameters=_count(skeleton.get_input_embeddings()),
        layer_parameters=max(_used_parameters(layer, config) for layer in skeleton.model.layers),
        attention_parameters=_count(attention),
        expert_parameters=sum(map(_expert_parameters, skeleton.model.layers)),
        mlp_width=max(0 if has_experts(layer) else config.intermediate_size for layer in skeleton.model.layers),
        qkv_parameters=sum(map(_count, inputs)),
        qkv_bias=inputs[0].bias is not None,
        qk_norm=hasattr(attention, "k_norm"),
        weight_bytes=weight_bytes,
    )


def has_experts(layer: torch.nn.Module) -> bool:
    """Whether the MLP of one of transformers' layers is a mixture of experts."""
    return hasattr(layer.mlp, "experts")


def _expert_parameters(layer: torch.nn.Module) -> int:
    return _count(layer.mlp.experts) if has_experts(layer) else 0


def _used_parameters(layer: torch.nn.Module, config: PretrainedConfig) -> int:
    """Parameters of a layer that take part in computing a token."""
    if not has_experts(layer):
        return _count(layer)
    experts = _expert_parameters(layer)
    return _count(layer) - experts + experts * config.num_experts_per_tok // layer.mlp.experts.num_experts


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _description(source: str, revision: str | None) -> tuple[Configuration, Tensors | None]:
    """A source's configuration, and its tensors where they are described in the same place."""
    path = local_path(source)
    if path is not None and path.suffix == ".gguf":
        model = GgufModel(path)
        return understand(model.config, model.config_name), model.tensors
    file = _config_file(source, path, revision)
    raw = read_json_object(file)
    refuse_other_tasks(file.parent, raw)
    return understand(raw, str(file)), None


def _config_file(source: str, path: Path | None, revision: str | None) -> Path:
    if path is None:
        return fetch_config(source, revision)
    if path.is_dir() and not (path / "config.json").exists():
        refuse_no_checkpoint(path, source, files_below(path))
    return path / "config.json" if path.is_dir() else path


def _convertible_name(source: str) -> str:
    """The source as ``convert`` takes it: the folder of a bare configuration file."""
    path = Path(source)
    return str(path.parent) if path.is_file() and path.suffix != ".gguf" else source
