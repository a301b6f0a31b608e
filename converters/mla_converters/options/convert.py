"""The options of ``vllm-mla convert``."""

import shlex
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from mla_converters.errors import OptionError
from mla_converters.options.base import Flag, OptionsModel, given_options
from mla_converters.options.common import Device, Dtype, Seed, TrustedCode
from mla_converters.options.methods import AttentionAwareOptions, MethodOptions
from mla_converters.options.rope_scaling import parse_rope_scaling
from mla_converters.options.text import ORIGINS, SELF, WINDOW


class MethodChoice(OptionsModel):
    """The method, with its own options.

    Attributes:
        method: the options of the method; their class names the method.
    """

    method: SerializeAsAny[MethodOptions] = AttentionAwareOptions()


class CacheSizes(OptionsModel):
    """The size of the cache that the user asks for; see :func:`mla_converters.latent.cache_size.resolve_budget`.

    Attributes:
        kv_lora_rank: width of the latent.
        qk_rope_head_dim: width of the rotary key.
        cache_ratio: size of the cache as a share of the source's; given instead of ``kv_lora_rank``.
    """

    kv_lora_rank: Annotated[int | None, Flag(panel="Cache size")] = Field(
        None, description="Width of the cached latent."
    )
    qk_rope_head_dim: Annotated[int | None, Flag(panel="Cache size")] = Field(
        None, description="Dimensions that keep RoPE, cached too."
    )
    cache_ratio: Annotated[float | None, Flag(panel="Cache size", default="0.5")] = Field(
        None, gt=0, le=1, description="Cache size as a share of the source's, instead of --kv-lora-rank."
    )

    @model_validator(mode="after")
    def _one_size(self) -> "CacheSizes":
        if self.cache_ratio is not None and self.kv_lora_rank is not None:
            raise OptionError("--cache-ratio and --kv-lora-rank both set the cache's size: give one of them.")
        return self


class Calibration(Seed):
    """The text on which a conversion is calibrated.

    Attributes:
        calibration: text files, or ``self`` or ``chat`` for text that the model writes; each gives an equal share.
        calibration_tokens: number of tokens in total.
    """

    calibration: Annotated[tuple[str, ...], Flag(panel="Text")] = Field(
        (SELF,), min_length=1, description=f"{ORIGINS} With **self** beside it, what your text leaves out is kept too."
    )
    calibration_tokens: Annotated[int, Flag(panel="Text")] = Field(
        16384, description="How many tokens, in windows of 2,048 (512 with transmla and mha2mla)."
    )

    @model_validator(mode="after")
    def _a_window_of_each(self) -> "Calibration":
        count = len(self.calibration)
        if self.calibration_tokens < WINDOW * count:
            each = f" of {WINDOW} for each of {count} --calibration texts" if count > 1 else ""
            raise OptionError(
                f"--calibration-tokens is {self.calibration_tokens}, but must be at least {WINDOW * count} "
                f"(one window{each})."
            )
        return self


class ConvertOptions(TrustedCode, Device, Calibration, CacheSizes, MethodChoice):
    """The options of a conversion, with the command line's defaults.

    Attributes:
        max_context: limit on the context of the converted model; a source with a sliding window needs one.
        rope_scaling: RoPE scaling that replaces the source's; see
            :func:`mla_converters.checkpoints.rope_scaling.scale_rope`.
        dtype: dtype of the written weights; None keeps the source's.
        revision: branch, tag or commit of a hub id.
        device: the device on which layers run; None for the GPU, if there is one.
        trust_remote_code: whether code that comes with the tokenizer may run; if so, it is copied to the model.
    """

    max_context: int | None = Field(
        None, description="Limit the context. A source with a sliding window converts up to the window."
    )
    rope_scaling: Annotated[dict[str, Any] | None, BeforeValidator(parse_rope_scaling), Flag(metavar="JSON")] = Field(
        None,
        description="Extend the context beyond the source's by a RoPE scaling (yarn, llama3 or linear), such as "
        '{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}.',
    )
    dtype: Annotated[Dtype | None, Flag(default="the source's; float32 for quantised GGUF")] = Field(
        None, description="Of the written weights: float32, bfloat16 or float16."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")


def command_line(source: str, options: ConvertOptions) -> str:
    """The command that converts ``source`` with these options."""
    return shlex.join(["vllm-mla", "convert", source, f"./{Path(source).stem}-mla", *conversion_flags(options)])


def conversion_flags(options: ConvertOptions) -> list[str]:
    """The words of a command line that gives these options. The method and its own options come first."""
    default = ConvertOptions.model_fields["method"].default
    named = [] if options.method.name == default.name else ["--method", options.method.name]
    others = options.model_copy(update={"method": default})
    return [*named, *given_options(options.method), *given_options(others)]
