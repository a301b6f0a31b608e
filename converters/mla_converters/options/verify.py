"""The options of ``vllm-mla verify``."""

from pydantic import Field

from mla_converters.options.common import TrustedCode


class VerifyOptions(TrustedCode):
    """The options of a verification.

    Attributes:
        source: the model from which the checkpoint was converted, to compare predictions; None for no comparison.
    """

    source: str | None = Field(
        None, description="What it was converted from: compares predictions on a short text, in float32."
    )
