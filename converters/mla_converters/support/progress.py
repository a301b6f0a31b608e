"""Progress of long work: bars on a terminal, and lines elsewhere."""

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

FEW = 200  # a task with at most this many steps may print a line for each step
PAUSES = (1.0, 30.0)  # least seconds between two lines of a task with few steps, and of a task with many steps


class ProgressLines(Progress):
    """Progress as lines on stderr with the time left, for the logs of jobs that nobody watches."""

    def __init__(self) -> None:
        super().__init__(disable=True)
        self._stderr = Console(file=sys.stderr, soft_wrap=True, highlight=False)
        self._begun: dict[TaskID, tuple[float, float]] = {}  # time and steps done when the task was first seen
        self._shown: dict[TaskID, float] = {}

    def add_task(self, description: str, *args: Any, **kwargs: Any) -> TaskID:
        task = super().add_task(description, *args, **kwargs)
        self._begun[task] = (time.monotonic(), self._tasks[task].completed)
        return task

    def update(self, task_id: TaskID, **kwargs: Any) -> None:
        before = self._tasks[task_id].completed
        super().update(task_id, **kwargs)
        if self._tasks[task_id].completed > before:
            self._show(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._show(task_id)

    def _show(self, task_id: TaskID) -> None:
        task, now = self._tasks[task_id], time.monotonic()
        if task.total is None:
            return
        pause = PAUSES[0] if task.total <= FEW else PAUSES[1]
        last = task.completed >= task.total
        if not last and now - self._shown.get(task_id, -pause) < pause:
            return
        self._shown[task_id] = now
        begun, first = self._begun[task_id]
        done = task.completed - first
        left = (now - begun) * (task.total - task.completed) / done if done else 0.0
        time_left = "" if last else f", {_span(left)} left"
        self._stderr.print(f"{task.description}: {task.completed:,.0f} of {task.total:,.0f}{time_left}")


def _span(seconds: float) -> str:
    """A time span such as ``40 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def progress_bars(quiet: bool) -> Progress:
    """Progress of long work on stderr; if ``quiet``, nothing is shown.

    What redirects stderr later does not redirect the progress: it goes where stderr went when this was called.
    """
    console = Console(file=sys.stderr)
    if not quiet and not console.is_terminal:
        return ProgressLines()
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=quiet)
