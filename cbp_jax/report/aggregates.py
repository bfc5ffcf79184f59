"""Statistics of a benchmark: interquartile means, their stratified bootstrap intervals, and ranks.

As in Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice", NeurIPS 2021 (public
program: rliable): the interquartile mean is taken over the runs of all problems together, and bootstrap samples are
drawn for each problem separately.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 2000


def interquartile_mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return the interquartile mean: the mean without the lowest and the highest quarter of the values.

    `floor(n / 4)` values are left out at either end, as `scipy.stats.trim_mean(values, 0.25)` does.

    Args:
      values: of any shape, at least one along the axis.
      axis: the axis along which the mean is taken.

    Returns:
      float64, without that axis.

    Raises:
      ValueError: there are no values.

    Example:
      >>> float(interquartile_mean(np.array([0.0, 1.0, 3.0, 100.0])))
      2.0
    """
    values = np.sort(np.moveaxis(np.asarray(values, np.float64), axis, -1), axis=-1)
    n = values.shape[-1]
    if not n:
        raise ValueError("values must have at least one along the axis, got none")
    return values[..., n // 4 : n - n // 4].mean(-1)


def draws(sizes: Sequence[int], resamples: int = RESAMPLES) -> list[np.ndarray]:
    """Draw the runs of each bootstrap sample, for each problem separately.

    Args:
      sizes: how many runs each problem has.
      resamples: how many samples.

    Returns:
      for each problem, indices of its runs [resamples, size], the same at every call. Methods with the same seeds share
      them, so that differences between seeds cancel in comparisons.

    Raises:
      ValueError: a problem has no runs.
    """
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes must be at least one, each at least 1, got {list(sizes)}")
    rng = np.random.default_rng(0)
    return [rng.integers(size, size=(resamples, size)) for size in sizes]


def stratified_bootstrap(
    scores: Sequence[np.ndarray],
    statistic: Callable[[np.ndarray], np.ndarray] = interquartile_mean,
    *,
    resamples: int = RESAMPLES,
) -> tuple[float, float]:
    """Return a 95% interval of a statistic over the runs of all problems, from percentiles of stratified bootstrap
    samples.

    Args:
      scores: for each problem, the scores of its runs [runs].
      statistic: a function of an array that reduces its last axis.
      resamples: number of samples, the same ones at every call.

    Returns:
      lower and upper end; NaN if every problem has only one run.

    Raises:
      ValueError: there is no problem, or a problem without runs.

    Example:
      >>> stratified_bootstrap([np.array([0.0, 0.0]), np.array([1.0, 1.0])])
      (0.5, 0.5)
    """
    scores = [np.asarray(values, np.float64) for values in scores]
    chosen = draws([len(values) for values in scores], resamples)
    if max(map(len, scores)) < 2:
        return np.nan, np.nan
    drawn = [values[rows] for values, rows in zip(scores, chosen, strict=True)]
    low, high = np.percentile(statistic(np.concatenate(drawn, axis=-1)), [2.5, 97.5])
    return float(low), float(high)


def ranks(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Return ranks by value, where the largest has rank 1. Equal values share the mean of their ranks.

    Args:
      values: of any shape.
      axis: the axis along which values are ranked.

    Returns:
      float64 of the same shape.

    Example:
      >>> ranks(np.array([0.3, 0.9, 0.3])).tolist()
      [2.5, 1.0, 2.5]
    """
    values = np.moveaxis(np.asarray(values, np.float64), axis, -1)
    above = (values[..., None, :] > values[..., :, None]).sum(-1)
    equal = (values[..., None, :] == values[..., :, None]).sum(-1)
    return np.moveaxis(above + (equal + 1) / 2, -1, axis)


def mean_rank_intervals(values: Sequence[np.ndarray], *, resamples: int = RESAMPLES) -> np.ndarray:
    """Return 95% intervals of the mean rank of each method over problems; all methods have the same bootstrap samples.

    A method's rank in a problem is that of the interquartile mean of its runs.

    Args:
      values: for each problem, the performance of its runs [methods, runs]; higher is better.
      resamples: how many samples.

    Returns:
      lower and upper ends [methods, 2].

    Example:
      >>> mean_rank_intervals([np.array([[1.0, 2.0], [3.0, 4.0]])]).tolist()
      [[2.0, 2.0], [1.0, 1.0]]
    """
    chosen = draws([problem.shape[1] for problem in values], resamples)
    found = [ranks(interquartile_mean(problem[:, rows])) for problem, rows in zip(values, chosen, strict=True)]
    return np.percentile(np.mean(found, axis=0), [2.5, 97.5], axis=1).T
