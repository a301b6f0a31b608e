"""A checkpoint folder as transformers takes it, and loading one."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from mla_converters.checkpoints.quantised.config import METHODS, find_quantisation
from mla_converters.checkpoints.quantised.tensors import dequantised
from mla_converters.checkpoints.reader import INDEX, SINGLE, Checkpoint
from mla_converters.support.json_files import write_json


@contextmanager
def loadable(name: str | Path) -> Iterator[str | Path]:
    """What to give ``from_pretrained`` for a model: its name, or for shards without an index a folder with one.

    Args:
        name: folder or hub id.

    Yields:
        The name; or a folder of links to the same files and an index, for the time of the ``with`` block.

    Raises:
        ConversionError: the weights cannot be read.
    """
    folder = Path(name)
    if not folder.is_dir() or any((folder / file).exists() for file in (SINGLE, INDEX)):
        yield name
        return
    weight_map = Checkpoint(folder).weight_map()
    with tempfile.TemporaryDirectory(prefix="vllm-mla-index-") as scratch:
        for path in folder.iterdir():
            Path(scratch, path.name).symlink_to(path.resolve())
        write_json(Path(scratch, INDEX), {"metadata": {}, "weight_map": weight_map})
        yield scratch


def from_pretrained(name: str | Path, config: PretrainedConfig, **options: Any) -> Any:
    """Load a model with transformers, which gets the dequantised weights of a quantised folder.

    transformers' own quantisers need further packages and, for most formats, a GPU.

    Args:
        name: folder or hub id.
        config: its transformers configuration.
        options: for ``AutoModelForCausalLM.from_pretrained``, whose result is returned.

    Raises:
        ConversionError: the weights cannot be read.
    """
    settings = getattr(config, "quantization_config", None)
    if not isinstance(settings, dict) or settings.get("quant_method") not in METHODS or not Path(name).is_dir():
        with loadable(name) as path:
            return AutoModelForCausalLM.from_pretrained(path, config=config, **options)
    tensors = dequantised(Checkpoint(Path(name)), find_quantisation({"quantization_config": settings}), config)
    plain = deepcopy(config)
    del plain.quantization_config
    weights = {tensor: tensors.tensor(tensor) for tensor in tensors.names()}
    with torch.device("meta"):
        model_class = type(AutoModelForCausalLM.from_config(plain))
    options.pop("trust_remote_code", None)  # whose code would need a folder
    return model_class.from_pretrained(None, config=plain, state_dict=weights, **options)
