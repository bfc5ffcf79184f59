"""Common parts of the reports of questions: lines with a band, notes, differences, correlations."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cbp_jax.report.drawing import marker, write_note
from cbp_jax.report.looks import Style
from cbp_jax.report.statistics import blocks_of_tasks, bootstrap_interval, bootstrap_text, mean_and_error

_BINS = 25


def values_of(results: Any, name: str, method: str) -> np.ndarray:
    """Return the values of one method, float64 [seeds, tasks, ...]."""
    return results[name].loc[{"method": method}].transpose("seed", "task", ...).values.astype(np.float64)


def mean_of(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return means of the finite values along an axis; NaN where there are none."""
    return mean_and_error(values, axis)[0]


def draw_line(
    ax: Any,
    x: np.ndarray,
    values: np.ndarray,
    style: Style,
    label: str | None = None,
    *,
    dashes: Any = None,
    every: int | None = None,
    of: Callable[[Any], Any] = lambda value: value,
    band: bool = True,
) -> None:
    """Draw the mean over seeds in a band, the 95% bootstrap interval; points that no seed has are left out.

    Args:
      ax: Matplotlib's axes.
      x: [n].
      values: [seeds, n].
      style: style of the line.
      label: in the legend.
      dashes: dashes to use instead of the style's.
      every: number of points from one marker to the next; by default such that there are at most six markers.
      of: an increasing function of means and ends, as in `bootstrap_text`.
      band: whether the band is drawn.
    """
    mean, _ = mean_and_error(values)
    some = np.isfinite(mean)
    ax.plot(
        x[some],
        of(mean[some]),
        color=style.color,
        linestyle=style.dashes if dashes is None else dashes,
        linewidth=1.0,
        **marker(style, 2.8),
        markevery=every or max(1, -(-int(some.sum()) // 6)),
        label=label,
    )
    if band and len(values) > 1:
        low, high = bootstrap_interval(values[:, some])
        ax.fill_between(x[some], of(low), of(high), color=style.color, alpha=0.18, linewidth=0)


def draw_tasks(ax: Any, values: np.ndarray, style: Style, label: str, *, band: bool = True) -> None:
    """Draw a line of the values of each task, in at most 25 bins of tasks.

    Args:
      ax: Matplotlib's axes.
      values: [seeds, tasks].
      style, label, band: as in `draw_line`.
    """
    blocks = blocks_of_tasks(values.shape[1], _BINS)
    middles = np.array([(block.start + block.stop + 1) / 2 for block in blocks])
    draw_line(ax, middles, np.stack([mean_of(values[:, block]) for block in blocks], 1), style, label, band=band)


def note(figure: Any, results: Any, more: str = "") -> None:
    """Write a note below a picture that explains its bands, and more."""
    seeds = results.sizes["seed"]
    text = f"Mean and 95% bootstrap interval of {seeds} seeds" if seeds > 1 else "One seed"
    write_note(figure, text + more)


def differences(
    values: Mapping[str, np.ndarray], first: str, digits: int = 2, of: Callable[[Any], Any] = lambda value: value
) -> dict[str, str]:
    """Return the difference of each method to the first, paired by seed.

    Args:
      values: by method, [seeds], of the same seeds in the same order; NaN where a method was not run with a seed.
      first: the method that others are compared with.
      digits, of: as in `bootstrap_text`.

    Example:
      >>> differences({"bp": np.array([1.0, 2.0]), "cbp": np.array([2.0, 3.0])}, "bp", 1)
      {'cbp': '1.0 [1.0, 1.0]'}
    """
    return {
        method: bootstrap_text(each - values[first], digits, of) for method, each in values.items() if method != first
    }


def rank_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return Spearman's correlation between the rows [n] of two arrays.

    It is NaN for rows with fewer than three pairs of values, or with constant values.

    >>> rank_correlation(np.array([[1.0, 2.0, 4.0]]), np.array([[9.0, 5.0, 0.0]])).tolist()
    [-1.0]
    """
    from scipy import stats

    found = np.full(len(a), np.nan)
    for row, (x, y) in enumerate(zip(a, b, strict=True)):
        some = np.isfinite(x) & np.isfinite(y)
        if some.sum() > 2 and np.ptp(x[some]) > 0 and np.ptp(y[some]) > 0:
            found[row] = stats.spearmanr(x[some], y[some]).statistic
    return found
