"""The interface of a conversion method: its options, its cache sizes, its cost, and how it prepares a conversion."""

from dataclasses import dataclass, field
from typing import Protocol

from rich.progress import Progress

from mla_converters.checkpoints.shape import Shape
from mla_converters.checkpoints.source import Source
from mla_converters.latent.cache_size import CacheBudget
from mla_converters.methods.asked_cache import AskedCache
from mla_converters.methods.layer_conversion import LayerConversion
from mla_converters.options import CacheSizes, MethodOptions
from mla_converters.reports.conversion import Search
from mla_converters.resume.work_folder import Work
from mla_converters.text.calibration import Calibration
from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat


@dataclass(frozen=True)
class Job:
    """A conversion that a method is to prepare.

    Attributes:
        source: the model.
        sizes: the cache size that was asked for.
        budget: the sizes that :meth:`Method.cache` returned for it.
        calibration: text to calibrate on; None for a method whose ``window`` is None.
        seed: the seed of everything that the method draws at random.
        device: the device on which layers run.
        work: the folder that keeps the state of a search, so that an interrupted run can go on.
        progress: shows the progress of long work.
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
        cache_format: the packed format of every layer's cache; None for numbers of 16 bits.
        settings: the settings that the method used, for the report.
        searches: settings that were searched, with the error of each candidate.
        warnings: sentences for the user.
    """

    budgets: list[CacheBudget]
    conversion: LayerConversion
    cache_format: CacheFormat | None = None
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
    """The time, memory and disk space that a conversion needs.

    Attributes:
        core_seconds: seconds on one core, without the sampling of text.
        memory_bytes: peak memory, without the sampling of text.
        disk_bytes: peak disk space: the written checkpoint, and the records from which an interrupted run goes on.
        weights_bytes: size of the written checkpoint alone.
        warnings: sentences for the user.
    """

    core_seconds: float
    memory_bytes: int
    disk_bytes: int
    weights_bytes: int
    warnings: tuple[str, ...] = ()


class Method(Protocol):
    """A conversion method.

    Attributes:
        options: its options, which also hold its name and its summary.
        window: tokens in a calibration window; None if the method needs no text.
        lossless: whether the converted model computes the source's function.
    """

    options: MethodOptions
    window: int | None
    lossless: bool

    def cache(self, shape: Shape, sizes: CacheSizes) -> AskedCache:
        """What is known of the cache that the user asked for, before any search.

        Raises:
            ConversionError: the sizes do not fit the source or the method.
        """
        ...

    def nope_dim(self, shape: Shape) -> int:
        """``qk_nope_head_dim`` of the converted model."""
        ...

    def cost(self, shape: Shape, cache: AskedCache, tokens: int) -> Cost:
        """Estimate the cost of a conversion with ``tokens`` of calibration text, for both `plan` and `convert`."""
        ...

    def prepare(self, job: Job) -> Prepared:
        """Search the settings that were left open, or go on with the search of an earlier run.

        Raises:
            ConversionError: the method cannot convert this source, or not with this text.
        """
        ...
