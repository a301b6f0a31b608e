"""Putting student and teacher together, so that they can be trained."""

import os
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from mla_converters.checkpoints.models import Model, load_model, read_config
from mla_converters.checkpoints.source import Source
from mla_converters.options import HealOptions
from mla_converters.support.memory import SHARDED_LARGE, return_freed_memory
from mla_converters.training.distillation import Distillation
from mla_converters.training.losses import Weights
from mla_converters.training.sharding import shard_model
from mla_converters.training.teachers import attach_source
from mla_converters.training.trained import make_trainable


def assemble(
    model: Path,
    source: Source | None,
    teacher: Model | None,
    options: HealOptions,
    dtype: torch.dtype,
    device: str,
    sharded: bool,
) -> Distillation:
    """Load a converted model beside its teacher. All processes call this together.

    Args:
        model: folder of the converted model.
        source: its source, if that is the teacher and differs from it in attentions only.
        teacher: any other teacher; None for none.
        options: what is trained, and on which loss.
        dtype: of weights that are not trained.
        device: the device of this process.
        sharded: whether the weights are sharded over the processes. The processes of a machine then load the models
            one after another, because each of them holds them whole for a moment.

    Raises:
        ConversionError: a model cannot be loaded, or ``options`` need a package that is not installed.
    """
    if sharded:
        return_freed_memory(SHARDED_LARGE)
    state = PartialState()
    turns = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if sharded else 1
    for turn in range(turns):
        if turns == 1 or turn == state.local_process_index:
            joined = _load(model, source, teacher, options, dtype, "cpu" if sharded else device)
            if sharded:
                shard_model(joined, joined.in_turn, dtype, torch.device(device).type)
        state.wait_for_everyone()
    return joined


def _load(
    model: Path, source: Source | None, teacher: Model | None, options: HealOptions, dtype: torch.dtype, device: str
) -> Distillation:
    losses = options.losses
    weights = Weights(losses.get("kl", 0.0), losses.get("lm", 0.0), options.temperature)
    student = _loaded(Model(str(model), str(model), read_config(model, False)), dtype, device)
    student.set_attn_implementation(options.attention)
    make_trainable(student, options.train, options.lora_rank, options.seed)
    attentions = None if source is None else attach_source(student, source, dtype)
    other = None if teacher is None else _loaded(teacher, dtype, device)
    return Distillation(student, weights, attentions=attentions, teacher=other)


def _loaded(model: Model, dtype: torch.dtype, device: str) -> PreTrainedModel:
    network = load_model(model, dtype, device)
    for module in network.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            # A view of the file would keep all of it mapped, also when nothing else of it is needed any more.
            setattr(module, name, buffer.clone())
    return network
