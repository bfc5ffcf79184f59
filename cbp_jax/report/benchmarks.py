"""The table of a benchmark: methods tuned with the same budget, over several problems.

How scores are computed:

1. The *performance* of a run is the mean over all tasks of its problem's measure (`statistics.performance`), with a
   sign such that higher is better. A run whose performance or loss is not finite has diverged, and is worse than all
   others.
2. The performance of a method on a problem is the interquartile mean over its runs (`aggregates.interquartile_mean`).
3. The *gain* of a run is its performance minus that of plain backpropagation with the same seed, which saw the same
   tasks and started from the same weights. The *score* of a run is its gain divided by the interquartile mean of the
   gains of the best method in the table: plain backpropagation has score 0 in every run, and the best method 1. If no
   method gains anything, the worst method that did not diverge has -1. Scores are clipped to [-1, 2]: a diverged run
   has -1, and a single run cannot outweigh all others if methods hardly differ. (A diverged run of plain
   backpropagation counts as its worst run that did not diverge.)
4. The score of a method is the interquartile mean over its runs of a problem, and, overall, over its runs of all
   problems together. Intervals are from stratified bootstrap samples of these runs; the divisor of scores is kept
   fixed.
5. Ranks are those of the interquartile means of performance. The overall rank is their mean over problems, among
   methods that have results for all problems.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cbp_jax.report import aggregates
from cbp_jax.report.comparisons import chosen_settings, of_seeds
from cbp_jax.report.looks import readable
from cbp_jax.report.statistics import better, is_accuracy, last_tenth, performance

if TYPE_CHECKING:
    import xarray as xr

BASELINE = "bp"
COST = "step_cost"  # coordinate along method: time of an update relative to plain backpropagation
LIMITS = (-1.0, 2.0)  # of scores
_SYMPTOMS = (("dead_units", "dormant_units"), ("effective_rank", "stable_rank"))

NOTES = (
    "Values are interquartile means over held-out seeds, with 95% stratified bootstrap intervals. Score of a run: "
    "its gain over plain backpropagation with the same seed, divided by the gain of the table's best method, clipped "
    "to [-1, 2]: plain backpropagation has 0, the best method 1, and diverged runs -1. If no method gains anything, "
    "the worst that did not diverge has -1. The overall score is the interquartile mean over the runs of all its "
    "problems; the overall rank is the mean of the ranks in each, among methods that have all of them. Dead units and "
    "effective rank (dormant units and stable rank of agents) are means over the last tenth of the tasks, in percent. "
    "Cost: time of an update over that of plain backpropagation."
)


@dataclasses.dataclass(frozen=True)
class Standing:
    """Results of all methods on a problem.

    Attributes:
      measure: the measure of performance.
      methods: labels of the methods, in the order of the other attributes.
      values: performance of each run [methods, runs]; higher is better, -inf for diverged runs.
      scores: score of each run [methods, runs]; None if plain backpropagation is missing, or always diverged.
      ranks: rank of each method [methods]; 1 is the best.
      symptoms: dead units and effective rank [methods, 2]; NaN if not measured.
      costs: time of an update relative to plain backpropagation [methods]; NaN if not measured.
    """

    measure: str
    methods: list[str]
    values: np.ndarray
    scores: np.ndarray | None
    ranks: np.ndarray
    symptoms: np.ndarray
    costs: np.ndarray

    def scores_of(self, method: str) -> np.ndarray | None:
        """Return the scores of a method's runs [runs], or None."""
        return self.scores[self.methods.index(method)] if self.scores is not None and method in self.methods else None


def standing(results: xr.Dataset, baseline: str = BASELINE) -> Standing:
    """Compute the results of all methods on a problem.

    Args:
      results: finished results of all methods with the same seeds.
      baseline: label of plain backpropagation.
    """
    measure, methods = performance(results), results.method.values.tolist()
    values = np.stack([better(measure) * of_seeds(results, method, measure) for method in methods])
    finite = np.isfinite(values)
    if "loss" in results:
        finite &= np.isfinite([of_seeds(results, method, "loss") for method in methods])
    values = np.where(finite, values, -np.inf)
    means = aggregates.interquartile_mean(values)
    symptoms = [[_last(results, method, names) for names in _SYMPTOMS] for method in methods]
    costs = results[COST].values if COST in results.coords else np.full(len(methods), np.nan)
    scores = _scores(values, values[methods.index(baseline)]) if baseline in methods else None
    return Standing(measure, methods, values, scores, aggregates.ranks(means), np.array(symptoms), np.array(costs))


