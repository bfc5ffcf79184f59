"""Runs a benchmark: tunes and evaluates methods on the problems of a suite, each pair in its own folder."""

import dataclasses
import inspect
import re
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cbp_jax import by_path, report
from cbp_jax.bench.suites import Problem, Suite
from cbp_jax.experiments import agents, folder
from cbp_jax.experiments.learners import LEARNERS, LogUniform, Method, custom, parse_method, read_methods
from cbp_jax.experiments.learners.search import check_space
from cbp_jax.experiments.progress import Progress
from cbp_jax.report.benchmarks import BASELINE, COST


class Entry(NamedTuple):
    """A method on a problem, and the folder of its results."""

    problem: Problem
    method: Method
    out: Path


def read_method(text: str) -> Method:
    """Parse a method, like `learners.parse_method`.

    A function's settings without a default may be omitted if its `space` has them.

    Raises:
      ValueError: the learner or setting is unknown, or a value does not fit.
    """
    found = None if text.partition(":")[0] in LEARNERS else by_path.read(text, "learner")
    space = getattr(found.value, "space", None) if found is not None else None
    if space is None or not callable(found.value) or isinstance(found.value, type):
        return parse_method(text)
    try:
        check_space(space, found.path)
        of_space = {name: values for name, values in space.items() if name in _without_default(found.value)}
        start = {name: values.low if isinstance(values, LogUniform) else values[0] for name, values in of_space.items()}
        method = custom(found.value, {**start, **found.settings}, path=found.path)
        return dataclasses.replace(method, given=tuple(found.settings))
    except (IndexError, TypeError, ValueError) as error:
        raise ValueError(f"method {text!r}: {error}") from error


def entries(
    suite: Suite, methods: Sequence[Method], out: Path, problems: Sequence[str] | None = None
) -> tuple[list[Entry], list[str]]:
    """Return the pairs of problem and method to run, and what is left out.

    Args:
      suite: the problems.
      methods: what runs on them.
      out: folder of the benchmark; the results of a pair are in `<out>/<problem>/<method>`.
      problems: names of the problems; all of the suite by default.

    Returns:
      the pairs, problem by problem; and a line for each problem whose package is missing, and for each method that a
      problem does not support.

    Raises:
      ValueError: there is no such problem, no problem supports a method, or a folder holds another run.
    """
    chosen = suite.problems if problems is None else tuple(suite.problem(name) for name in problems)
    read_methods(methods)
    found, left_out, refused = [], [], dict.fromkeys((method.label for method in methods), "")
    for problem in chosen:
        if not problem.available:
            left_out.append(f"{problem.name} is left out: it needs {problem.needs}")
            continue
        for method in methods:
            entry = Entry(problem, method, out / problem.name / folder_name(method))
            try:
                suite.plan(problem, method).check()
            except ValueError as error:
                refused[method.label] = str(error)
                left_out.append(f"{problem.name} is left out for {method.label}: {error}")
                continue
            folder.check(entry.out, name_of(suite, problem), suite.kept(problem, method))
            found.append(entry)
    for method in methods:
        if method.label not in {entry.method.label for entry in found}:
            raise ValueError(refused[method.label] or "; ".join(left_out))
    return found, left_out


def run(suite: Suite, pairs: Iterable[Entry], progress: Progress | None = None) -> list[str]:
    """Run all pairs that are not finished. Interrupted runs resume, with the same results.

    Args:
      suite: the problems.
      pairs: of `entries`.
      progress: as in `Experiment.run`. It counts the approximate milliseconds that plain backpropagation would take.

    Returns:
      a line for each method whose network or optimizer could not be created for a problem.
    """
    left_out = []
    for entry in pairs:
        try:
            _run(suite, entry, progress)
        except _Refused as error:
            left_out.append(f"{entry.problem.name} is left out for {entry.method.label}: {error}")
    return left_out


def total(suite: Suite, pairs: Iterable[Entry]) -> int:
    """Return the total that `run` counts to: the cost of everything unfinished."""
    return sum(
        suite.plan(problem, method).total() * _weight(problem) for problem, method, out in pairs if not finished(out)
    )


class _Refused(ValueError):
    """Raised if a problem does not support a method."""


def _run(suite: Suite, entry: Entry, progress: Progress | None) -> None:
    problem, method, out = entry
    plan, name = suite.plan(problem, method), name_of(suite, problem)

    def told(methods: str, lanes: int, measures: dict[str, float]) -> None:
        if progress is not None:
            progress(f"{problem.name}, {method.label}", lanes * _weight(problem), measures)

    if not finished(out):
        try:
            job = plan.prepare(name, suite.kept(problem, method))
        except ValueError as error:
            raise _Refused(str(error)) from error
        job(out, told)
    results = report.load_results(out)
    if COST not in results.coords:
        chosen = {each.text: each for each in plan.tried()[method.label]}[results.chosen.item()]
        cost = relative_cost(problem, chosen, suite.timed_tasks)
        report.save_results(results.assign_coords({COST: ("method", [cost])}), out)


def relative_cost(problem: Problem, method: Method, tasks: int) -> float:
    """Return the time of a method's task relative to plain backpropagation, for one lane on one device.

    Both are measured one after the other. Each time is that of the fastest task, without the first, which compiles.

    Args:
      problem: whose tasks are timed.
      method: what runs.
      tasks: how many, at least 2.
    """
    if method.learner == BASELINE and set(method.given) <= {"step_size"}:
        return 1.0
    return _seconds(problem, method, tasks) / _seconds(problem, parse_method(BASELINE), tasks)


def _seconds(problem: Problem, method: Method, tasks: int) -> float:
    is_agent = isinstance(problem.settings, agents.Settings)
    size = {"steps": tasks * problem.settings.interval} if is_agent else {"tasks": tasks}
    settings = problem.changed(methods=(method,), seeds=1, measured_examples=1, **size)
    times: list[float] = []
    with tempfile.TemporaryDirectory() as out:
        problem.experiment.prepare(settings)(Path(out), lambda *_: times.append(time.perf_counter()))
    return float(np.diff(times).min())


def finished(out: Path) -> bool:
    """Return whether the results in a folder are complete."""
    try:
        results = report.load_results(out)
    except FileNotFoundError:
        return False
    return is_complete(results)


def is_complete(results: Any) -> bool:
    """Return whether the search has ended and every reported task has run."""
    return bool(np.isfinite(results.replaced_units).all()) and all(results.chosen.values.tolist())


def folder_name(method: Method) -> str:
    """Return the name of a method's folder.

    Example:
      >>> folder_name(parse_method("cbp:utility=weight"))
      'cbp_utility_weight'
    """
    return re.sub(r"[^\w.+-]+", "_", method.label).strip("_")


def name_of(suite: Suite, problem: Problem) -> str:
    """Return the name of a problem in results."""
    return f"{suite.name}/{problem.name}"


def _without_default(function: Any) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {each.name for each in parameters if each.default is each.empty}


def _weight(problem: Problem) -> int:
    """Return the milliseconds of a task of plain backpropagation."""
    return max(1, round(1000 * problem.cost))
