"""Mixtures of experts as transformers 5 keeps them: the weights of all experts of a layer stacked in one tensor."""

import re

from mla_converters.errors import ConversionError
from vllm_mla_plugin.checkpoint.families import ExpertNames

STACK = re.compile(r"(model\.layers\.\d+\.)mlp\.(experts\.gate_up_proj|experts\.down_proj|gate\.weight)")
Part = tuple[int, int, int]
"""Expert, first row and end of the rows of a stack ``[experts, rows, columns]``."""


def expert_parts(name: str, shape: list[int], names: ExpertNames) -> dict[str, Part | None]:
    """The tensors that a stored one stands for, named as files without stacks name them.

    Args:
        name: of the stored tensor.
        shape: of the stored tensor. ``gate_up_proj`` is ``[experts, 2 * I, D]``, the rows of the gate first;
            ``down_proj`` is ``[experts, D, I]``.
        names: of the family's experts.

    Returns:
        For each tensor its part of the stack; None for all of the stored tensor.

    Raises:
        ConversionError: it is a stack, but of another shape.
    """
    match = STACK.fullmatch(name)
    if match is None:
        return {name: None}
    layer, kind = match.groups()
    if kind == "gate.weight":
        return {f"{layer}{names.block}.gate.weight": None}
    gate_up = kind == "experts.gate_up_proj"
    if len(shape) != 3 or (gate_up and shape[1] % 2):
        raise ConversionError(
            f"{name} has shape {shape}, where the weights of all experts, one above the other, were expected."
        )
    gate, up, down = names.projections
    experts, rows, _ = shape
    blocks = {gate: (0, rows // 2), up: (rows // 2, rows)} if gate_up else {down: (0, rows)}
    return {
        f"{layer}{names.weight(expert, projection)}": (expert, *block)
        for expert in range(experts)
        for projection, block in blocks.items()
    }