def _scores(values: np.ndarray, baseline: np.ndarray) -> np.ndarray | None:
    """Return the scores of runs [methods, runs], given plain backpropagation's performance [runs]; None if it always
    diverged."""
    there = np.isfinite(baseline)
    if not there.any():
        return None
    gains = values - np.where(there, baseline, baseline[there].min())
    means = aggregates.interquartile_mean(gains)
    unit = means.max() if means.max() > 0 else -means[np.isfinite(means)].min(initial=0.0)
    return np.clip(gains / (unit or 1.0), *LIMITS)


def _last(results: xr.Dataset, method: str, names: Sequence[str]) -> float:
    name = next((name for name in names if name in results), None)
    found = last_tenth(results, method, name) if name else np.array([])
    return 100 * float(np.mean(found[np.isfinite(found)])) if np.isfinite(found).any() else math.nan


@dataclasses.dataclass(frozen=True)
class Overall:
    """The overall result of a method.

    Attributes:
      method: its label.
      problems: the counted problems for which it has results.
      complete: whether these are all counted problems.
      score: interquartile mean over its runs of all these problems, with interval; NaN without plain backpropagation.
      rank: its mean rank among complete methods, with interval; NaN if it is not complete.
    """

    method: str
    problems: list[str]
    complete: bool
    score: tuple[float, float, float]
    rank: tuple[float, float, float]


def overall(standings: Mapping[str, Standing], counted: Sequence[str] | None = None) -> list[Overall]:
    """Return the overall results of all methods, the best first.

    Args:
      standings: by problem.
      counted: the problems that count; all by default.

    Raises:
      ValueError: a counted problem is missing.
    """
    counted = list(standings) if counted is None else list(counted)
    if not counted or (unknown := [name for name in counted if name not in standings]):
        raise ValueError(f"counted must be some of {list(standings)}, got {unknown if counted else counted}")
    methods = list(dict.fromkeys(method for each in standings.values() for method in each.methods))
    there = {method: [name for name in counted if method in standings[name].methods] for method in methods}
    complete = [method for method in methods if len(there[method]) == len(counted)]
    ranked = _mean_ranks([standings[name] for name in counted], complete)
    found = []
    for method in methods:
        scores = [standings[name].scores_of(method) for name in there[method]]
        scores = [values for values in scores if values is not None]
        score = (math.nan,) * 3
        if scores:
            mean = float(aggregates.interquartile_mean(np.concatenate(scores)))
            score = (mean, *aggregates.stratified_bootstrap(scores))
        rank = ranked.get(method, (math.nan,) * 3)
        found.append(Overall(method, there[method], method in complete, score, rank))
    last = lambda value: math.inf if math.isnan(value) else value
    return sorted(found, key=lambda each: (last(-each.score[0]), last(each.rank[0])))


def _mean_ranks(standings: Sequence[Standing], methods: Sequence[str]) -> dict[str, tuple[float, float, float]]:
    if not methods:
        return {}
    values = [each.values[[each.methods.index(method) for method in methods]] for each in standings]
    means = np.mean([aggregates.ranks(aggregates.interquartile_mean(problem)) for problem in values], axis=0)
    intervals = aggregates.mean_rank_intervals(values)
    return {
        method: (float(mean), *map(float, ends)) for method, mean, ends in zip(methods, means, intervals, strict=True)
    }


def benchmark_table(
    problems: Mapping[str, xr.Dataset],
    counted: Sequence[str] | None = None,
    *,
    title: str = "Benchmark",
    baseline: str = BASELINE,
) -> str:
    """Return the tables of a benchmark as Markdown: for all problems together, and for each.

    Args:
      problems: by name, the results of all methods, see `standing`.
      counted: the problems that count in the overall score and rank; all by default.
      title: the heading.
      baseline: label of plain backpropagation.

    Returns:
      the page, with a newline at its end.

    Raises:
      ValueError: there is no problem.
    """
    standings = {name: standing(results, baseline) for name, results in problems.items()}
    rows = overall(standings, counted)
    lines = [f"# {title}", "", NOTES, "", "## All problems", "", *_overall_lines(standings, rows)]
    if counted is not None and (besides := [name for name in standings if name not in counted]):
        lines += ["", f"Not counted in the overall score and rank: {', '.join(map(readable, besides))}."]
    if not any(each.scores is not None for each in standings.values()):
        lines += ["", f"There are no scores: {baseline}, plain backpropagation, is not in the table."]
    for name, results in problems.items():
        lines += [
            "",
            f"## {readable(name)}",
            "",
            *_problem_lines(results, standings[name], [row.method for row in rows]),
        ]
    return "\n".join(lines) + "\n"


