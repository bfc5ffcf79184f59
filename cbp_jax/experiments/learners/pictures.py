"""Looks of methods in pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cbp_jax.experiments.learners.method import Method
from cbp_jax.experiments.learners.registry import LEARNERS
from cbp_jax.report import looks
from cbp_jax.report.looks import Look

if TYPE_CHECKING:
    import xarray as xr


def looks_by_learner(methods: Sequence[Method | str]) -> dict[str, Look]:
    """Return the looks of methods' learners, or of learners by name, for `report.new_results`.

    >>> looks_by_learner(["bp"])["bp"].title
    'Backprop'
    """
    found = {}
    for method in methods:
        if isinstance(method, Method):
            found[method.learner] = method.look
        elif method in LEARNERS:
            found[method] = LEARNERS[method].look
    return found


def with_looks(results: xr.Dataset) -> xr.Dataset:
    """Return the results with looks of their learners by name; other learners keep those that the results contain."""
    if "learner" not in results.coords:
        return results
    found = looks.looks_of(results) | looks_by_learner(results.learner.values.tolist())
    return results.assign_attrs({looks.ATTRIBUTE: looks.to_json(found)})
