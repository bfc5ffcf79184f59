"""Elementwise operations, which combine units with other units, with parameters and with statistics."""

import dataclasses
from typing import Any

import numpy as np
from jax.extend import core

from cbp_jax.units import kernels, moments, rules
from cbp_jax.units.record import Claim, Record
from cbp_jax.units.values import (
    Derived,
    Joined,
    Labels,
    LeftOutKind,
    Reason,
    Vector,
    Weight,
    as_vector,
    paths_of,
    statistics_of,
)


def elementwise(record: Record, eqn: core.JaxprEqn, values: list[Any]) -> Any:
    """Merge units that are combined in one element. Parameters combined with units become their biases and scales."""
    name, found = eqn.primitive.name, rules.labeled(values)
    form = found[0].form if len(found) == 1 else moments.Form()
    values = [
        value
        if not isinstance(value, Vector)
        or value.statistic is None
        or moments.normalizes(eqn, position, value.statistic, form)
        else record.as_units(value)
        for position, value in enumerate(values)
    ]
    found = rules.labeled(values)
    ids = found[0].ids
    for other in found[1:]:
        if name in ("add", "add_any", "sub"):
            record.sums.append(record.meeting(ids, other.ids))
        ids = record.join(ids, other.ids)
    if name == "sub" and isinstance(values[0], Labels) and isinstance(values[1], Labels) and values[1].reduced:
        made = record.made_by.get(eqn.invars[0])
        if made is not None and not values[0].reduced:
            made.absorbed = True
    if name == "convert_element_type" and eqn.invars[0] in record.made_by:
        record.made_by[eqn.outvars[0]] = record.made_by[eqn.invars[0]]
    running = found[0].running if len(found) == sum(value is not None for value in values) == 1 else ""
    reduced = all(value.reduced for value in found)
    if not reduced:
        record.misused.update(value.running for value in found if value.running)
    for position, value in enumerate(values):
        if isinstance(value, Derived):
            text = f"its activations are combined with a value computed from {', '.join(sorted(value.paths))}"
            return record.not_followed(eqn, values, text)
        if isinstance(value, Joined):
            cuts = zip(value.parts, value.split(ids), strict=True)
            if not all([_meet(record, eqn, position, part, cut, moments.Form()) for part, cut in cuts]):
                return record.not_followed(eqn, values)
        if isinstance(value, Weight | Vector):
            form = found[0].form if len(found) == 1 else moments.Form()
            if not _meet(record, eqn, position, value, ids, form):
                return record.not_followed(
                    eqn,
                    values,
                    f"its activations are combined with the parameter {', '.join(paths_of([value]))} in `{name}`",
                )
            states = [part.path for part in as_vector(value, ids.ndim).parts if part.state]
            if states and reduced and name in ("add", "sub"):
                running = states[0]
            elif not _is_statistic(eqn, position, value):
                record.misused.update(states)
    joined = frozenset(
        axis
        for axis in frozenset().union(*(value.joined for value in found))
        if all(axis in value.joined or value.ids.shape[axis] == 1 for value in found)
    )
    forms = [value.form if isinstance(value, Labels) else None for value in values]
    numbers = [record.number(atom) for atom in eqn.invars]
    return Labels(ids, reduced, running, joined, moments.form_of(eqn, forms, statistics_of(values), numbers))


def combine(record: Record, eqn: core.JaxprEqn, values: list[Any]) -> Any:
    """Apply an elementwise function to parameters and statistics."""
    vectors = [None if value is None else as_vector(value, eqn.outvars[0].aval.ndim) for value in values]
    parts = [after(eqn, n, part) for n, vector in enumerate(vectors) if vector for part in vector.parts]
    numbers = [record.number(atom) for atom in eqn.invars]
    statistic = moments.combine(eqn, statistics_of(vectors), numbers)
    if statistic is not None and statistic.kind is moments.Kind.OTHER:  # it will not normalize
        values = [record.as_units(value) for value in values]
        if rules.labeled(values):
            return elementwise(record, eqn, values)
    return Vector(tuple(parts), statistic)


def _meet(
    record: Record, eqn: core.JaxprEqn, position: int, value: Weight | Vector, ids: np.ndarray, form: moments.Form
) -> bool:
    """Record what a parameter or a statistic does to units. Return False if that is not understood."""
    name, vector = eqn.primitive.name, as_vector(value, ids.ndim)
    divides = name == "div" and position == 1
    if vector.statistic is not None:
        if moments.normalizes(eqn, position, vector.statistic, form):
            record.normalized.append((vector.statistic, ids))
        else:
            text = f"the sum is combined with activations in `{name}`, which is not a normalization"
            record.lose(vector, Reason(LeftOutKind.MIXED, text))
    role = {"add": "bias", "sub": "bias", "mul": "scale"}.get(name, "scale" if divides else "")
    if name == "select_n" and position > 0:  # a token that replaces masked units
        role = "bias"
    # The axes along which units differ. An axis of length 1 may hold a unit of its own.
    varying = [axis for axis, size in enumerate(ids.shape) if size > 1] or list(range(ids.ndim))
    for part in vector.parts:
        lengths = [1 if axis is None else record.shapes[part.path][axis] for axis in part.axes]
        own = [n for n in varying if part.axes[n] is not None and (lengths[n] > 1 or ids.shape[n] == 1)]
        if not own:
            continue  # a parameter shared by all units
        if not role:
            return False
        leaf_axes = tuple(part.axes[axis] for axis in own)
        rows = ids.transpose(*own, *(axis for axis in range(ids.ndim) if axis not in own))
        rows = rows.reshape(*rows.shape[: len(own)], -1)
        rows = np.broadcast_to(rows, (*(record.shapes[part.path][axis] for axis in leaf_axes), rows.shape[-1]))
        rows, leaf_axes = record.among_stacked(part, leaf_axes, rows)
        if not part.state:
            record.uses.setdefault(part.path, set()).add((role, leaf_axes))
        record.claims.append(Claim(part.path, leaf_axes, role, rows, part))
        if role == "bias" and isinstance(value, Weight):
            kernels.note_bias(record, eqn, position, value)
    return True


def _is_statistic(eqn: core.JaxprEqn, position: int, value: Weight | Vector) -> bool:
    """Return whether an equation uses state the way a mean or a variance is used."""
    name = eqn.primitive.name
    if name == "sub":
        return position == 1 and isinstance(value, Weight) and value.plain and not value.steps
    states = [part for part in as_vector(value, 0).parts if part.state]
    rooted = {step.primitive.name for part in states for step, _ in part.steps} & {"rsqrt", "sqrt", "pow"}
    return bool(rooted) and (name == "mul" or (name == "div" and position == 1))


def after(eqn: core.JaxprEqn, position: int, weight: Weight) -> Weight:
    """Return a parameter after an elementwise equation."""
    if eqn.primitive.name in ("convert_element_type", "copy", "copy_p") or not rules.is_scalar_step(eqn, position):
        return weight
    return dataclasses.replace(weight, steps=(*weight.steps, (eqn, position)))
