"""The weights that training changes: which they are, their learning rates, and their values under their names."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from mla_converters.options.common import Train
from mla_converters.support.packages import require
from mla_converters.training.parametrization import split_projections
from mla_converters.training.relative import relative_rates, root_mean_square
from mla_converters.training.sharding import whole
from mla_converters.training.teachers import ATTENTION

PROJECTIONS = ("q_proj", "k_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
ADAPTER = "default"


def make_trainable(student: PreTrainedModel, choice: Train, lora_rank: int, seed: int) -> None:
    """Choose the weights of a converted model that training changes.

    They become float32, because steps are smaller than the resolution of bfloat16.

    Args:
        student: changed in place; all other weights stay as they are.
        choice: the weights of the attentions; all weights; or low-rank changes of the attentions' matrices (LoRA,
            arXiv 2106.09685), and the maps to rotary queries, which are small.
        lora_rank: rank of these changes.
        seed: of their start.

    Raises:
        ConversionError: low-rank changes need peft, which is not installed.
    """
    student.requires_grad_(False).eval()
    attentions = [layer.self_attn for layer in student.model.layers]
    if choice == "lora":
        _add_adapters(student, lora_rank, seed)
        for attention in attentions:
            if attention.q_rope_map is not None:
                attention.q_rope_map.requires_grad_(True)
    else:
        split_projections(attentions)
        for module in (student,) if choice == "all" else attentions:
            module.requires_grad_(True)
    for parameter in trained_parameters(student):
        parameter.data = parameter.data.float()


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that training changes."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def learning_rates(model: nn.Module, rate: float) -> list[dict[str, Any]]:
    """Groups for an optimizer. A step changes each matrix by about ``rate`` times its root mean square.

    A low-rank change ``s B A`` begins at zero, with ``B``. A step of size ``l`` changes ``B`` in all ``r`` columns by
    about ``l``, and so the matrix by about ``s l r^(1/2)`` times the root mean square of ``A``; ``l`` is chosen to
    make that the same as without LoRA.
    """
    groups, adapted = [], set()
    for module in model.modules():
        if hasattr(module, "lora_A"):
            down, up = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
            size = root_mean_square(down)
            reach = module.scaling[ADAPTER] * up.shape[1] ** 0.5 * size
            groups.append({"params": [up], "lr": rate * root_mean_square(module.base_layer.weight) / reach})
            groups.append({"params": [down], "lr": rate * size})
            adapted |= {down, up}
    return groups + relative_rates((weight for weight in trained_parameters(model) if weight not in adapted), rate)


def trained_tensors(student: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor that training changed, whole, under its name in a checkpoint.

    If they are sharded, all processes must iterate together.
    """
    for path, module in student.named_modules():
        if isinstance(module, parametrize.ParametrizationList) or ".lora_" in path:
            continue  # these are parts of the module around them
        # Both attentions of a layer are in one module.
        place = path.replace(f"{ATTENTION}student", ATTENTION.rstrip("."))
        for name, tensor in _trained_in(module):
            # transformers stacks experts, and files hold them one by one.
            yield from revert_weight_conversion(student, {f"{place}.{name}": tensor}).items()


def _trained_in(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The trained tensors of a module itself, by their names in it."""
    if hasattr(module, "lora_A"):
        down, up = whole(module.lora_A[ADAPTER].weight), whole(module.lora_B[ADAPTER].weight)
        yield "weight", whole(module.base_layer.weight).float() + module.scaling[ADAPTER] * up @ down
    if parametrize.is_parametrized(module):
        for name, parts in module.parametrizations.items():
            yield name, parts[0](*map(whole, parts.parameters()))
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.requires_grad:
            yield name, whole(parameter)


def _add_adapters(student: PreTrainedModel, rank: int, seed: int) -> None:
    require("peft", "--train lora", "run pip install peft, or leave it out")
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(seed)  # the start must be the same in all processes
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(PROJECTIONS)), student)