def benchmark_rows(
    problems: Mapping[str, xr.Dataset],
    methods: Sequence[str],
    counted: Sequence[str] | None = None,
    *,
    baseline: str = BASELINE,
) -> str:
    """Return the rows of some methods in the table of all problems, with its header; see `benchmark_table`."""
    standings = {name: standing(results, baseline) for name, results in problems.items()}
    return "\n".join(_overall_lines(standings, [row for row in overall(standings, counted) if row.method in methods]))


def _overall_lines(standings: Mapping[str, Standing], rows: Sequence[Overall]) -> list[str]:
    head = ["method", "score", "mean rank", *map(readable, standings), "dead units", "effective rank", "cost"]
    lines = []
    for row in rows:
        marks = [standings[name].symptoms[standings[name].methods.index(row.method)] for name in row.problems]
        costs = [standings[name].costs[standings[name].methods.index(row.method)] for name in row.problems]
        scores = [each.scores_of(row.method) for each in standings.values()]
        missing = "" if row.complete else f" ({len(row.problems)} problem{'s' * (len(row.problems) != 1)})"
        lines.append(
            [
                f"`{row.method}`",
                _interval(row.score, 2) + missing,
                _interval(row.rank, 1),
                *("-" if of is None else f"{aggregates.interquartile_mean(of):.2f}" for of in scores),
                *(_number(value, 1) for value in _mean(np.reshape(marks, (-1, 2)))),
                _cost(float(np.exp(_mean(np.log(np.array(costs, np.float64)[:, None]))[0]))),
            ]
        )
    return _markdown(head, lines)


def _problem_lines(results: xr.Dataset, found: Standing, order: Sequence[str]) -> list[str]:
    scale, digits = (100, 2) if is_accuracy(found.measure) else (1, 4 if found.measure == "loss" else 0)
    unit = " (%)" if is_accuracy(found.measure) else ""
    head = [found.measure.replace("_", " ") + unit, "score", "rank", "dead units", "effective rank", "cost", "chosen"]
    chosen = chosen_settings(results)
    lines = []
    for method in sorted(
        found.methods, key=lambda method: (found.ranks[found.methods.index(method)], order.index(method))
    ):
        i, scores = found.methods.index(method), found.scores_of(method)
        mean = float(aggregates.interquartile_mean(found.values[i]))
        ends = (
            aggregates.stratified_bootstrap([found.values[i]])
            if np.isfinite(found.values[i]).all()
            else (math.nan,) * 2
        )
        sign = better(found.measure) * scale
        value = [sign * mean, *sorted(sign * end for end in ends)]
        lines.append(
            [
                f"`{method}`",
                _interval(value, digits) if math.isfinite(mean) else "diverged",
                "-" if scores is None else _interval(_score(scores), 2),
                f"{found.ranks[i]:g}",
                *(_number(value, 1) for value in found.symptoms[i]),
                _cost(found.costs[i]),
                chosen[method].text or "as given",
            ]
        )
    return _markdown(["method", *head], lines)


def _score(scores: np.ndarray) -> tuple[float, float, float]:
    return float(aggregates.interquartile_mean(scores)), *aggregates.stratified_bootstrap([scores])


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    line = lambda cells: f"| {' | '.join(cells)} |"
    return [line(head), line(["---", *["---:"] * (len(head) - 1)]), *map(line, rows)]


def _interval(value: Sequence[float], digits: int) -> str:
    mean, low, high = value
    ends = "" if math.isnan(low) else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return _number(mean, digits) + ends


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _cost(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}x"


def _mean(values: np.ndarray) -> np.ndarray:
    """Return means of finite values over rows [columns]; NaN if there are none."""
    there = np.isfinite(values)
    return np.where(there, values, 0).sum(0) / np.where(there.any(0), there.sum(0), np.nan)
