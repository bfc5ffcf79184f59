"""The results of methods before their first task."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cbp_jax.experiments import learners
from cbp_jax.experiments.checks import seeds_of


class Curve(NamedTuple):
    """A measure of a task at several points.

    Attributes:
      meaning: meaning of a value.
      dim: name of the points, a dimension of results.
      points: their coordinates.
    """

    meaning: str
    dim: str
    points: Sequence[float]


def empty_results(
    experiment: str,
    settings: Any,
    methods: Sequence[learners.Method],
    tasks: int,
    measures: Mapping[str, str],
) -> Any:
    """Return the results of methods before their first task; see `report.new_results`."""
    from cbp_jax import report

    taken = {"method", "learner", "seed", "task", *measures}
    numbers = [_numbers(method, taken) for method in methods]
    taken = taken.union(*numbers)  # what is a text for one function may be a number for another
    return report.new_results(
        [method.label for method in methods],
        [method.learner for method in methods],
        numbers,
        seeds=seeds_of(settings),
        tasks=tasks,
        settings=dataclasses.replace(settings, methods=learners.texts_of(settings.methods, methods)),
        experiment=experiment,
        measures=measures,
        looks=learners.looks_by_learner(methods),
        texts=[{name: text for name, text in method.texts.items() if name not in taken} for method in methods],
    )


def with_curves(results: Any, curves: Mapping[str, Curve]) -> Any:
    """Add empty results for measures of each task at several points, [method, seed, task, points]."""
    for name, curve in curves.items():
        dims = ("method", "seed", "task", curve.dim)
        blank = np.full((*(results.sizes[dim] for dim in dims[:3]), len(curve.points)), np.nan, np.float32)
        results = results.assign({name: (dims, blank, {"long_name": curve.meaning})})
        results = results.assign_coords({curve.dim: list(curve.points)})
    return results


def _numbers(method: learners.Method, taken: set[str]) -> dict[str, float]:
    """Return a method's numbers, except those whose names are taken in results, such as `seed` of a user's function."""
    return {
        name: float(value)
        for name, value in {**method.hyperparameters, **method.options}.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in taken
    }
