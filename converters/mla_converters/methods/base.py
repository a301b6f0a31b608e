"""What a conversion method is to everything else: one object with a name, sizes, a cost and a way to prepare itself."""

from dataclasses import dataclass, field
from typing import Protocol

from rich.progress import Progress

from mla_converters.checkpoints.shape import Shape
from mla_converters.checkpoints.source import Source
from mla_converters.latent.cache_size import CacheBudget, resolve_budget
from mla_converters.methods.layer_conversion import LayerConversion
from mla_converters.options import CacheSizes, MethodOptions
from mla_converters.reports.conversion import Search
from mla_converters.resume.work_folder import Work
from mla_converters.text.calibration import Calibration


@dataclass(frozen=True)
class Job:
    """A conversion that a method is to prepare.

    Attributes:
        source: the model.
        sizes: the cache size that was asked for.
        budget: what :meth:`Method.budget` made of it.
        calibration: text to calibrate on; None for a method without a window.
        seed: of everything that the method draws at random.
        device: where layers run.
        work: the folder in which searches are kept, should they be interrupted.
        progress: for bars.
    """

    source: Source
    sizes: CacheSizes
    budget: CacheBudget
    calibration: Calibration | None
    seed: int
    device: str
    work: Work
    progress: Progress


@dataclass(frozen=True)
class Prepared:
    """A conversion whose sizes are settled.

    Attributes:
        budgets: the cache's sizes in each layer.
        conversion: converts the layers.
        settings: the method's settings as they were used, for the report.
        searches: settings that were searched, with the error of each candidate.
        warnings: what the user should know, a sentence each.
    """

    budgets: list[CacheBudget]
    conversion: LayerConversion
    settings: dict[str, object] = field(default_factory=dict)
    searches: list[Search] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def budget(self) -> CacheBudget:
        """The largest latent and the largest rotary key of all layers."""
        return CacheBudget(
            max(budget.kv_lora_rank for budget in self.budgets), max(budget.qk_rope_head_dim for budget in self.budgets)
        )


@dataclass(frozen=True)
class Cost:
    """What a conversion takes.

    Attributes:
        core_seconds: on one core, without sampling of text.
        memory_bytes: at its peak, without sampling of text.
        disk_bytes: at its peak: the written checkpoint, and the records from which an interrupted run goes on.
        weights_bytes: of the written checkpoint alone.
        warnings: what the user should know, a sentence each.
    """

    core_seconds: float
    memory_bytes: int
    disk_bytes: int
    weights_bytes: int
    warnings: tuple[str, ...] = ()


class Method(Protocol):
    """A conversion method.

    Attributes:
        options: its options, which name and describe it.
        window: tokens of a calibration window; None if it needs no text.
        lossless: whether the converted model computes the source's function.
    """

    options: MethodOptions
    window: int | None
    lossless: bool

    def budget(self, shape: Shape, sizes: CacheSizes) -> CacheBudget:
        """The cache's sizes for what was asked, before any search.

        Raises:
            ConversionError: they do not fit the source or the method.
        """
        ...

    def nope_dim(self, shape: Shape) -> int:
        """``qk_nope_head_dim`` of the converted model."""
        ...

    def cost(self, shape: Shape, budget: CacheBudget, tokens: int) -> Cost:
        """What the conversion takes with ``tokens`` of calibration text. `plan` and `convert` both ask this."""
        ...

    def prepare(self, job: Job) -> Prepared:
        """Search what is to be searched, or take up what an earlier run found.

        Raises:
            ConversionError: the source or the text does not allow it.
        """
        ...


def asked_budget(shape: Shape, sizes: CacheSizes) -> CacheBudget:
    """The cache's sizes for what was asked, with what was left open filled in; see :func:`resolve_budget`."""
    return resolve_budget(shape.kv_heads, shape.head_dim, sizes.kv_lora_rank, sizes.qk_rope_head_dim, sizes.cache_ratio)
