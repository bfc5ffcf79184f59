"""Comparisons of methods: differences paired by seed, with intervals, and settings chosen by a search."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cbp_jax.report.divergence import diverged_tasks
from cbp_jax.report.statistics import better, blocks_of_tasks, bootstrap_interval, is_accuracy, performance
from cbp_jax.report.tables import text_table

if TYPE_CHECKING:
    import xarray as xr

_RESAMPLES = 10_000


class Estimate(NamedTuple):
    """A mean over seeds and its 95% bootstrap interval; NaN for a single seed, and if a seed has no value."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval is on one side of 0."""
        return self.low > 0 or self.high < 0

    def text(self, digits: int = 2, sign: bool = False) -> str:
        """Return the mean and the interval as text, for tables."""
        if math.isnan(self.mean):
            return "-"
        number = f"{{:{'+' if sign else ''}.{digits}f}}"
        interval = "" if math.isnan(self.low) else f" [{number.format(self.low)}, {number.format(self.high)}]"
        return number.format(self.mean) + interval


def estimate(values: np.ndarray) -> Estimate:
    """Return the mean over seeds and its interval.

    Args:
      values: array [seeds].

    Example:
      >>> estimate(np.array([1.0, 2.0, 3.0])).text()
      '2.00 [1.00, 3.00]'
    """
    values = np.asarray(values, np.float64)
    if not np.isfinite(values).all():
        return Estimate(math.nan, math.nan, math.nan)
    low, high = bootstrap_interval(values[:, None], resamples=_RESAMPLES)
    return Estimate(float(values.mean()), float(low[0]), float(high[0]))


def paired_differences(
    results: xr.Dataset, baseline: str, measure: str | None = None, *, tasks: slice = slice(None)
) -> dict[str, Estimate]:
    """Return the difference between each method and a baseline, paired by seed.

    All methods with the same seed saw the same tasks and started from the same weights, so variation between seeds
    cancels in their difference.

    Args:
      results: results of a run.
      baseline: label of the method with which the others are compared.
      measure: the measure to compare, averaged over the tasks of a seed; by default the performance.
      tasks: positions of the tasks to average over; all by default.

    Returns:
      for each method except the baseline, the estimate of its value minus the baseline's; NaN if a task of either is
      not finished, or diverged.

    Raises:
      ValueError: the baseline is not among the methods.

    Example:
      >>> from cbp_jax.report import new_results, record_task
      >>> results = new_results(["bp", "cbp"], ["bp", "cbp"], [{}, {}], seeds=3, tasks=1, settings={}, experiment="x")
      >>> record_task(results, 0, {"accuracy": [[0.5, 0.6, 0.7], [0.6, 0.7, 0.8]]})
      >>> paired_differences(results, "bp")["cbp"].text()
      '0.10 [0.10, 0.10]'
    """
    methods = results.method.values.tolist()
    if baseline not in methods:
        raise ValueError(f"baseline must be one of {methods}, got {baseline!r}")
    values = {method: of_seeds(results, method, measure, tasks) for method in methods}
    return {method: estimate(values[method] - values[baseline]) for method in methods if method != baseline}


