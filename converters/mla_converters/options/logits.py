"""The options of ``vllm-mla logits``."""

from typing import Annotated

from pydantic import Field

from mla_converters.options.base import Flag
from mla_converters.options.common import Dtype, Seed, TrustedCode
from mla_converters.options.text import MixedText


class LogitsOptions(TrustedCode, Seed, MixedText):
    """The options of writing down what a teacher predicts.

    Attributes:
        tokens: limit on the number of tokens.
        length: tokens in a window, at most the model's context.
        top_k: number of the likeliest tokens whose probabilities are written down, at every token.
        dtype: dtype in which vLLM serves the model; None for its default.
        tensor_parallel_size: number of GPUs that share the model.
    """

    tokens: Annotated[int, Flag(panel="Text")] = Field(65536, description="How many tokens at most, in windows.")
    length: Annotated[int, Flag(panel="Text")] = Field(
        1024, ge=1, description="Tokens in a window, at most the model's context."
    )
    top_k: int = Field(64, ge=1, description="How many of the likeliest tokens are written down, at every token.")
    dtype: Annotated[Dtype | None, Flag(default="vLLM's")] = Field(
        None, description="To serve MODEL in: float32, bfloat16 or float16."
    )
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share MODEL.")
