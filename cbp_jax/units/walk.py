"""Walks through a traced network and labels every element of every array with its unit.

The labels of an array are integers of a shape that broadcasts to the array's, so that reshapes, transposes,
concatenations and sums of arrays are the same operations on their labels. A kernel that is contracted makes new labels
along its free axes and, if it contracts labeled values, reads them. Labels that reach an operation that the walk does
not understand are left out, with the reason.
"""

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend import core

from cbp_jax import jaxprs
from cbp_jax.units import groups, moments, rules, tracing
from cbp_jax.units.values import (
    Contraction,
    Derived,
    Index,
    Joined,
    Labels,
    LeftOutKind,
    Reason,
    UnionFind,
    Vector,
    Weight,
)

_SHARED = Reason(LeftOutKind.SHARED, "it shares weights with values that are not units")
# Labels of a recurrent network converge after a few passes.
_PASSES = 64
# Constant folding, for numbers such as the count by which a sum is divided.
_ARITHMETIC: dict[str, Callable[..., float]] = {
    **dict.fromkeys(moments.UNCHANGED | {"broadcast_in_dim", "reshape", "squeeze"}, float),
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": lambda a, b: a / b if b else math.nan,
    "max": max,
    "min": min,
    "neg": operator.neg,
    "sqrt": lambda a: math.sqrt(a) if a >= 0 else math.nan,
}


@dataclasses.dataclass
class Claim:
    """A parameter that is added to units or multiplied with them.

    Attributes:
      path, axes: the leaf and its axes that enumerate rows.
      role: "bias" or "scale".
      ids: the units of each row, [axes..., uses].
      weight: the parameter as it was used.
    """

    path: str
    axes: tuple[int, ...]
    role: str
    ids: np.ndarray
    weight: Weight


def walk(trace: tracing.Trace) -> "Walk":
    """Walks through a network. State that is not used like running statistics is treated as data."""
    while data := (found := Walk(trace)).data():
        trace = trace.with_data(data)
    return found


