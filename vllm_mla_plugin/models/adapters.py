"""Refuses LoRA adapters that do not fit a converted model, such as those made for its source.

vLLM (0.29 to 0.32) does not compare shapes. It copies an adapter into the first rows of what the layer takes, and the
answers are then nonsense. It has no hook for a check, but it hands the manager of the adapters to the model, as the
attribute ``lora_manager``. The model then puts its check before the manager's ``add_adapter``, because that is where an
adapter is whole: not yet packed, not yet shared out among ranks, and not yet registered.
"""

from typing import Any

from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LoRAModelManager
from vllm.model_executor.layers.linear import LinearBase

SOURCE_PROJECTIONS = frozenset({"k_proj", "v_proj"})
"""Projections of a source that its conversion may have removed."""


class ChecksAdapters:
    """A model, to mix into a module, that refuses adapters which do not fit it."""

    _lora_manager: LoRAModelManager | None = None

    @property
    def lora_manager(self) -> LoRAModelManager | None:
        """vLLM's manager of the adapters; None where no adapters are served."""
        return self._lora_manager

    @lora_manager.setter
    def lora_manager(self, manager: LoRAModelManager) -> None:
        # vLLM refuses adapters for a module that it does not know, but does not say what to do instead.
        parts = manager.packed_modules_mapping.values()
        removed = SOURCE_PROJECTIONS.difference(manager.supported_lora_modules, *parts)
        manager.supported_lora_modules.extend(removed)
        sizes, add_adapter = adapted_sizes(manager), manager.add_adapter

        def add_checked(adapter: LoRAModel) -> bool:
            check_adapter(adapter, sizes, removed)
            return add_adapter(adapter)

        manager.add_adapter = add_checked  # type: ignore[method-assign]
        self._lora_manager = manager


def adapted_sizes(manager: LoRAModelManager) -> dict[str, tuple[int, int]]:
    """Inputs and outputs, over all ranks, of every linear map that takes an adapter, by the checkpoint's names."""
    sizes: dict[str, tuple[int, int]] = {}
    for name, module in manager.modules.items():
        layer: Any = getattr(module, "base_layer", None)
        if not isinstance(layer, LinearBase):
            continue
        parts = manager.packed_modules.get(name, [name])
        columns = [layer.output_size] if len(parts) == 1 else layer.output_sizes  # type: ignore[attr-defined]
        sizes |= {part: (layer.input_size, size) for part, size in zip(parts, columns, strict=True)}
    return sizes


def check_adapter(adapter: LoRAModel, sizes: dict[str, tuple[int, int]], removed: frozenset[str]) -> None:
    """Refuse an adapter that does not fit.

    Args:
        adapter: as read from its folder.
        sizes: see :func:`adapted_sizes`.
        removed: names of projections that the source had and this model has not.

    Raises:
        ValueError: it changes a removed projection, or one that has other sizes here, or ``kv_b_proj``.
    """
    for name, lora in adapter.loras.items():
        # Adapters that change nothing fit. vLLM's own, with which it measures memory, have one rank's shapes.
        if lora.is_packed or lora.lora_a is None or lora.lora_b is None or not lora.lora_b.any():
            continue
        projection = name.rsplit(".", 1)[-1]
        if projection == "kv_b_proj":
            raise ValueError(
                f"The LoRA adapter changes {name}, where it would have no effect because MLA takes that projection "
                "apart when it loads: train an adapter without kv_b_proj."
            )
        if projection in removed:
            reason = f"{name} does not exist here"
        elif (given := (lora.input_dim, lora.output_dim)) != (wanted := sizes.get(name, given)):
            reason = f"{name} maps {wanted[0]} numbers to {wanted[1]} here, and the adapter's {given[0]} to {given[1]}"
        else:
            continue
        raise ValueError(
            f"The LoRA adapter does not fit this converted model, because {reason}: if it was made for the source, "
            "merge it into the source with PEFT and convert again, or train one on the converted model."
        )
