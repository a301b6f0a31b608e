"""What a conversion is asked to do, and what can be refused before anything is read."""

import math
import shlex
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from mla_converters.errors import ConversionError
from mla_converters.methods.attention_aware.layer_sizes import LayerSizes
from mla_converters.methods.attention_aware.refit import Refit
from mla_converters.methods.attention_aware.run import Ingredient
from mla_converters.methods.mha2mla.map import Keep, Svd
from mla_converters.text.calibration import SELF


class Method(StrEnum):
    """Conversion methods."""

    EXACT = "exact"
    TRANSMLA = "transmla"
    MHA2MLA = "mha2mla"
    ATTENTION_AWARE = "attention-aware"


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Options:
    """What a conversion is asked to do; the defaults are those of the command line.

    Attributes:
        method: which method.
        kv_lora_rank, qk_rope_head_dim, cache_ratio: see :func:`mla_converters.latent.cache_size.resolve_budget`.
        freqfold: neighbouring frequencies treated as one (``transmla``), or None to search.
        layer_sizes: ``same`` in all layers, or ``measured`` for the same total (``attention-aware``).
        rope_keep, svd: see :class:`mla_converters.methods.mha2mla.run.Mha2mlaOptions`; None for its defaults.
        refit_steps: of Muon for each layer (``attention-aware``); 0 for the closed form alone.
        without: ingredients of ``attention-aware`` to leave out.
        calibration: text files, or ``self`` or ``chat`` for what the model writes; each gives an equal share.
        calibration_tokens: how many tokens calibrate.
        seed: of calibration.
        dtype: of the written weights; None keeps the source's.
        device: where layers run.
        max_context: limit on the context of the converted model, as a sliding window needs.
        trust_remote_code: whether code that comes with the tokenizer may run, and travels with the model.
    """

    method: Method = Method.ATTENTION_AWARE
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int | None = None
    cache_ratio: float | None = None
    freqfold: int | None = None
    rope_keep: Keep | None = None
    svd: Svd | None = None
    refit_steps: int = Refit.steps
    without: frozenset[Ingredient] = frozenset()
    layer_sizes: LayerSizes = LayerSizes.SAME
    calibration: tuple[str, ...] = (SELF,)
    calibration_tokens: int = 16384
    seed: int = 0
    dtype: str | None = None
    device: str = "cpu"
    max_context: int | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class HealOptions:
    """How to heal; the defaults are those of the command line.

    Attributes:
        text: text files, or ``self`` or ``chat`` for what the source writes.
        tokens: how many of them at most; one window in 32 is held out.
        steps: of Adam; None for as many as show each window once, or twice if much was lost.
        length: tokens in a window, or as many as the source's context has; None for 256 to 1,024, by how much was lost.
        batch_size: windows to a step.
        learning_rate: change of a weight in the first steps, relative to the root mean square of its matrix; None for
            one that follows from how much was lost.
        seed: of text, and of its order.
        device: where both models are.
        trust_remote_code: whether code that comes with the tokenizer may run.
    """

    text: tuple[str, ...] = (SELF,)
    tokens: int = 65536
    steps: int | None = None
    length: int | None = None
    batch_size: int = 1
    learning_rate: float | None = None
    seed: int = 0
    device: str = "cpu"
    trust_remote_code: bool = False


def as_json(value: object) -> object:
    """An option's value as JSON has it: a list if the option may be repeated."""
    if isinstance(value, frozenset):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value


def command_line(source: str, revision: str | None, options: Options) -> str:
    """The command that converts ``source`` with these options."""
    words = ["vllm-mla", "convert", source, f"./{Path(source).stem}-mla", *given_options(options)]
    return shlex.join([*words, *(["--revision", revision] if revision else [])])


def option_name(field: str) -> str:
    """What a command line calls a field of the options."""
    return f"--{field.replace('_', '-')}"


def given_options(options: Any) -> list[str]:
    """What a command line says of options that differ from their defaults.

    Args:
        options: a dataclass whose fields are named as the options are.
    """
    words: list[str] = []
    for field in fields(options):
        value = getattr(options, field.name)
        if value != field.default:
            given = as_json(value)
            for item in given if isinstance(given, list) else [given]:
                words += [option_name(field.name), *([] if item is True else [str(item)])]
    return words


def check_options(options: Options) -> None:
    """Refuse options that contradict each other or this machine.

    Raises:
        ConversionError: with what to do.
    """
    if options.dtype not in (None, *DTYPES):
        raise ConversionError(f"--dtype is {options.dtype!r}; choose one of {', '.join(DTYPES)}.")
    check_device(options.device)
    if options.refit_steps < 0:
        raise ConversionError(f"--refit-steps is {options.refit_steps}, but must be 0 or more.")
    check_seed(options.seed)
    of_one_method = {
        "--freqfold": (options.freqfold is not None, Method.TRANSMLA),
        "--rope-keep": (options.rope_keep is not None, Method.MHA2MLA),
        "--svd": (options.svd is not None, Method.MHA2MLA),
        "--layer-sizes": (options.layer_sizes != LayerSizes.SAME, Method.ATTENTION_AWARE),
        "--without": (bool(options.without), Method.ATTENTION_AWARE),
    }
    for name, (given, method) in of_one_method.items():
        if given and options.method != method:
            raise ConversionError(f"{name} is an option of --method {method}, not of {options.method}: leave it out.")
    if Ingredient.MLP in options.without and not options.refit_steps:
        raise ConversionError(
            "--without mlp changes only the refit, and --refit-steps 0 leaves that out: drop one of them."
        )
    if Ingredient.LEAST_SQUARES in options.without and options.refit_steps:
        raise ConversionError(
            "--without least-squares changes only the closed form: give --refit-steps 0 too, or leave it out."
        )
    if {Ingredient.CONVERTED_INPUTS, Ingredient.LEAST_SQUARES} <= options.without and not options.refit_steps:
        raise ConversionError(
            "--without converted-inputs changes only least squares and the refit, and --without least-squares and "
            "--refit-steps 0 leave both out: drop one of them."
        )


def check_seed(seed: int) -> None:
    """Refuse a seed that torch's generators do not take."""
    if not -(2**63) <= seed < 2**64:
        raise ConversionError(f"--seed is {seed}, but must fit 64 bits.")


def check_device(device: str) -> None:
    """Refuse a device that this machine does not have."""
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ConversionError(f"--device is {device!r}, which is not a device: use cpu, cuda or cuda:N.") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConversionError(f"--device is {device!r}, but this torch sees no CUDA device.")


def check_heal_options(options: HealOptions) -> None:
    """Refuse what cannot be trained.

    Raises:
        ConversionError: with what to do.
    """
    check_device(options.device)
    check_seed(options.seed)
    counts = {"--length": options.length, "--steps": options.steps, "--batch-size": options.batch_size}
    for option, count in counts.items():
        if count is not None and count < 1:
            raise ConversionError(f"{option} is {count}, but must be 1 or more.")
    if options.learning_rate is not None and not 0 < options.learning_rate < math.inf:
        raise ConversionError(f"--learning-rate is {options.learning_rate}, but must be above 0, such as 0.001.")
