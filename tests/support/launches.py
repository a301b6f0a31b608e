"""Counts what a computation launches: torch's operations, and kernels in Triton's interpreter."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes


class Operations(TorchDispatchMode):
    """Counts operations, except views, because views launch no kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def triton_launches(counts: Counter[str]) -> Iterator[None]:
    """Count kernels that the interpreter runs meanwhile, by name, without what torch does for the interpreter."""
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__

    def counted(executor: Any, *args: Any, **kwargs: Any) -> Any:
        counts[executor.fn.__name__] += 1
        with _disable_current_modes():
            return run(executor, *args, **kwargs)

    GridExecutor.__call__ = counted
    yield
    GridExecutor.__call__ = run
