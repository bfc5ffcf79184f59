"""Arrays that are concatenated, stacked, split or scattered."""

import dataclasses
from typing import Any

import numpy as np
from jax.extend import core

from cbp_jax.units import elementwise, moments, rules
from cbp_jax.units.record import Claim, Record
from cbp_jax.units.values import Joined, Labels, Vector, Weight


def concatenate(record: Record, eqn: core.JaxprEqn, values: list[Any], axis: int, shapes: list[tuple[int, ...]]) -> Any:
    """Concatenate labels. A parameter next to units, such as a class token next to patches, is a separate bias."""
    parts, single = [], []
    for shape, value in zip(shapes, values, strict=True):
        if shape[axis] == 0:
            continue
        ids = np.full((1,) * len(shape), -1)
        if isinstance(value, Weight):
            own = [(leaf, place) for place, leaf in enumerate(value.axes) if leaf is not None and place != axis]
            leaf_axes = tuple(leaf for leaf, place in own if shape[place] > 1)
            places = tuple(place for _, place in own if shape[place] > 1)
            if not places or value.fixed:
                return record.not_followed(eqn, values)
            new = record.labels.new([record.shapes[value.path][leaf] for leaf in leaf_axes])
            along = [shape[place] if place in places else 1 for place in range(len(shape))]
            ids = new.transpose(np.argsort(places)).reshape(along)
            record.uses.setdefault(value.path, set()).add(("bias", leaf_axes))
            record.claims.append(Claim(value.path, leaf_axes, "bias", new[..., None], value))
        elif isinstance(value, Labels):
            ids = value.ids
        elif value is not None:
            return record.not_followed(eqn, values)
        single.append(ids.shape[axis] == 1 or (isinstance(value, Labels) and axis in value.joined))
        parts.append(np.broadcast_to(ids, (*ids.shape[:axis], shape[axis], *ids.shape[axis + 1 :])))
    if not parts:  # an empty array
        return None
    several = any(size > 1 for part in parts for place, size in enumerate(part.shape) if place != axis)
    joined = {axis} if several and all(single) else set()
    shape = np.broadcast_shapes(*(np.take(part, [0], axis).shape for part in parts))
    whole = [np.broadcast_to(p, (*shape[:axis], p.shape[axis], *shape[axis + 1 :])) for p in parts]
    if _alike(whole, axis):
        return Labels(np.take(whole[0], [0], axis))
    return Labels(np.concatenate(whole, axis), joined=frozenset(joined))


def stack(record: Record, eqn: core.JaxprEqn, values: list[Any]) -> Any:
    """Label arrays that are stacked along a new axis: each is expanded, then they are concatenated."""
    axis, grown, shapes = eqn.params["axis"], [], []
    for atom, value in zip(eqn.invars, values, strict=True):
        shapes.append((*atom.aval.shape[:axis], 1, *atom.aval.shape[axis:]))
        if isinstance(value, Labels):
            joined = frozenset(place + (place >= axis) for place in value.joined)
            value = dataclasses.replace(value, ids=np.expand_dims(value.ids, axis), joined=joined)
        elif isinstance(value, Weight):
            value = dataclasses.replace(value, axes=(*value.axes[:axis], None, *value.axes[axis:]))
        grown.append(value)
    return concatenate(record, eqn, grown, axis, shapes)


def split(record: Record, eqn: core.JaxprEqn, values: list[Any]) -> list[Any]:
    """Label the parts of an array that is split, or unstacked, along one axis."""
    (value,) = values
    axis, count, cut = eqn.params["axis"], len(eqn.outvars), eqn.primitive.name == "split"
    if isinstance(value, Labels):
        parts = rules.split_labels(eqn, value.ids) if cut else rules.unstack_labels(eqn, value.ids)
        joined = value.joined if cut else frozenset(a - (a > axis) for a in value.joined if a != axis)
        return [Labels(ids, value.reduced, value.running, joined) for ids in parts]
    if isinstance(value, Weight):
        here = (None,) if cut else ()
        return [dataclasses.replace(value, axes=(*value.axes[:axis], *here, *value.axes[axis + 1 :]))] * count
    if isinstance(value, Joined) and cut and (axis, tuple(eqn.params["sizes"])) == (value.axis, value.sizes):
        return list(value.parts)
    if isinstance(value, Vector) and not value.parts and value.statistic is not None:
        sets = value.statistic.sets
        parts = rules.split_labels(eqn, sets) if cut else rules.unstack_labels(eqn, sets)
        return [Vector(statistic=dataclasses.replace(value.statistic, sets=sets)) for sets in parts]
    return [record.not_followed(eqn, values)] * count


def scatter(record: Record, eqn: core.JaxprEqn, values: list[Any]) -> Any:
    """Label the output of a scatter. Units that are summed by segment, or written over the batch, stay the same."""
    operand, indices, updates = values
    ids = rules.scatter_labels(eqn, updates.ids) if isinstance(updates, Labels) else None
    if ids is None or indices is not None or not (operand is None or isinstance(operand, Labels)):
        return record.not_followed(eqn, values)
    return Labels(ids if operand is None else record.join(ids, operand.ids))


def sum_joined(record: Record, eqn: core.JaxprEqn, value: Labels) -> Labels:
    """Merge units that a reduction combines from concatenated arrays."""
    axes = [axis for axis in eqn.params["axes"] if axis in value.joined]
    return dataclasses.replace(value, ids=record.merge(value.ids, tuple(axes), keep=True))


def joined_parameters(record: Record, eqn: core.JaxprEqn, values: list[Any]) -> Any:
    """Return the output of an equation on concatenated parameters and data: a view of them, a multiple, or a sum."""
    known = [(position, value) for position, value in enumerate(values) if value is not None]
    (position, value), *others = known
    if others or not isinstance(value, Joined):
        return record.not_followed(eqn, values)
    if eqn.primitive.name in ("add", "sub", "mul", "div") or rules.is_scaling(eqn, position):
        plain = eqn.primitive.name in moments.UNCHANGED
        parts = (dataclasses.replace(elementwise.after(eqn, position, p), plain=p.plain and plain) for p in value.parts)
        return dataclasses.replace(value, parts=tuple(parts))
    places = rules.view_axes(eqn, range(eqn.invars[0].aval.ndim))
    views = [rules.view_axes(eqn, part.axes) for part in value.parts]
    if places is None or value.axis not in places or None in views:
        return record.not_followed(eqn, values)
    parts = (dataclasses.replace(part, axes=axes) for part, axes in zip(value.parts, views, strict=True))
    return Joined(tuple(parts), value.sizes, places.index(value.axis))


def _alike(parts: list[np.ndarray], axis: int) -> bool:
    """Return whether all parts hold the same labels all along an axis."""
    first = np.take(parts[0], [0], axis)
    return all(np.array_equal(part, np.broadcast_to(first, part.shape)) for part in parts)
