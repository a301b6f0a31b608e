"""The scores of tasks, and how they differ from the reference's."""

import math
from collections.abc import Iterator
from statistics import mean, stdev
from typing import Any

from mla_converters.reports.evaluation import TaskScore

SIGNIFICANT = 1.96
"""Standard errors of a difference that chance exceeds in one case of twenty."""
FEWEST = 6
"""Problems that must differ before a difference counts: that five of five go one way has a chance of one in sixteen."""
UNFILTERED = "none"


def measured(results: dict[str, Any]) -> list[TaskScore]:
    """What the harness measured, groups of tasks before their tasks.

    Args:
        results: of ``lm_eval.evaluate``, with its samples.
    """
    of_tasks = {task: list(_of_task(task, results)) for task in results["samples"]}
    groups = results.get("group_subtasks") or {}
    members = {group: list(_members(group, groups, of_tasks)) for group in groups}
    of_groups = [row for group, tasks in members.items() if tasks for row in _of_group(group, tasks, of_tasks)]
    return [*of_groups, *(row for rows in of_tasks.values() for row in rows)]


def _of_task(task: str, results: dict[str, Any]) -> Iterator[TaskScore]:
    samples, scores = results["samples"][task], results["results"][task]
    better = results["higher_is_better"].get(task) or {}
    filters = dict.fromkeys(sample["filter"] for sample in samples)
    for name in filters:
        own = [sample for sample in samples if sample["filter"] == name]
        for metric in own[0]["metrics"]:
            score = scores.get(f"{metric},{name}")
            if not isinstance(score, int | float):
                continue
            values = [sample.get(metric) for sample in sorted(own, key=lambda sample: sample["doc_id"])]
            higher = better.get(metric)
            yield _figures(
                values if _averages_to(score, values) else None,
                task=task,
                metric=metric,
                filter=None if name == UNFILTERED else name,
                higher_is_better=True if higher is None else higher,
                problems=len(own),
                few_shot=results["n-shot"].get(task),
                score=score,
            )


def _averages_to(score: float, values: list[Any]) -> bool:
    numbers = all(isinstance(value, int | float) for value in values)
    return numbers and math.isclose(mean(values), score, abs_tol=1e-9)


def _figures(values: list[Any] | None, **fields: Any) -> TaskScore:
    """A row. Its standard error, and whether it is a share of problems, follow from the scores of the problems."""
    numbers = None if values is None else [float(value) for value in values]
    spread = None if numbers is None else _stderr(numbers)
    fraction = numbers is not None and all(0 <= value <= 1 for value in numbers)
    return TaskScore(**fields, stderr=spread, fraction=fraction, score_of_each=numbers)


def _stderr(values: list[float]) -> float | None:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _members(name: str, groups: dict[str, list[str]], tasks: dict[str, list[TaskScore]]) -> Iterator[str]:
    """The tasks in a group and in the groups within it."""
    for child in groups.get(name, []):
        if child in tasks:
            yield child
        else:
            yield from _members(child, groups, tasks)


def _of_group(group: str, members: list[str], of_tasks: dict[str, list[TaskScore]]) -> Iterator[TaskScore]:
    """The metrics that all tasks of a group have, over the problems of all."""
    first, *others = ({(row.metric, row.filter): row for row in of_tasks[task]} for task in members)
    for kind, row in first.items():
        rows = [row, *(other[kind] for other in others if kind in other)]
        if len(rows) < len(members) or any(each.score_of_each is None for each in rows):
            continue
        pooled = [value for each in rows for value in each.score_of_each or []]
        yield _figures(
            pooled,
            task=group,
            metric=row.metric,
            filter=row.filter,
            higher_is_better=row.higher_is_better,
            problems=len(pooled),
            score=mean(pooled),
        )


def compared(rows: list[TaskScore], reference: list[TaskScore]) -> list[TaskScore]:
    """The scores of a model, with their differences from the reference's on the same problems."""
    theirs = {row.measure: row for row in reference}
    return [_compared(row, theirs[row.measure]) for row in rows]


def _compared(own: TaskScore, theirs: TaskScore) -> TaskScore:
    difference = own.score - theirs.score
    if own.score_of_each is None or theirs.score_of_each is None:
        return own.model_copy(update={"difference": difference})
    changes = [value - beside for value, beside in zip(own.score_of_each, theirs.score_of_each, strict=True)]
    error = _stderr(changes)
    fraction = own.fraction and theirs.fraction
    words = None if error is None else verdict(changes, error, own.higher_is_better, fraction)
    return own.model_copy(
        update={"difference": difference, "difference_stderr": error, "verdict": words, "fraction": fraction}
    )


def verdict(changes: list[float], error: float, higher_is_better: bool, fraction: bool) -> str:
    """A paired difference in words.

    Args:
        changes: score of the model minus the reference's, for each problem.
        error: standard error of their mean.
        higher_is_better: whether a larger score is better.
        fraction: whether scores are shares, so that differences are in percentage points.
    """
    difference, differing = mean(changes), sum(change != 0 for change in changes)
    problems = f"on {len(changes):,} problems"
    if abs(difference) <= SIGNIFICANT * error or differing < FEWEST:
        return f"not distinguishable from the reference {problems}"
    word = "better" if (difference > 0) == higher_is_better else "worse"
    size = abs(difference)
    amount = f"{100 * size:.1f} ± {100 * error:.1f} points" if fraction else f"{size:.4f} ± {error:.4f}"
    return f"{word} by {amount} {problems}"
