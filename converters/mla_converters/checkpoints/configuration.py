"""A source's configuration: read, checked, and every key of it accounted for."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from mla_converters.checkpoints.config_keys import account_for_keys
from mla_converters.checkpoints.families import check_config, find_family
from mla_converters.checkpoints.quantised.config import Quantisation, find_quantisation
from mla_converters.checkpoints.rope_scaling import scale_rope, with_rope_of
from mla_converters.errors import ConversionError
from vllm_mla_plugin.checkpoint.families import Family


@dataclass(frozen=True)
class Configuration:
    """A configuration of a supported family that MLA can represent.

    Attributes:
        raw: as in ``config.json``.
        name: the file or header that it is from, for messages.
        family: of the model.
        config: the transformers configuration.
        quantisation: how its weights are quantised; None if they are not.
        unknown_keys: keys that were not understood, and that may or may not matter.
        warnings: sentences for the user.
    """

    raw: dict[str, Any]
    name: str
    family: Family
    config: PretrainedConfig
    quantisation: Quantisation | None
    unknown_keys: list[str]
    warnings: list[str]


def understand(raw: dict[str, Any], name: str, rope_scaling: dict[str, Any] | None = None) -> Configuration:
    """Understand a ``config.json``.

    Args:
        raw: its content.
        name: the file or header that it is from, for messages.
        rope_scaling: a RoPE scaling that the user adds; see :func:`mla_converters.checkpoints.rope_scaling.scale_rope`.

    Raises:
        ConversionError: the configuration is not valid, or MLA cannot represent it.
    """
    family, quantisation = find_family(raw), find_quantisation(raw)
    try:
        config = CONFIG_MAPPING[family.model_type].from_dict(deepcopy(raw))
    except Exception as error:  # transformers validates with many exception types
        raise ConversionError(f"{name} is not a valid configuration: {error}") from error
    check_config(config, family)
    unknown, warnings = account_for_keys(raw, type(config))
    if rope_scaling is not None:
        config = scale_rope(config, rope_scaling)
        raw = with_rope_of(raw, config)
        check_config(config, family)
    warnings = warnings + (quantisation.warnings if quantisation else [])
    return Configuration(raw, name, family, config, quantisation, unknown, warnings)
