"""Kernels that are applied to arrays, tables that are looked up, and products of activations."""

import math
from typing import Any

import numpy as np
from jax.extend import core

from cbp_jax.units import rules
from cbp_jax.units.record import SHARED, Record
from cbp_jax.units.values import Contraction, Joined, Labels, LeftOutKind, Reason, Weight


def contract(record: Record, eqn: core.JaxprEqn, values: list[Any]) -> Any:
    """Apply a kernel: it reads labeled units, if its operand has them, and writes new ones."""
    if 0.0 in map(record.number, eqn.invars):
        return record.nothing(eqn)
    if rules.labeled(values) and all(value is None or isinstance(value, Labels) for value in values):
        return _product(record, eqn, values)
    for position, value in enumerate(values):
        if isinstance(value, Joined) and not isinstance(values[1 - position], Joined | Weight):
            return _gates(record, eqn, values, position, value)
    values = _sources(record, eqn, values)
    use = rules.KernelUse(eqn, values)
    if use.reason:
        return record.not_followed(eqn, values, use.reason)
    weight, value, operand = values[use.kernel], values[use.operand], eqn.invars[use.operand]
    path, shape = weight.path, record.shapes[weight.path]
    in_axes = tuple(weight.axes[axis] for axis in use.kernel_axes)
    out_axes = tuple(weight.axes[axis] for axis in use.places)
    if any(axis is None for axis in (*in_axes, *out_axes)):
        return record.not_followed(eqn, values, f"the kernel {path} is cut or broadcast before it is used")
    if isinstance(value, Weight):
        return record.not_followed(eqn, values, f"the kernel {path} is applied to other parameters")
    value = record.as_units(value)
    if not isinstance(value, Labels):
        record.not_followed(eqn, [value], "a kernel reads the sum")
    labels = rows = coupled = None
    if isinstance(value, Labels):
        record.misused.update({value.running} - {""})
        order = (*use.operand_axes, *(a for a in range(value.ids.ndim) if a not in use.operand_axes))
        ids = value.ids.transpose(order)
        ids = record.merge(ids, tuple(range(len(use.operand_axes), ids.ndim)))
        labels = np.broadcast_to(ids, [operand.aval.shape[axis] for axis in use.operand_axes])
    if use.groups > 1:
        inside, outside = shape[in_axes[0]], shape[out_axes[0]]
        group = np.arange(outside) // (outside // use.groups)
        rows = group * inside + np.arange(inside)[:, None]  # the channel that each [in, out] reads
        if labels is not None and inside == 1:  # depthwise: a channel stays the same unit
            coupled, labels = labels[rows[0]], None
        elif labels is not None:
            labels, in_axes = labels[rows], (*in_axes, *out_axes)
    places = tuple(use.places.values())
    if weight.fixed:
        sizes = [shape[axis] for axis in in_axes]
        rows = np.arange(math.prod(sizes)) if rows is None else rows
        rows, all_axes = record.among_stacked(weight, in_axes, rows.reshape(sizes))
    else:
        all_axes = in_axes
    rows = None if rows is None else rows.ravel()
    out_all = (*(index.axis for index in weight.fixed), *out_axes)
    passes: list[int | None] = [None] * len(record.passes)
    for index in weight.fixed:
        passes[index.depth] = index.number
    made = Contraction(
        path, all_axes, out_axes, operand, use.operand_axes, rows, labels, places, weight.plain, weight.fixed,
        tuple(passes),
    )  # fmt: skip
    record.note_contraction(eqn.outvars[0], made)
    record.uses.setdefault(path, set()).add(("kernel", all_axes, out_all, use.groups))
    record.kinds.setdefault(path, "dense" if eqn.primitive.name == "dot_general" else "conv")
    if labels is not None:
        known = record.block(record.readers, weight, in_axes)
        if (path, in_axes, weight.fixed) not in record.read:
            record.read.add((path, in_axes, weight.fixed))
            known[...] = labels
        record.labels.union(known, labels)  # units that are read by the same weights are one
        mixed = (known < 0) != (labels < 0)
        if mixed.any():
            record.lose_units(np.concatenate([known[mixed], labels[mixed]]), SHARED)
    return Labels(record.produce(weight, out_axes, places, eqn.outvars[0].aval.ndim, coupled))


def _sources(record: Record, eqn: core.JaxprEqn, values: list[Any]) -> list[Any]:
    """Treat entries of a parameter that is repeated over the batch, such as learned queries, as units if a kernel reads
    them."""
    if not all(isinstance(value, Weight) for value in values):
        return values
    batched = [None in value.axes and not value.fixed for value in values]
    if sum(batched) != 1:
        return values
    position = batched.index(True)
    weight, contracted = values[position], eqn.params["dimension_numbers"][0][position]
    own = [(axis, place) for place, axis in enumerate(weight.axes) if axis is not None and place in contracted]
    if eqn.primitive.name != "dot_general" or not own:
        return values
    axes, places = tuple(axis for axis, _ in own), tuple(place for _, place in own)
    record.uses.setdefault(weight.path, set()).add(("lookup", axes))
    record.kinds.setdefault(weight.path, "embedding")
    return [
        Labels(record.produce(weight, axes, places, len(weight.axes))) if n == position else value
        for n, value in enumerate(values)
    ]


