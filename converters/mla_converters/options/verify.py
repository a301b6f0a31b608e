"""The options of ``vllm-mla verify``."""

from pydantic import Field

from mla_converters.options.common import TrustedCode


class VerifyOptions(TrustedCode):
    """What a verification looks at.

    Attributes:
        source: what the checkpoint was converted from, to compare predictions; None leaves that out.
    """

    source: str | None = Field(
        None, description="What it was converted from: compares predictions on a short text, in float32."
    )
