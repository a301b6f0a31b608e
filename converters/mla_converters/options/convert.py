"""The options of ``vllm-mla convert``."""

import shlex
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from mla_converters.errors import OptionError
from mla_converters.options.base import Flag, OptionsModel, given_options, option_name
from mla_converters.options.common import Device, Dtype, Seed, TrustedCode
from mla_converters.options.methods import AttentionAwareOptions, MethodOptions
from mla_converters.options.rope_scaling import parse_rope_scaling
from mla_converters.options.text import ORIGINS, SELF, WINDOW
from vllm_mla_plugin.checkpoint.cache_formats import PLANES, CacheFormat

DEFAULT_CACHE_RATIO = 0.25


class MethodChoice(OptionsModel):
    """The method, with its own options.

    Attributes:
        method: the options of the method; their class names the method.
    """

    method: SerializeAsAny[MethodOptions] = AttentionAwareOptions()


class CacheSizes(OptionsModel):
    """The size of the cache that the user asks for, see :mod:`mla_converters.methods.asked_cache`.

    Attributes:
        cache_ratio: bytes of the cache as a share of the source's at 16 bits a number.
        latent_bits: bits of every cached number, where 16 stands for numbers that are not packed. None to search them,
            if the sizes are not given either, and 16 otherwise.
        kv_lora_rank: width of the latent; given instead of ``cache_ratio``.
        qk_rope_head_dim: width of the rotary key.
        latent_cache: a packed format, as :meth:`vllm_mla_plugin.checkpoint.cache_formats.CacheFormat.parse` reads it;
            given instead of all others.
    """

    cache_ratio: Annotated[float | None, Flag(panel="Cache size", default=str(DEFAULT_CACHE_RATIO))] = Field(
        None, gt=0, le=1, description="Bytes of the cache as a share of the source's, which has 16 bits a number."
    )
    latent_bits: Annotated[int | None, Flag(panel="Cache size", none="auto", default="auto")] = Field(
        None,
        description="Bits of every cached number: **auto** gives more to those that matter more; 16 (not packed), "
        "8, 6, 5, 4, 3 or 2. With --kv-lora-rank, auto means 16.",
    )

    kv_lora_rank: Annotated[int | None, Flag(panel="Cache size")] = Field(
        None, description="Width of the cached latent, instead of --cache-ratio."
    )
    qk_rope_head_dim: Annotated[int | None, Flag(panel="Cache size")] = Field(
        None, description="Dimensions that keep RoPE, cached too."
    )
    latent_cache: Annotated[str | None, Flag(panel="Cache size", metavar="FORMAT")] = Field(
        None, description="A packed format, such as 64x4g32+144x2g48c/56x6g56, instead of all other sizes."
    )

    @model_validator(mode="after")
    def _one_size(self) -> "CacheSizes":
        if self.cache_ratio is not None and self.kv_lora_rank is not None:
            raise OptionError("--cache-ratio and --kv-lora-rank both set the cache's size: give one of them.")
        if self.latent_bits not in (None, 16, *PLANES):
            bits = ", ".join(map(str, (16, *sorted(PLANES, reverse=True))))
            raise OptionError(f"--latent-bits is {self.latent_bits}; choose one of auto, {bits}.")
        if self.latent_cache is not None:
            others = ("cache_ratio", "latent_bits", "kv_lora_rank", "qk_rope_head_dim")
            if given := [option_name(name) for name in others if getattr(self, name) is not None]:
                raise OptionError(f"--latent-cache sets all of the cache's sizes: leave out {', '.join(given)}.")
            try:
                CacheFormat.parse(self.latent_cache)
            except ValueError as error:
                raise OptionError(f"--latent-cache: {error}") from error
        return self

    @property
    def share(self) -> float:
        """The cache's bytes as a share of the source's."""
        return DEFAULT_CACHE_RATIO if self.cache_ratio is None else self.cache_ratio

    @property
    def format(self) -> CacheFormat | None:
        """The packed format that was given by hand."""
        return None if self.latent_cache is None else CacheFormat.parse(self.latent_cache)

    @property
    def searches_bits(self) -> bool:
        """Whether each number's bits are left open."""
        return self.latent_cache is None and self.latent_bits is None and self.kv_lora_rank is None

    @property
    def uniform_bits(self) -> int:
        """The bits of every number; 16 if they are not given and the size is."""
        return 16 if self.latent_bits is None else self.latent_bits


class Calibration(Seed):
    """The text on which a conversion is calibrated.

    Attributes:
        calibration: text files, documents, or ``self`` or ``chat`` for text that the model writes; each gives an equal
            share.
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
    out = f"./{Path(source).resolve().name.removesuffix('.gguf')}-mla"
    return shlex.join(["vllm-mla", "convert", source, out, *conversion_flags(options)])


def conversion_flags(options: ConvertOptions) -> list[str]:
    """The words of a command line that gives these options. The method and its own options come first."""
    default = ConvertOptions.model_fields["method"].default
    named = [] if options.method.name == default.name else ["--method", options.method.name]
    others = options.model_copy(update={"method": default})
    return [*named, *given_options(options.method), *given_options(others)]
