"""Statistics for pictures and tables of a run: means and errors over seeds, tenths of the tasks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cbp_jax.report.divergence import diverged_tasks, told
from cbp_jax.report.tables import text_table

if TYPE_CHECKING:
    import xarray as xr


def mean_and_error(values: np.ndarray, axis: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and standard error over the seeds that have a value.

    Args:
      values: an array with seeds along ``axis``. Non-finite values are left out.
      axis: the axis of seeds.

    Returns:
      ``(mean, error)``, float64, without that axis. ``error`` is the sample standard deviation over the
      square root of the number of seeds: NaN if fewer than two seeds have a value. ``mean`` is NaN if none has.

    Example:
      >>> mean, error = mean_and_error(np.array([1.0, 3.0, np.nan]))
      >>> print(mean, error)
      2.0 1.0
    """
    values = np.asarray(values, np.float64)
    values = np.where(np.isfinite(values), values, np.nan)
    n = np.isfinite(values).sum(axis)
    mean = np.nansum(values, axis) / np.where(n > 0, n, np.nan)
    squares = np.nansum((values - np.expand_dims(mean, axis)) ** 2, axis)
    return mean, np.sqrt(squares / np.where(n > 1, n - 1, np.nan) / np.where(n > 0, n, np.nan))


def blocks_of_tasks(tasks: int, blocks: int = 10) -> list[slice]:
    """Split a sequence of tasks into contiguous blocks of nearly equal length, with longer blocks last.

    Args:
      tasks: number of tasks.
      blocks: number of blocks; one for each task if there are fewer tasks.

    Returns:
      The blocks in order, together all the tasks.

    Example:
      >>> blocks_of_tasks(5, 2)
      [slice(0, 2, None), slice(2, 5, None)]
    """
    blocks = min(blocks, tasks)
    edges = [i * tasks // blocks for i in range(blocks + 1)] if blocks else []
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def performance(results: xr.Dataset) -> str:
    """Return the measure of performance of a run.

    That is "test_accuracy" if tasks have test examples, otherwise "accuracy", or "loss" for regressions;
    "episode_return" for agents.

    Raises:
      ValueError: the results have none of these along [method, seed, task].
    """
    for name in ("episode_return", "test_accuracy", "accuracy", "loss"):
        if name in results and set(results[name].dims) == {"method", "seed", "task"}:
            return name
    have = {name: variable.dims for name, variable in results.data_vars.items()}
    raise ValueError(f"results must have an accuracy, a loss or an episode_return [method, seed, task]; got {have}")


def is_accuracy(measure: str) -> bool:
    """Return whether a measure of performance is shown in percent."""
    return measure in ("accuracy", "test_accuracy")


def better(measure: str) -> int:
    """Return 1 if a higher value of a performance measure is better, -1 if a lower value is."""
    return -1 if measure == "loss" else 1


def finished_tasks(results: xr.Dataset, method: str) -> tuple[np.ndarray, int]:
    """Return the progress of a method.

    Args:
      results: results of a run.
      method: label of the method.

    Returns:
      The indices of seeds that have finished a task and have not diverged, and the number of tasks that all of these
      have finished.

    Raises:
      ValueError: the results have no ``accuracy`` or ``loss`` [method, seed, task], which mark finished tasks.
    """
    values = results[performance(results)]
    done = np.isfinite(values.loc[{"method": method}].transpose("seed", "task").values)
    seeds = np.flatnonzero(done.any(1) & np.isnan(diverged_tasks(results, method)))
    return seeds, int(done[seeds].all(0).cumprod().sum()) if len(seeds) else 0


def last_tenth(results: xr.Dataset, method: str, measure: str | None = None) -> np.ndarray:
    """Return the mean of a measure over the last tenth of a method's finished tasks, for each seed.

    Args:
      results: results of a run.
      method: label of the method.
      measure: name of the data variable; by default the :func:`performance`.

    Returns:
      Array [seeds], float64, of the seeds that have run; empty if the method has finished no task.
    """
    return _blocks(results, method, measure or performance(results))[:, -1:].ravel()


def summary(results: xr.Dataset) -> str:
    """Return the results of a run as a text table.

    For each method the table shows its performance (accuracy in percent, loss, or return) in the first, the best and
    the last tenth of its finished tasks (the best by the mean over seeds); how much of the best was lost at the end (a
    difference within each seed); the mean plasticity over all tasks, if measured; and the dead units in the last tenth
    in percent, or the dormant units if only these were counted. Performances are the mean over seeds and half the width
    of its 95% confidence interval (Student's t), which requires at least two seeds. Diverged seeds are left out, and
    listed below the table.

    Args:
      results: results of a run.

    Returns:
      The table, without a newline at its end.
    """
    total, measure = results.sizes["task"], performance(results)
    scale, sign = 100 if is_accuracy(measure) else 1, better(measure)
    digits = {"loss": 3, "episode_return": 0}.get(measure, 2)
    useless = "dormant_units" if "dead_units" not in results and "dormant_units" in results else "dead_units"
    plasticity = ("plasticity",) if "plasticity" in results else ()
    tenths = ("first tenth", "best tenth", "of tasks", "last tenth", "lost")
    table = [("method", "seeds", "tasks", *tenths, *plasticity, useless.replace("_", " "))]
    for method in results.method.values.tolist():
        seeds, tasks = finished_tasks(results, method)
        progress = (method, str(len(seeds)), str(tasks) if tasks == total else f"{tasks}/{total}")
        if not tasks:
            table.append((*progress, *["-"] * (len(table[0]) - len(progress))))
            continue
        values = scale * _blocks(results, method, measure)
        best = int((sign * values.mean(0)).argmax())
        block = blocks_of_tasks(tasks)[best]
        dead = last_tenth(results, method, useless) if useless in results else np.array([])
        table.append(
            (
                *progress,
                interval_text(values[:, 0], digits),
                interval_text(values[:, best], digits),
                f"{block.start + 1}-{block.stop}" if block.stop - block.start > 1 else f"{block.stop}",
                interval_text(values[:, -1], digits),
                interval_text(sign * (values[:, best] - values[:, -1]), digits),
                *(f"{_over_tasks(results, method, name):.3f}" for name in plasticity),
                f"{100 * np.nanmean(dead):.1f}" if np.isfinite(dead).any() else "-",
            )
        )
    experiment = results.attrs.get("experiment", "run")
    what = measure.replace("_", " ") + (" in percent" if is_accuracy(measure) else "")
    title = f"{experiment}: {what}, mean over seeds ± half its 95% confidence interval"
    notes = told(results)
    return "\n".join([title, "", *text_table(table), *([""] if notes else []), *notes])


def bootstrap_interval(values: np.ndarray, *, resamples: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Return a 95% bootstrap interval of the mean over seeds, by percentiles.

    Args:
      values: array [seeds, n]. Non-finite values are left out.
      resamples: number of bootstrap samples, the same ones at every call.

    Returns:
      lower and upper ends [n], float64; NaN if no seed or only one has a value.

    Example:
      >>> low, high = bootstrap_interval(np.array([[1.0, 5.0], [3.0, 5.0]]))
      >>> low.tolist(), high.tolist()
      ([1.0, 5.0], [3.0, 5.0])
    """
    values = np.asarray(values, np.float64)
    chosen = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    means, _ = mean_and_error(values[chosen], axis=1)
    some = np.isfinite(values).sum(0) > 1
    ends = np.full((2, values.shape[1]), np.nan)
    ends[:, some] = np.nanpercentile(means[:, some], [2.5, 97.5], axis=0)
    return ends[0], ends[1]


def bootstrap_text(values: np.ndarray, digits: int = 2, of: Callable[[Any], Any] = lambda value: value) -> str:
    """Return the mean over seeds and its 95% bootstrap interval.

    Args:
      values: array [seeds]. Non-finite values are left out.
      digits: number of digits after the decimal point.
      of: an increasing function applied to the mean and the ends: `np.exp` turns the mean of logarithms into a
        geometric mean.

    Returns:
      "mean [low, high]"; only the mean for one seed, and "-" for none.

    Example:
      >>> bootstrap_text(np.array([1.0, 1.0, np.nan])), bootstrap_text(np.log([8.0]), 1, np.exp)
      ('1.00 [1.00, 1.00]', '8.0')
    """
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    if not values.size:
        return "-"
    low, high = bootstrap_interval(values[:, None])
    mean = f"{of(values.mean()):.{digits}f}"
    return mean if values.size < 2 else f"{mean} [{of(low[0]):.{digits}f}, {of(high[0]):.{digits}f}]"


def _blocks(results: xr.Dataset, method: str, measure: str) -> np.ndarray:
    """Return means of a measure over tenths of a method's finished tasks: [seeds that have run, at most 10]."""
    seeds, tasks = finished_tasks(results, method)
    values = results[measure].loc[{"method": method}].transpose("seed", "task").values[seeds]
    means = [values[:, block].mean(1, dtype=np.float64) for block in blocks_of_tasks(tasks)]
    return np.stack(means, 1) if means else np.zeros((len(seeds), 0))


def _over_tasks(results: xr.Dataset, method: str, measure: str) -> float:
    """Return the mean of a measure over a method's finished tasks and the seeds that have run."""
    seeds, tasks = finished_tasks(results, method)
    values = results[measure].loc[{"method": method}].transpose("seed", "task").values[seeds, :tasks]
    return float(values.mean(dtype=np.float64))


def interval_text(values: np.ndarray, digits: int) -> str:
    """Return the mean over seeds and half the width of its 95% confidence interval; only the mean for one seed.
    Non-finite values are left out."""
    from scipy import stats

    values = values[np.isfinite(values)]
    mean, error = mean_and_error(values)
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {stats.t.ppf(0.975, len(values) - 1) * error:.{digits}f}"


def binned(values: np.ndarray, bin_size: int, bootstrap: bool = False) -> tuple[np.ndarray, ...]:
    """Average values [seeds, tasks] in bins. Return the bins' centers (tasks count from 1), means and ends of the
    band."""
    seeds, tasks = values.shape
    bins = math.ceil(tasks / bin_size)
    # Padded with NaN, which the means leave out, like tasks that have not run.
    values = np.pad(values, ((0, 0), (0, bins * bin_size - tasks)), constant_values=np.nan)
    task = np.broadcast_to(np.arange(1.0, bins * bin_size + 1), values.shape)
    task = np.where(np.isfinite(values), task, np.nan)
    per_seed, _ = mean_and_error(values.reshape(seeds, bins, bin_size), axis=2)
    mean, error = mean_and_error(per_seed, axis=0)
    middle, _ = mean_and_error(task.reshape(seeds, bins, bin_size).swapaxes(0, 1).reshape(bins, -1), axis=1)
    some = np.isfinite(mean)
    low, high = bootstrap_interval(per_seed) if bootstrap else (mean - error, mean + error)
    return middle[some], mean[some], low[some], high[some]


def over_steps(results: xr.Dataset) -> bool:
    """Return whether "tasks" are intervals of an agent's steps."""
    return performance(results) == "episode_return"


def started(results: xr.Dataset) -> list[str]:
    """Return the methods that have finished a task with every seed that was started."""
    return [method for method in results.method.values.tolist() if finished_tasks(results, method)[1]]


def begun(results: xr.Dataset) -> list[str]:
    """Return the methods that have `started`, and those whose seeds have all diverged."""
    some_finished = started(results)
    all_diverged = lambda method: np.isfinite(diverged_tasks(results, method)).all()
    return [method for method in results.method.values.tolist() if method in some_finished or all_diverged(method)]


def unfinished(results: xr.Dataset, method: str) -> bool:
    """Return whether a method still has tasks to do."""
    return finished_tasks(results, method)[1] < results.sizes["task"]


def with_diverged(results: xr.Dataset, methods: Sequence[str]) -> list[str]:
    """Return the methods with a diverged seed."""
    return [method for method in methods if np.isfinite(diverged_tasks(results, method)).any()]


def diverged_note(results: xr.Dataset, methods: Sequence[str]) -> str:
    """Return the end of a picture's note, which explains crosses if there are any."""
    return "; cross: a seed diverged, and is left out" if with_diverged(results, methods) else ""


def seeds_note(results: xr.Dataset, methods: Sequence[str]) -> str:
    """Return the start of a picture's note, which explains lines and bands."""
    counts = {len(finished_tasks(results, method)[0]) for method in methods}
    if counts == {1}:
        return "One seed"
    seeds = str(counts.pop()) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    band = "95% bootstrap interval" if over_steps(results) else "one standard error"
    return f"Mean and {band} of {seeds} seeds"