def comparison_table(results: xr.Dataset, baselines: Sequence[str], measures: Sequence[str] = ()) -> str:
    """Return a comparison with an equal tuning budget, as a text table; see `experiments.tuning`.

    Args:
      results: results of a comparison, or of a run.
      baselines: methods that the others are compared with. Those that are absent are left out.
      measures: further measures; a second table has their means over the last tenth of the tasks.

    Returns:
      the table, without a newline at its end.
    """
    measure, methods = performance(results), results.method.values.tolist()
    baselines = [baseline for baseline in baselines if baseline in methods]
    scale, digits = (100, 2) if is_accuracy(measure) else (1, 3 if measure == "loss" else 0)
    last = blocks_of_tasks(results.sizes["task"])[-1]
    settings, at_edge = chosen_settings(results), False
    differences = {baseline: paired_differences(scaled(results, measure, scale), baseline) for baseline in baselines}
    rows = [("method", "chosen", "all tasks", "last tenth", *(f"minus {baseline}" for baseline in baselines))]
    for method in methods:
        of_method = [estimate(scale * of_seeds(results, method, measure, tasks)) for tasks in (slice(None), last)]
        row = [method, settings[method].text, *(each.text(digits) for each in of_method)]
        for found in differences.values():
            row.append(_claim(found[method], measure, digits) if method in found else "")
        at_edge |= settings[method].at_edge
        rows.append(tuple(row))
    what = measure.replace("_", " ") + (" in percent" if is_accuracy(measure) else "")
    lines = [
        f"{results.attrs['experiment']}: {what}, mean over {results.sizes['seed']} seeds, its 95% bootstrap interval",
        "",
        *text_table(rows, left=None),
        "",
        'Differences are paired by seed, over all tasks. Unless marked "better" or "worse", their interval includes 0.',
        f"Intervals are not corrected for multiple comparisons ({max(len(methods) - 1, 1)} in a column).",
    ]
    for method in methods:
        diverged = int(np.isfinite(diverged_tasks(results, method)).sum())
        if diverged:
            lines.append(f"{method}: {diverged} of {results.sizes['seed']} seeds diverged, so it is not compared.")
    if "tuning_seed" in results.dims:
        tried, seeds = results.sizes["candidate"], results.sizes["tuning_seed"]
        lines.append(
            f"Each method has its best of {tried} configurations, over {seeds} other seed{'s' * (seeds > 1)}."
            + " !: at an end of the values that were tried." * at_edge
        )
    measures = [name for name in measures if name in results]
    if measures:
        rows = [("last tenth of tasks", *(name.replace("_", " ") for name in measures))]
        for method in methods:
            found = [estimate(of_seeds(results, method, name, last)) for name in measures]
            rows.append((method, *(each.text(3) for each in found)))
        lines += ["", *text_table(rows, left=None)]
    return "\n".join(lines)


class Chosen(NamedTuple):
    """The settings chosen by a search, as text for tables, and whether one is at an end of the range that was tried."""

    text: str
    at_edge: bool


def chosen_settings(results: xr.Dataset) -> dict[str, Chosen]:
    """Return the settings chosen by a search, by method; empty if there was no search, or it is not finished."""
    found = {}
    for method in results.method.values.tolist():
        found[method] = Chosen("", False)
        best = best_candidate(results, method)
        if best is None:
            continue
        tried = tried_settings(results, method)
        texts, edges = [], False
        for name, value in tried[best].items():
            numbers = sorted({each[name] for each in tried if isinstance(each[name], int | float)})
            edge = len(numbers) > 2 and value in (numbers[0], numbers[-1])
            texts.append(f"{name}={value:g}{'!' * edge}" if numbers else f"{name}={value}")
            edges |= edge
        found[method] = Chosen(", ".join(texts), edges)
    return found


def of_seeds(results: xr.Dataset, method: str, measure: str | None = None, tasks: slice = slice(None)) -> np.ndarray:
    """Return means over tasks [seeds]; NaN if a task is missing, or the seed diverged."""
    values = results[measure or performance(results)].loc[{"method": method}].transpose("seed", "task").values
    healthy = np.isnan(diverged_tasks(results, method))
    return np.where(healthy, values[:, tasks].astype(np.float64).mean(1), np.nan)


def scaled(results: xr.Dataset, measure: str, scale: float) -> xr.Dataset:
    """Return the results with a measure in another unit."""
    return results.assign({measure: scale * results[measure].astype(np.float64)})


def _claim(found: Estimate, measure: str, digits: int) -> str:
    word = ""
    if found.excludes_zero:
        word = " better" if better(measure) * found.mean > 0 else " worse"
    return found.text(digits, sign=True) + word


def tried_settings(results: xr.Dataset, method: str) -> list[dict[str, Any]]:
    """Return the settings by name of each configuration of a method's search."""
    return json.loads(results.configurations.loc[{"method": method}].item())


def tuning_scores(results: xr.Dataset, method: str) -> np.ndarray:
    """Return the mean performance of each configuration over tuning seeds [candidate]; NaN if it diverged."""
    found = results.tuning_performance.loc[{"method": method}].transpose("candidate", "tuning_seed").values
    return found.astype(np.float64).mean(1)


def best_candidate(results: xr.Dataset, method: str) -> int | None:
    """Return the chosen configuration; None if there was no search, it is not finished, or all configurations
    diverged."""
    if "configurations" not in results.coords or not results.chosen.loc[{"method": method}].item():
        return None
    scores = better(performance(results)) * tuning_scores(results, method)
    return int(np.nanargmax(scores)) if np.isfinite(scores).any() else None