def _gates(record: Record, eqn: core.JaxprEqn, values: list[Any], position: int, kernels: Joined) -> Any:
    """Apply concatenated kernels one by one, if their outputs are concatenated."""
    made = []
    for part in kernels.parts:
        replaced = [part if n == position else value for n, value in enumerate(values)]
        use = rules.KernelUse(eqn, replaced)
        if use.reason or kernels.axis not in use.places:
            return record.not_followed(eqn, values, use.reason)
        made.append(contract(record, eqn, replaced))
    record.made_by.pop(eqn.outvars[0], None)  # its bias does not belong to one kernel
    if not all(isinstance(labels, Labels) for labels in made):
        return None
    return Labels(np.concatenate([labels.ids for labels in made], use.places[kernels.axis]))


def _product(record: Record, eqn: core.JaxprEqn, values: list[Any]) -> Any:
    """Multiply activations with activations. Units that are summed over, or combined, become one unit."""
    if eqn.primitive.name != "dot_general":
        return record.not_followed(eqn, values, "it is convolved with something that is not a parameter")
    contracted, batch = eqn.params["dimension_numbers"]
    sides = []
    rest = [atom.aval.ndim - len(c) - len(b) for atom, c, b in zip(eqn.invars, contracted, batch, strict=True)]
    for side, (value, summed, shared) in enumerate(zip(values, contracted, batch, strict=True)):
        if value is None:
            continue
        if values[1 - side] is None and any(value.ids.shape[axis] > 1 for axis in summed):
            return record.not_followed(eqn, values, "its activations are multiplied with values that are not a kernel")
        ids = record.merge(value.ids, tuple(summed), keep=True)
        others = [axis for axis in range(ids.ndim) if axis not in shared and axis not in summed]
        ids = ids.transpose(*shared, *others, *summed)
        sizes = ids.shape[: len(shared)], ids.shape[len(shared) : len(shared) + len(others)]
        after = (1,) * rest[1] if side == 0 else ()
        before = (1,) * rest[0] if side == 1 else ()
        sides.append(ids.reshape(*sizes[0], *before, *sizes[1], *after))
    ids = sides[0]
    if len(sides) == 2:
        counts = [np.unique(record.labels.roots(side[side >= 0])).size for side in sides]
        crossed = not any(m > 1 and n > 1 for m, n in zip(sides[0].shape, sides[1].shape, strict=True))
        if crossed and counts[0] != counts[1]:  # all would become one unit, as with a single head of keys or values
            text = "it weighs other activations, as queries and keys of a single head do, and no kernel reads it"
            record.lose_units(sides[counts.index(min(counts))], Reason(LeftOutKind.NOT_READ, text))
            return Labels(sides[counts.index(max(counts))])
    for other in sides[1:]:
        record.products.append(np.unique(np.concatenate([ids[ids >= 0], other[other >= 0]])))
        ids = record.join(ids, other)
    return Labels(ids)


def lookup(record: Record, eqn: core.JaxprEqn, table: Weight) -> Any:
    """Return rows of a table that are looked up by index: its other axes enumerate units."""
    axes = rules.lookup_axes(eqn, table.axes)
    found = () if axes is None else tuple((axis, place) for place, axis in enumerate(axes) if axis is not None)
    if not found or len(found) == len(record.shapes[table.path]):
        return record.not_followed(eqn, [table])
    own = tuple(axis for axis, _ in found)
    record.uses.setdefault(table.path, set()).add(("lookup", (*(index.axis for index in table.fixed), *own)))
    record.kinds.setdefault(table.path, "embedding")
    places = tuple(place for _, place in found)
    return Labels(record.produce(table, own, places, eqn.outvars[0].aval.ndim))


def note_bias(record: Record, eqn: core.JaxprEqn, position: int, weight: Weight) -> None:
    """Record that `weight` is the bias of the kernel whose output it is added to, if it is."""
    source = eqn.invars[1 - position]
    made = record.made_by.get(source) if isinstance(source, core.Var) else None
    if made is None or made.bias is not None or not (made.plain and weight.plain) or eqn.primitive.name != "add":
        return
    # Its axes are those of the kernel's outputs, in the kernel's order.
    kernel_axis = dict(zip(made.out_places, made.out_axes, strict=True))
    leaf_axis = {axis: kernel_axis.get(place) for place, axis in enumerate(weight.axes) if axis is not None}
    if len(made.fixed) == len(weight.fixed):
        pairs = zip(weight.fixed, made.fixed, strict=True)
        leaf_axis |= {mine.axis: other.axis for mine, other in pairs if mine[1:] == other[1:]}
    axes = [leaf_axis.get(axis) for axis in range(len(record.shapes[weight.path]))]
    if None not in axes and len(axes) == len(kernel_axis) + len(made.fixed) and axes == sorted(axes):
        made.bias = (weight.path, tuple(axes))
        record.made_by[eqn.outvars[0]] = made