class Walk:
    """One pass over a traced network."""

    def __init__(self, trace: tracing.Trace):
        self._contractions: dict[Any, Contraction] = {}
        self.passes: list[int] = []  # of the enclosing scans
        self.labels = UnionFind()
        # Kernel and axes -> labels; -1 for slices of a stacked kernel that were not applied yet.
        self.producers: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}  # free axes
        self.readers: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}  # axes of rows
        self.read: set[Any] = set()  # entries of `readers` that were applied
        self.claims: list[Claim] = []
        self.uses: dict[str, set[Any]] = {}  # the ways in which a parameter is used
        self.kinds: dict[str, str] = {}  # "dense", "conv" or "embedding", by kernel
        self.made_by: dict[core.Var, Contraction] = {}  # outputs of contractions, for their biases
        self.lost: list[tuple[np.ndarray, Reason]] = []  # labels that are left out, and why
        self.normalized: list[
            tuple[moments.Statistic, np.ndarray]
        ] = []  # statistics, and the labels of what they normalize
        self.sums: list[np.ndarray] = []  # units that were added to others
        self.products: list[np.ndarray] = []  # units whose activations are contracted with each other
        self.used_otherwise: dict[str, str] = {}  # parameters used in ways not followed
        self.misused: set[str] = set()  # state that is not used like a statistic
        self.numbers: dict[core.Var, float] = {}  # arrays whose entries are all one number
        self.trace, jaxpr = trace, trace.jaxpr.jaxpr
        self.paths = trace.param_paths
        self.shapes = {path: var.aval.shape for var, path in trace.param_paths.items()}
        self.states = {trace.param_paths[var] for var in trace.states}
        inputs = [
            Weight(self.paths[var], tuple(range(var.aval.ndim)), state=var in trace.states)
            if var in self.paths
            else None
            for var in jaxpr.invars
        ]
        self.checked: list[bool] = []  # for each output, whether it is anything but new running statistics
        outputs = self.run(trace.jaxpr, inputs, nested=False)
        for (key_path, _), value in zip(jax.tree_util.tree_leaves_with_path(trace.out_tree), outputs, strict=True):
            # New running statistics have the same name among the outputs as the old ones among the inputs.
            if isinstance(value, Labels) and value.running and value.reduced:
                name = f"/{groups.join_path(key_path)}"
                if any(name.endswith(f"/{groups.statistics_name(path)}") for path in self.states):
                    self.checked.append(False)
                    continue
            self.checked.append(True)
            self.lose(value, Reason(LeftOutKind.OUTPUT, "it is part of the network's output"))

    @property
    def contractions(self) -> list[Contraction]:
        """All contractions, in forward order. If all passes of a scan do the same, the last pass represents all."""
        return list(self._contractions.values())

    def data(self) -> set[str]:
        """Inputs provisionally treated as state that turn out to be data.

        A statistic is a number for each unit, which is only used to normalize and only updated from a sum over the
        batch. Arrays under "batch_stats" are assumed to be statistics.
        """
        inputs = {path for path in self.states if not path.startswith(f"{groups.STATISTICS}/")}
        found = inputs & (self.uses.keys() | self.used_otherwise.keys() | self.misused)
        for claim in self.claims:
            other = [size for axis, size in enumerate(self.shapes[claim.path]) if axis not in claim.axes]
            if claim.path in inputs and max(other, default=1) > 1:
                found.add(claim.path)
        return found

    def run(self, closed: core.ClosedJaxpr, inputs: list[Any], nested: bool) -> list[Any]:
        """Labels the outputs of a jaxpr whose inputs are labeled."""
        env: dict[core.Var, Any] = dict(zip(closed.jaxpr.invars, inputs, strict=True))
        for var, value in zip(closed.jaxpr.constvars, closed.consts, strict=True):
            self.note_number(var, value)

        def read(atom):
            return None if isinstance(atom, core.Literal) else env.get(atom)

        for eqn in jaxprs.live_equations(closed.jaxpr):
            values = [read(atom) for atom in eqn.invars]
            body = jaxprs.call_body(eqn)
            for var in eqn.outvars:  # of a body that was walked before, possibly with other operands
                self.note_number(var, None)
            if all(value is None for value in values):
                numbers, made = [self.number(atom) for atom in eqn.invars], _ARITHMETIC.get(eqn.primitive.name)
                if made is not None and None not in numbers:
                    self.note_number(eqn.outvars[0], made(*numbers))
                continue
            if eqn.primitive.name == "scan":
                results = self.scan(eqn, values, nested)
            elif body is not None:
                for var, atom in zip(body.jaxpr.invars, eqn.invars, strict=True):
                    self.note_number(var, self.number(atom))
                results = self.run(body, values, nested or not jaxprs.is_remat(eqn))
            elif nested and eqn.primitive.name in jaxprs.CONTRACTIONS:
                results = [self.not_followed(eqn, values)] * len(eqn.outvars)
            else:
                results = self.step(eqn, values)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in closed.jaxpr.outvars]

    def scan(self, eqn: core.JaxprEqn, values: list[Any], nested: bool) -> list[Any]:
        """Walks through a loop, pass by pass, until nothing new is found.

        Scanned arrays are sliced: each pass has its own slice of a stacked kernel.
        """
        scan, length = jaxprs.scan_of(eqn, values), eqn.params["length"]
        for var, atom in zip(scan.body.jaxpr.invars, eqn.invars, strict=True):
            self.note_number(var, self.number(atom))
        stacked = any(isinstance(x, Weight) and x.axes[0] is not None for x in scan.xs)
        varying = stacked or any(isinstance(x, Labels) and x.ids.shape[0] > 1 for x in scan.xs)
        if any(isinstance(x, Vector | Derived | Joined) for x in scan.xs) or (not stacked and length == 0):
            return [self.not_followed(eqn, values)] * len(eqn.outvars)
        carry, made, claims, uses = scan.carry, [], self.claims, self.uses
        for number in range(length)[:: -1 if eqn.params["reverse"] else 1]:
            changes = self.labels.changes
            if not stacked:  # the last pass represents all; the first may begin with values that are not units
                self.claims, self.uses = list(claims), {path: set(used) for path, used in uses.items()}
            self.passes.append(number)
            results = self.run(scan.body, [*scan.consts, *carry, *(self.cut(x, number) for x in scan.xs)], nested)
            self.passes.pop()
            before, carry = carry, results[: len(carry)]
            for var in scan.body.jaxpr.invars[len(scan.consts) :]:
                self.note_number(var, None)
            made.append(results[len(carry) :])
            if not varying and changes == self.labels.changes and all(map(self.alike, before, carry)):
                break
            if len(made) >= _PASSES and not varying:
                return [self.not_followed(eqn, values)] * len(eqn.outvars)
        made += [made[-1]] * (length - len(made))
        if eqn.params["reverse"]:
            made.reverse()
        return [*carry, *(self.stacked(list(ys)) for ys in zip(*made, strict=True))]

    def cut(self, value: Any, number: int) -> Any:
        """The slice of a scanned value that one pass gets."""
        if isinstance(value, Labels):
            joined = frozenset(axis - 1 for axis in value.joined if axis)
            return Labels(value.ids[number if len(value.ids) > 1 else 0], value.reduced, value.running, joined)
        if isinstance(value, Weight):
            axis, *axes = value.axes
            fixed = () if axis is None else (Index(axis, number, len(self.passes) - 1),)
            return dataclasses.replace(value, axes=tuple(axes), fixed=(*value.fixed, *fixed))
        return value

    def alike(self, a: Any, b: Any) -> bool:
        """Whether two values of a carry have the same units."""
        if isinstance(a, Labels) and isinstance(b, Labels):
            a_ids, b_ids = self.labels.roots(a.ids), self.labels.roots(b.ids)
            return a.reduced == b.reduced and a_ids.shape == b_ids.shape and np.array_equal(a_ids, b_ids)
        return a is b or a == b

    def stacked(self, values: list[Any]) -> Any:
        """The stacked output of a scan, from the outputs of its passes."""
        found = rules.labelled(values)
        if any(value is not None and not isinstance(value, Labels) for value in values):
            for value in values:
                self.lose(value, Reason(LeftOutKind.LOOP, "passes of a `scan` put it beside others"))
            return Derived(_paths(values))
        if not found:
            return None
        ids = [
            np.full((1,) * found[0].ids.ndim, -1) if value is None else self.labels.roots(value.ids) for value in values
        ]
        shape = np.broadcast_shapes(*(one.shape for one in ids))
        whole = [np.broadcast_to(one, shape) for one in ids]
        same = all(np.array_equal(whole[0], one) for one in whole)
        running = found[0].running if len({value.running for value in found}) == 1 else ""
        reduced = all(value.reduced for value in found)
        return Labels(whole[0][None] if same else np.stack(whole), reduced, running)

    def number(self, atom: core.Var | core.Literal) -> float | None:
        """The number that all entries of an array equal, if known."""
        if isinstance(atom, core.Literal):
            return float(atom.val) if np.ndim(atom.val) == 0 and np.isrealobj(atom.val) else None
        return self.numbers.get(atom)

    def note_number(self, var: core.Var, value: Any) -> None:
        """Records that a variable is a number, or, since bodies of calls are walked again, that it is not."""
        known = isinstance(value, int | float | np.ndarray | np.generic) and np.ndim(value) == 0
        if known and np.isrealobj(value):
            self.numbers[var] = float(value)
        else:
            self.numbers.pop(var, None)

    def step(self, eqn: core.JaxprEqn, values: list[Any]) -> list[Any]:
        """Labels the outputs of one equation."""
        name = eqn.primitive.name
        if name in jaxprs.CONTRACTIONS:
            return [self.contraction(eqn, values)]
        if name in ("split", "unstack"):
            return self.split(eqn, values)
        if len(eqn.outvars) != 1:
            return [self.not_followed(eqn, values)] * len(eqn.outvars)
        if rules.labelled(values):
            return [self.labelled(eqn, values)]
        return [self.unlabelled(eqn, values)]

    def labelled(self, eqn: core.JaxprEqn, values: list[Any]) -> Any:
        """The output of an equation with one output and a labeled operand."""
        name, first = eqn.primitive.name, values[0]
        if name in jaxprs.ELEMENTWISE:
            return self.elementwise(eqn, values)
        if name == "concatenate":
            shapes = [atom.aval.shape for atom in eqn.invars]
            return self.concatenate(eqn, values, eqn.params["dimension"], shapes)
        if name == "stack":
            return self.stack(eqn, values)
        if name in ("scatter-add", "scatter"):
            return self.scatter(eqn, values)
        rule = rules.LABEL_RULES.get(name)
        if rule is None or any(value is not None for value in values[1:]):
            return self.not_followed(eqn, values)
        if name in ("reduce_sum", "reduce_max", "reduce_min"):
            first = self.sum_joined(eqn, first)
        ids = rule(eqn, first.ids)
        if ids is not None:
            reduced = first.reduced or name in ("reduce_sum", "psum")
            form = first.form if name in rules.REARRANGING else moments.Form()
            return Labels(ids, reduced, first.running, form=form)
        if name == "reduce_sum":  # over units: a statistic that mixes them
            return Vector(statistic=moments.of_sum(eqn, first.ids, first.form))
        axes = eqn.params.get("axes", ())
        if name in ("reduce_max", "reduce_min") and any(
            size > 1 for axis, size in enumerate(first.ids.shape) if axis not in axes
        ):  # as in maxout, where units that are reduced together are one unit
            return Labels(self.merge(first.ids, tuple(axes)))
        return self.not_followed(eqn, values)

    def scatter(self, eqn: core.JaxprEqn, values: list[Any]) -> Any:
        """Units that are summed by segment, or written into an array over the batch, stay what they are."""
        operand, indices, updates = values
        ids = rules.scatter_labels(eqn, updates.ids) if isinstance(updates, Labels) else None
        if ids is None or indices is not None or not (operand is None or isinstance(operand, Labels)):
            return self.not_followed(eqn, values)
        return Labels(ids if operand is None else self.join(ids, operand.ids))

    def as_units(self, value: Any) -> Any:
        """A sum over some units at a time, as over the members of an ensemble: they become one unit."""
        statistic = value.statistic if isinstance(value, Vector) and not value.parts else None
        if statistic is None or statistic.kind is moments.Kind.OTHER or len(statistic.members) < 2:
            return value
        first = np.full(len(statistic.members), -1)
        for number, members in enumerate(statistic.members):
            if members.size:
                first[number] = members[0]
                self.labels.union(members[:1], members)
        return Labels(first[statistic.sets])

    def sum_joined(self, eqn: core.JaxprEqn, value: Labels) -> Labels:
        """Merges units that a reduction combines from concatenated arrays."""
        axes = [axis for axis in eqn.params["axes"] if axis in value.joined]
        return dataclasses.replace(value, ids=self.merge(value.ids, tuple(axes), keep=True))

    def unlabelled(self, eqn: core.JaxprEqn, values: list[Any]) -> Any:
        """The output of an equation with one output on parameters and statistics that mix units."""
        name = eqn.primitive.name
        if name == "mul" and 0.0 in map(self.number, eqn.invars):
            return self.nothing(eqn)
        known = [(position, value) for position, value in enumerate(values) if value is not None]
        if any(isinstance(value, Derived) for _, value in known):
            return self.not_followed(eqn, values)
        position, value = known[0]
        if name == "concatenate" and len(known) == len(values) and all(isinstance(one, Weight) for one in values):
            axis = eqn.params["dimension"]
            sizes = tuple(atom.aval.shape[axis] for atom in eqn.invars)
            plain = all(one.axes[axis] is not None and not one.fixed for one in values)
            return Joined(tuple(values), sizes, axis) if plain else self.not_followed(eqn, values)
        if any(isinstance(one, Joined) for _, one in known):
            return self.joined(eqn, values)
        if len(known) == 1 and isinstance(value, Weight):
            if name == "gather" and position == 0:
                return self.lookup(eqn, value)
            if rules.is_scaling(eqn, position):
                plain = value.plain and name not in ("mul", "div", "neg")
                return dataclasses.replace(_after(eqn, position, value), plain=plain)
            axes = rules.view_axes(eqn, value.axes) if position == 0 else None
            if axes is not None:
                return dataclasses.replace(value, axes=axes)
        if name in jaxprs.ELEMENTWISE:
            return self.combine(eqn, values)
        vectors = [value for _, value in known if isinstance(value, Vector)]
        if len(vectors) == len(known) and (name in rules.LABEL_RULES or name == "concatenate"):
            axes = [rules.view_axes(eqn, part.axes) for vector in vectors for part in vector.parts]
            if not axes or (len(known) == 1 and None not in axes):
                parts = tuple(
                    dataclasses.replace(part, axes=new) for part, new in zip(vectors[0].parts, axes, strict=True)
                )
                statistics = [vector.statistic for vector in vectors if vector.statistic is not None]
                sets = rules.rearranged(eqn, statistics[0].sets) if statistics else None
                return Vector(parts, moments.rearrange(eqn, statistics, sets))
        return self.not_followed(eqn, values)

    def nothing(self, eqn: core.JaxprEqn) -> None:
        """An array of zeros, such as the first state of a cell, belongs to no unit."""
        self.note_number(eqn.outvars[0], 0.0)

    def joined(self, eqn: core.JaxprEqn, values: list[Any]) -> Any:
        """The output of an equation on concatenated parameters and data: a view of them, a multiple, or a sum."""
        known = [(position, value) for position, value in enumerate(values) if value is not None]
        (position, value), *others = known
        if others or not isinstance(value, Joined):
            return self.not_followed(eqn, values)
        if eqn.primitive.name in ("add", "sub", "mul", "div") or rules.is_scaling(eqn, position):
            plain = eqn.primitive.name in moments.UNCHANGED
            parts = (dataclasses.replace(_after(eqn, position, p), plain=p.plain and plain) for p in value.parts)
            return dataclasses.replace(value, parts=tuple(parts))
        places = rules.view_axes(eqn, range(eqn.invars[0].aval.ndim))
        views = [rules.view_axes(eqn, part.axes) for part in value.parts]
        if places is None or value.axis not in places or None in views:
            return self.not_followed(eqn, values)
        parts = (dataclasses.replace(part, axes=axes) for part, axes in zip(value.parts, views, strict=True))
        return Joined(tuple(parts), value.sizes, places.index(value.axis))

    def combine(self, eqn: core.JaxprEqn, values: list[Any]) -> Any:
        """An elementwise function of parameters and statistics."""
        vectors = [None if value is None else _as_vector(value, eqn.outvars[0].aval.ndim) for value in values]
        parts = [_after(eqn, n, part) for n, vector in enumerate(vectors) if vector for part in vector.parts]
        numbers = [self.number(atom) for atom in eqn.invars]
        statistic = moments.combine(eqn, _statistics(vectors), numbers)
        if statistic is not None and statistic.kind is moments.Kind.OTHER:  # it will not normalize
            values = [self.as_units(value) for value in values]
            if rules.labelled(values):
                return self.elementwise(eqn, values)
        return Vector(tuple(parts), statistic)

    def split(self, eqn: core.JaxprEqn, values: list[Any]) -> list[Any]:
        """Labels the parts of an array that is split, or unstacked, along one axis."""
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
        return [self.not_followed(eqn, values)] * count

    def stack(self, eqn: core.JaxprEqn, values: list[Any]) -> Any:
        """Labels arrays that are stacked along a new axis: each is expanded, then they are concatenated."""
        axis, grown, shapes = eqn.params["axis"], [], []
        for atom, value in zip(eqn.invars, values, strict=True):
            shapes.append((*atom.aval.shape[:axis], 1, *atom.aval.shape[axis:]))
            if isinstance(value, Labels):
                joined = frozenset(place + (place >= axis) for place in value.joined)
                value = dataclasses.replace(value, ids=np.expand_dims(value.ids, axis), joined=joined)
            elif isinstance(value, Weight):
                value = dataclasses.replace(value, axes=(*value.axes[:axis], None, *value.axes[axis:]))
            grown.append(value)
        return self.concatenate(eqn, grown, axis, shapes)

    def not_followed(self, eqn: core.JaxprEqn, values: list[Any], text: str = "") -> Any:
        """Leaves every labeled operand out and marks parameters as used in another way."""
        reason = tracing.not_followed(eqn.primitive.name, "its activations pass through")
        reason = Reason(LeftOutKind.NOT_FOLLOWED, text) if text else reason
        for value in values:
            self.lose(value, reason)
        paths = _paths(values)
        derived = any(
            isinstance(value, Derived) for value in values
        )  # then a statistic among the operands says nothing
        for path in paths:
            if derived and path in self.states:
                continue
            self.used_otherwise.setdefault(path, eqn.primitive.name)
        return Derived(paths) if paths and not rules.labelled(values) else None

    def lose(self, value: Any, reason: Reason) -> None:
        """Leaves the units of a value out."""
        if isinstance(value, Labels):
            self.lose_units(value.ids, reason)
        elif isinstance(value, Vector):
            text = f"it is summed with other units (`reduce_sum`), and {reason.text}"
            for ids in value.statistic.members if value.statistic else ():
                self.lose_units(ids, reason._replace(text=text))

    def lose_units(self, ids: np.ndarray, reason: Reason) -> None:
        """Leaves units out. Numbers below 0 are ignored."""
        self.lost.append((np.unique(ids[ids >= 0]), reason))

    def elementwise(self, eqn: core.JaxprEqn, values: list[Any]) -> Any:
        """Units that are combined in one element become one unit; parameters combined with them are biases and
        scales."""
        name, found = eqn.primitive.name, rules.labelled(values)
        form = found[0].form if len(found) == 1 else moments.Form()
        values = [
            value
            if not isinstance(value, Vector)
            or value.statistic is None
            or moments.normalizes(eqn, position, value.statistic, form)
            else self.as_units(value)
            for position, value in enumerate(values)
        ]
        found = rules.labelled(values)
        ids = found[0].ids
        for other in found[1:]:
            if name in ("add", "add_any", "sub"):
                self.sums.append(self.meeting(ids, other.ids))
            ids = self.join(ids, other.ids)
        if name == "sub" and isinstance(values[0], Labels) and isinstance(values[1], Labels) and values[1].reduced:
            made = self.made_by.get(eqn.invars[0])
            if made is not None and not values[0].reduced:
                made.absorbed = True
        if name == "convert_element_type" and eqn.invars[0] in self.made_by:
            self.made_by[eqn.outvars[0]] = self.made_by[eqn.invars[0]]
        running = found[0].running if len(found) == sum(value is not None for value in values) == 1 else ""
        reduced = all(value.reduced for value in found)
        if not reduced:
            self.misused.update(value.running for value in found if value.running)
        for position, value in enumerate(values):
            if isinstance(value, Derived):
                text = f"its activations meet a value computed from {', '.join(sorted(value.paths))}"
                return self.not_followed(eqn, values, text)
            if isinstance(value, Joined):
                cuts = zip(value.parts, value.split(ids), strict=True)
                if not all([self.meet(eqn, position, part, cut, moments.Form()) for part, cut in cuts]):
                    return self.not_followed(eqn, values)
            if isinstance(value, Weight | Vector):
                form = found[0].form if len(found) == 1 else moments.Form()
                if not self.meet(eqn, position, value, ids, form):
                    return self.not_followed(
                        eqn, values, f"its activations meet the parameter {', '.join(_paths([value]))} in `{name}`"
                    )
                states = [part.path for part in _as_vector(value, ids.ndim).parts if part.state]
                if states and reduced and name in ("add", "sub"):
                    running = states[0]
                elif not self.is_statistic(eqn, position, value):
                    self.misused.update(states)
        joined = frozenset(
            axis
            for axis in frozenset().union(*(value.joined for value in found))
            if all(axis in value.joined or value.ids.shape[axis] == 1 for value in found)
        )
        forms = [value.form if isinstance(value, Labels) else None for value in values]
        numbers = [self.number(atom) for atom in eqn.invars]
        return Labels(ids, reduced, running, joined, moments.form_of(eqn, forms, _statistics(values), numbers))

    def meeting(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """The units that are combined with others in one element."""
        a, b = np.broadcast_arrays(self.labels.roots(a), self.labels.roots(b))
        differ = (a != b) & (a >= 0) & (b >= 0)
        return np.unique(np.concatenate([a[differ], b[differ]]))

    def join(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Merges units that are combined in one element, and returns the labels of all elements."""
        self.labels.union(a, b)
        a, b = np.broadcast_arrays(a, b)
        return np.where(a >= 0, a, b)

    def is_statistic(self, eqn: core.JaxprEqn, position: int, value: Weight | Vector) -> bool:
        """Whether an equation uses state the way a mean or a variance is used."""
        name = eqn.primitive.name
        if name == "sub":
            return position == 1 and isinstance(value, Weight) and value.plain and not value.steps
        states = [part for part in _as_vector(value, 0).parts if part.state]
        rooted = {step.primitive.name for part in states for step, _ in part.steps} & {"rsqrt", "sqrt", "pow"}
        return bool(rooted) and (name == "mul" or (name == "div" and position == 1))

    def meet(
        self, eqn: core.JaxprEqn, position: int, value: Weight | Vector, ids: np.ndarray, form: moments.Form
    ) -> bool:
        """Records what a parameter or a statistic does to units; False if that is not understood."""
        name, vector = eqn.primitive.name, _as_vector(value, ids.ndim)
        divides = name == "div" and position == 1
        if vector.statistic is not None:
            if moments.normalizes(eqn, position, vector.statistic, form):
                self.normalized.append((vector.statistic, ids))
            else:
                text = f"the sum meets activations in `{name}`, which is no normalization"
                self.lose(vector, Reason(LeftOutKind.MIXED, text))
        role = {"add": "bias", "sub": "bias", "mul": "scale"}.get(name, "scale" if divides else "")
        if name == "select_n" and position > 0:  # a token in place of what is masked
            role = "bias"
        # The axes along which units differ. An axis of length 1 may hold a unit of its own.
        varying = [axis for axis, size in enumerate(ids.shape) if size > 1] or list(range(ids.ndim))
        for part in vector.parts:
            lengths = [1 if axis is None else self.shapes[part.path][axis] for axis in part.axes]
            own = [n for n in varying if part.axes[n] is not None and (lengths[n] > 1 or ids.shape[n] == 1)]
            if not own:
                continue  # a parameter shared by all units
            if not role:
                return False
            leaf_axes = tuple(part.axes[axis] for axis in own)
            rows = ids.transpose(*own, *(axis for axis in range(ids.ndim) if axis not in own))
            rows = rows.reshape(*rows.shape[: len(own)], -1)
            rows = np.broadcast_to(rows, (*(self.shapes[part.path][axis] for axis in leaf_axes), rows.shape[-1]))
            rows, leaf_axes = self.among_stacked(part, leaf_axes, rows)
            if not part.state:
                self.uses.setdefault(part.path, set()).add((role, leaf_axes))
            self.claims.append(Claim(part.path, leaf_axes, role, rows, part))
            if role == "bias" and isinstance(value, Weight):
                self.bias(eqn, position, value)
        return True

    def sources(self, eqn: core.JaxprEqn, values: list[Any]) -> list[Any]:
        """Treats entries of a parameter that is repeated over the batch, such as learned queries, as units if a kernel
        reads them."""
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
        self.uses.setdefault(weight.path, set()).add(("lookup", axes))
        self.kinds.setdefault(weight.path, "embedding")
        return [
            Labels(self.produce(weight, axes, places, len(weight.axes))) if n == position else value
            for n, value in enumerate(values)
        ]

    def gates(self, eqn: core.JaxprEqn, values: list[Any], position: int, kernels: Joined) -> Any:
        """Applies concatenated kernels one by one, if their outputs are concatenated."""
        made = []
        for part in kernels.parts:
            replaced = [part if n == position else value for n, value in enumerate(values)]
            use = rules.KernelUse(eqn, replaced)
            if use.reason or kernels.axis not in use.places:
                return self.not_followed(eqn, values, use.reason)
            made.append(self.contraction(eqn, replaced))
        self.made_by.pop(eqn.outvars[0], None)  # its bias does not belong to one kernel
        if not all(isinstance(labels, Labels) for labels in made):
            return None
        return Labels(np.concatenate([labels.ids for labels in made], use.places[kernels.axis]))

    def among_stacked(
        self, weight: Weight, axes: tuple[int, ...], rows: np.ndarray
    ) -> tuple[np.ndarray, tuple[int, ...]]:
        """Rows of a slice of a stacked leaf, [axes..., others...], as rows of the whole leaf; and the axes of these."""
        if not weight.fixed:
            return rows, axes
        sizes = [self.shapes[weight.path][index.axis] for index in weight.fixed]
        whole = np.full((*sizes, *rows.shape), -1)
        whole[tuple(index.number for index in weight.fixed)] = rows
        return whole, (*(index.axis for index in weight.fixed), *axes)

    def block(
        self, table: dict[tuple[str, tuple[int, ...]], np.ndarray], weight: Weight, axes: tuple[int, ...]
    ) -> np.ndarray:
        """The labels in a table of the axes of a leaf; a view, of -1 if it is new."""
        key = (weight.path, (*(index.axis for index in weight.fixed), *axes))
        if key not in table:
            table[key] = np.full([self.shapes[weight.path][axis] for axis in key[1]], -1)
        return table[key][tuple(index.number for index in weight.fixed)]

    def bias(self, eqn: core.JaxprEqn, position: int, weight: Weight) -> None:
        """Records that `weight` is the bias of the kernel whose output it is added to, if it is."""
        source = eqn.invars[1 - position]
        made = self.made_by.get(source) if isinstance(source, core.Var) else None
        if made is None or made.bias is not None or not (made.plain and weight.plain) or eqn.primitive.name != "add":
            return
        # Its axes are those of the kernel's outputs, in the kernel's order.
        kernel_axis = dict(zip(made.out_places, made.out_axes, strict=True))
        leaf_axis = {axis: kernel_axis.get(place) for place, axis in enumerate(weight.axes) if axis is not None}
        if len(made.fixed) == len(weight.fixed):
            pairs = zip(weight.fixed, made.fixed, strict=True)
            leaf_axis |= {mine.axis: other.axis for mine, other in pairs if mine[1:] == other[1:]}
        axes = [leaf_axis.get(axis) for axis in range(len(self.shapes[weight.path]))]
        if None not in axes and len(axes) == len(kernel_axis) + len(made.fixed) and axes == sorted(axes):
            made.bias = (weight.path, tuple(axes))
            self.made_by[eqn.outvars[0]] = made

    def merge(self, ids: np.ndarray, axes: tuple[int, ...], keep: bool = False) -> np.ndarray:
        """Merges units that differ only along `axes`, which share weights, and drops these axes."""
        for axis in axes:
            whole = ids
            ids = whole.max(axis, keepdims=True)
            self.labels.union(ids, whole)
            mixed = np.broadcast_to((whole < 0).any(axis, keepdims=True) & (ids >= 0), ids.shape)
            if mixed.any():
                self.lose_units(ids[mixed], _SHARED)
        return ids if keep else ids.squeeze(axes)

    def contraction(self, eqn: core.JaxprEqn, values: list[Any]) -> Any:
        """Applies a kernel: it reads labeled units, if its operand has them, and writes new ones."""
        if 0.0 in map(self.number, eqn.invars):
            return self.nothing(eqn)
        if rules.labelled(values) and all(value is None or isinstance(value, Labels) for value in values):
            return self.product(eqn, values)
        for position, value in enumerate(values):
            if isinstance(value, Joined) and not isinstance(values[1 - position], Joined | Weight):
                return self.gates(eqn, values, position, value)
        values = self.sources(eqn, values)
        use = rules.KernelUse(eqn, values)
        if use.reason:
            return self.not_followed(eqn, values, use.reason)
        weight, value, operand = values[use.kernel], values[use.operand], eqn.invars[use.operand]
        path, shape = weight.path, self.shapes[weight.path]
        in_axes = tuple(weight.axes[axis] for axis in use.kernel_axes)
        out_axes = tuple(weight.axes[axis] for axis in use.places)
        if any(axis is None for axis in (*in_axes, *out_axes)):
            return self.not_followed(eqn, values, f"the kernel {path} is cut or broadcast before it is used")
        if isinstance(value, Weight):
            return self.not_followed(eqn, values, f"the kernel {path} is applied to other parameters")
        value = self.as_units(value)
        if not isinstance(value, Labels):
            self.not_followed(eqn, [value], "a kernel reads the sum")
        labels = rows = coupled = None
        if isinstance(value, Labels):
            self.misused.update({value.running} - {""})
            order = (*use.operand_axes, *(a for a in range(value.ids.ndim) if a not in use.operand_axes))
            ids = value.ids.transpose(order)
            ids = self.merge(ids, tuple(range(len(use.operand_axes), ids.ndim)))
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
            rows, all_axes = self.among_stacked(weight, in_axes, rows.reshape(sizes))
        else:
            all_axes = in_axes
        rows = None if rows is None else rows.ravel()
        out_all = (*(index.axis for index in weight.fixed), *out_axes)
        passes: list[int | None] = [None] * len(self.passes)
        for index in weight.fixed:
            passes[index.depth] = index.number
        made = Contraction(
            path, all_axes, out_axes, operand, use.operand_axes, rows, labels, places, weight.plain, weight.fixed,
            tuple(passes),
        )  # fmt: skip
        self._contractions[eqn.outvars[0], path, tuple(passes)] = made
        self.made_by[eqn.outvars[0]] = made
        self.uses.setdefault(path, set()).add(("kernel", all_axes, out_all, use.groups))
        self.kinds.setdefault(path, "dense" if eqn.primitive.name == "dot_general" else "conv")
        if labels is not None:
            known = self.block(self.readers, weight, in_axes)
            if (path, in_axes, weight.fixed) not in self.read:
                self.read.add((path, in_axes, weight.fixed))
                known[...] = labels
            self.labels.union(known, labels)  # units that are read by the same weights are one
            mixed = (known < 0) != (labels < 0)
            if mixed.any():
                self.lose_units(np.concatenate([known[mixed], labels[mixed]]), _SHARED)
        return Labels(self.produce(weight, out_axes, places, eqn.outvars[0].aval.ndim, coupled))

    def produce(
        self,
        weight: Weight,
        axes: tuple[int, ...],
        places: tuple[int, ...],
        ndim: int,
        coupled: np.ndarray | None = None,
    ) -> np.ndarray:
        """The labels along the free axes of a kernel, placed on the array's axes.

        Args:
          weight: the kernel.
          axes: its free axes.
          places: the array's axes that correspond to these.
          ndim: the array's number of axes.
          coupled: units that stay the same, or -1 for new ones; None if all are new.
        """
        labels = self.block(self.producers, weight, axes)
        if (labels < 0).any():
            new = self.labels.new(labels.shape)
            labels[...] = new if coupled is None else np.where(coupled >= 0, coupled, new)
        if coupled is not None:
            self.labels.union(labels, coupled)
        shape = [1] * ndim
        for size, place in zip(labels.shape, places, strict=True):
            shape[place] = size
        return labels.transpose(np.argsort(places)).reshape(shape)

    def lookup(self, eqn: core.JaxprEqn, table: Weight) -> Any:
        """Rows of a table that are looked up by index: its other axes enumerate units."""
        axes = rules.lookup_axes(eqn, table.axes)
        found = () if axes is None else tuple((axis, place) for place, axis in enumerate(axes) if axis is not None)
        if not found or len(found) == len(self.shapes[table.path]):
            return self.not_followed(eqn, [table])
        own = tuple(axis for axis, _ in found)
        self.uses.setdefault(table.path, set()).add(("lookup", (*(index.axis for index in table.fixed), *own)))
        self.kinds.setdefault(table.path, "embedding")
        places = tuple(place for _, place in found)
        return Labels(self.produce(table, own, places, eqn.outvars[0].aval.ndim))

    def product(self, eqn: core.JaxprEqn, values: list[Any]) -> Any:
        """Activations times activations: units that are summed over, and units that are combined, become one unit."""
        if eqn.primitive.name != "dot_general":
            return self.not_followed(eqn, values, "it is convolved with something that is not a parameter")
        contracted, batch = eqn.params["dimension_numbers"]
        sides = []
        rest = [atom.aval.ndim - len(c) - len(b) for atom, c, b in zip(eqn.invars, contracted, batch, strict=True)]
        for side, (value, summed, shared) in enumerate(zip(values, contracted, batch, strict=True)):
            if value is None:
                continue
            if values[1 - side] is None and any(value.ids.shape[axis] > 1 for axis in summed):
                return self.not_followed(eqn, values, "its activations are multiplied with values that are no kernel")
            ids = self.merge(value.ids, tuple(summed), keep=True)
            others = [axis for axis in range(ids.ndim) if axis not in shared and axis not in summed]
            ids = ids.transpose(*shared, *others, *summed)
            sizes = ids.shape[: len(shared)], ids.shape[len(shared) : len(shared) + len(others)]
            after = (1,) * rest[1] if side == 0 else ()
            before = (1,) * rest[0] if side == 1 else ()
            sides.append(ids.reshape(*sizes[0], *before, *sizes[1], *after))
        ids = sides[0]
        if len(sides) == 2:
            counts = [np.unique(self.labels.roots(side[side >= 0])).size for side in sides]
            crossed = not any(m > 1 and n > 1 for m, n in zip(sides[0].shape, sides[1].shape, strict=True))
            if crossed and counts[0] != counts[1]:  # all would become one unit, as with a single head of keys or values
                text = "it weighs other activations, as queries and keys of a single head do, and no kernel reads it"
                self.lose_units(sides[counts.index(min(counts))], Reason(LeftOutKind.NOT_READ, text))
                return Labels(sides[counts.index(max(counts))])
        for other in sides[1:]:
            self.products.append(np.unique(np.concatenate([ids[ids >= 0], other[other >= 0]])))
            ids = self.join(ids, other)
        return Labels(ids)

    def concatenate(self, eqn: core.JaxprEqn, values: list[Any], axis: int, shapes: list[tuple[int, ...]]) -> Any:
        """Concatenates labels. A parameter beside units, such as a class token beside patches, is a bias of its own."""
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
                    return self.not_followed(eqn, values)
                new = self.labels.new([self.shapes[value.path][leaf] for leaf in leaf_axes])
                along = [shape[place] if place in places else 1 for place in range(len(shape))]
                ids = new.transpose(np.argsort(places)).reshape(along)
                self.uses.setdefault(value.path, set()).add(("bias", leaf_axes))
                self.claims.append(Claim(value.path, leaf_axes, "bias", new[..., None], value))
            elif isinstance(value, Labels):
                ids = value.ids
            elif value is not None:
                return self.not_followed(eqn, values)
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


def _alike(parts: list[np.ndarray], axis: int) -> bool:
    """Whether all parts hold the same labels all along an axis."""
    first = np.take(parts[0], [0], axis)
    return all(np.array_equal(part, np.broadcast_to(first, part.shape)) for part in parts)


def _as_vector(value: Weight | Vector, ndim: int) -> Vector:
    """A parameter as a vector on an array of `ndim` axes; None for a scalar."""
    if isinstance(value, Weight):
        value = Vector((value,))
    fitting = (
        part if len(part.axes) == ndim else dataclasses.replace(part, axes=(None,) * ndim) for part in value.parts
    )
    return dataclasses.replace(value, parts=tuple(fitting))


def _after(eqn: core.JaxprEqn, position: int, weight: Weight) -> Weight:
    """A parameter after an elementwise equation."""
    if eqn.primitive.name in ("convert_element_type", "copy", "copy_p") or not rules.is_scalar_step(eqn, position):
        return weight
    return dataclasses.replace(weight, steps=(*weight.steps, (eqn, position)))


def _statistics(values: list[Any]) -> list[moments.Statistic | None]:
    """The statistics among values."""
    return [value.statistic if isinstance(value, Vector) else None for value in values]


def _paths(values: list[Any]) -> frozenset[str]:
    paths: set[str] = set()
    for value in values:
        if isinstance(value, Weight):
            paths.add(value.path)
        elif isinstance(value, Vector | Joined):
            paths.update(part.path for part in value.parts)
        elif isinstance(value, Derived):
            paths.update(value.paths)
    return frozenset(paths)
