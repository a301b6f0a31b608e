"""The options of the conversion methods. They also hold each method's name, summary and paper.

A new method needs a subclass of :class:`MethodOptions`, and a line in :mod:`mla_converters.methods.registry`.
"""

from enum import StrEnum
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from mla_converters.errors import OptionError
from mla_converters.options.base import Flag, OptionsModel

REFIT_STEPS = 96


class MethodOptions(OptionsModel):
    """The name of a method and its options.

    Attributes:
        name: the name after ``--method``.
        summary: a description for ``--help`` and the model card, without a full stop.
        reference: address of the paper; None if there is none.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str | None] = None


class ExactOptions(MethodOptions):
    """Method ``exact`` has no options."""

    name = "exact"
    summary = "the same function and the same cache size as the source"


class TransmlaOptions(MethodOptions):
    """Options of method ``transmla``.

    Attributes:
        freqfold: number of neighbouring RoPE frequencies that are treated as one; None to search it.
    """

    name = "transmla"
    summary = "RoRoPE, FreqFold and joint PCA of TransMLA"
    reference = "https://arxiv.org/abs/2502.07864"

    freqfold: Annotated[int | None, Flag(none="auto", default="auto")] = Field(
        None, description="Neighbouring RoPE frequencies treated as one: a number, or **auto** to search."
    )


class Keep(StrEnum):
    """The rule that chooses the pairs of a KV head that keep RoPE (MHA2MLA, section 3.1)."""

    HIGH = "high"
    LOW = "low"
    UNIFORM = "uniform"
    TWO_NORM = "2-norm"


class Svd(StrEnum):
    """Whether keys and values share singular vectors or have their own (MHA2MLA, section 3.2)."""

    JOINT = "joint"
    SPLIT = "split"


class Mha2mlaOptions(MethodOptions):
    """Options of method ``mha2mla``; the defaults are the paper's.

    Attributes:
        rope_keep: the rule that chooses the pairs that keep RoPE.
        svd: whether keys and values share a latent or have one each.
    """

    name = "mha2mla"
    summary = "partial RoPE and SVD of MHA2MLA, which is meant to be trained afterwards"
    reference = "https://arxiv.org/abs/2502.14837"

    rope_keep: Keep = Field(
        Keep.TWO_NORM, description="Which pairs of a head keep RoPE: **2-norm**, **high**, **low** or **uniform**."
    )
    svd: Svd = Field(Svd.JOINT, description="SVD of keys and values together (**joint**) or apart (**split**).")


class Ingredient(StrEnum):
    """Parts of method ``attention-aware`` that can be left out, to measure what each contributes."""

    MEAN_PHASE = "mean-phase"
    ATTENTION_WEIGHTS = "attention-weights"
    METRIC = "metric"
    RANDOM_TOKENS = "random-tokens"
    JOINT_CHOICE = "joint-choice"
    SEARCH = "search"
    LEAST_SQUARES = "least-squares"
    CONVERTED_INPUTS = "converted-inputs"
    MLP = "mlp"


class LayerSizes(StrEnum):
    """How the cache is spread over the layers."""

    SAME = "same"
    MEASURED = "measured"


class AttentionAwareOptions(MethodOptions):
    """Options of method ``attention-aware``.

    Attributes:
        refit_steps: steps of Muon that refit each layer; 0 for the closed form alone.
        layer_sizes: whether all layers have the same cache, or sizes are measured for each under the same total.
        without: ingredients to leave out.
    """

    name = "attention-aware"
    summary = "keeps what attention would miss most, and so loses least"

    refit_steps: int = Field(
        REFIT_STEPS, ge=0, description="Muon steps of each layer's refit; 0 is faster and loses more."
    )
    layer_sizes: LayerSizes = Field(
        LayerSizes.SAME,
        description="Cache **same** in all layers, or **measured**: more where it matters more, the same in total, in "
        "at most four sizes.",
    )
    without: Annotated[frozenset[Ingredient], Flag(default="none")] = Field(
        frozenset(), description="Leave an ingredient out, to see what it buys (may be repeated)."
    )

    @model_validator(mode="after")
    def _ingredients_matter(self) -> "AttentionAwareOptions":
        """Refuse to leave out ingredients that are not in use, because the user would believe to have measured them."""
        if Ingredient.MLP in self.without and not self.refit_steps:
            raise OptionError(
                "--without mlp changes only the refit, and --refit-steps 0 leaves that out: drop one of them."
            )
        if Ingredient.LEAST_SQUARES in self.without and self.refit_steps:
            raise OptionError(
                "--without least-squares changes only the closed form: give --refit-steps 0 too, or leave it out."
            )
        if self.without >= {Ingredient.CONVERTED_INPUTS, Ingredient.LEAST_SQUARES} and not self.refit_steps:
            raise OptionError(
                "--without converted-inputs changes only least squares and the refit, and --without least-squares "
                "and --refit-steps 0 leave both out: drop one of them."
            )
        return self
