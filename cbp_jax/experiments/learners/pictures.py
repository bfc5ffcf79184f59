"""Looks of methods in pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cbp_jax.experiments.learners.method import Method
from cbp_jax.experiments.learners.registry import LEARNERS
from cbp_jax.report import looks
from cbp_jax.report.looks import Look

if TYPE_CHECKING:
    import xarray as xr


def looks_by_learner(methods: Sequence[Method | str], known: Mapping[str, Any] = LEARNERS) -> dict[str, Look]:
    """Return the looks of methods' learners, or of learners by name, for `report.new_results`.

    Learners by name are those of `known`, whose values have a `look`.

    >>> looks_by_learner(["bp"])["bp"].title
    'Backprop'
    """
    found = {}
    for method in methods:
        if isinstance(method, Method):
            found[method.learner] = method.look
        elif method in known:
            found[method] = known[method].look
    return found


def with_looks(results: xr.Dataset, known: Mapping[str, Any] = LEARNERS) -> xr.Dataset:
    """Return the results with today's looks of the learners in `known`; others keep those that the results contain."""
    if "learner" not in results.coords:
        return results
    found = looks.looks_of(results) | looks_by_learner(results.learner.values.tolist(), known)
    return results.assign_attrs({looks.ATTRIBUTE: looks.to_json(found)})
