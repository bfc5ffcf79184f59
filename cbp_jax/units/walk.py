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
from cbp_jax.units import elementwise, groups, kernels, moments, rearranging, rules, tracing
from cbp_jax.units.record import Record
from cbp_jax.units.values import Derived, Index, Joined, Labels, LeftOutKind, Reason, Vector, Weight, paths_of

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


def walk(trace: tracing.Trace) -> "Walk":
    """Walk through a network. State that is not used like running statistics is treated as data."""
    while data := (found := Walk(trace)).data():
        trace = trace.with_data(data)
    return found


class Walk(Record):
    """One pass over a traced network."""

    def __init__(self, trace: tracing.Trace):
        super().__init__(trace)
        jaxpr = trace.jaxpr.jaxpr
        inputs = [
            Weight(self.paths[var], tuple(range(var.aval.ndim)), state=var in trace.states)
            if var in self.paths
            else None
            for var in jaxpr.invars
        ]
        self.checked: list[bool] = []  # for each output, False if it is new running statistics
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

    def data(self) -> set[str]:
        """Return inputs provisionally treated as state that turn out to be data.

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
        """Label the outputs of a jaxpr whose inputs are labeled."""
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
        """Walk through a loop, pass by pass, until nothing new is found.

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
        """Return the slice of a scanned value that one pass gets."""
        if isinstance(value, Labels):
            joined = frozenset(axis - 1 for axis in value.joined if axis)
            return Labels(value.ids[number if len(value.ids) > 1 else 0], value.reduced, value.running, joined)
        if isinstance(value, Weight):
            axis, *axes = value.axes
            fixed = () if axis is None else (Index(axis, number, len(self.passes) - 1),)
            return dataclasses.replace(value, axes=tuple(axes), fixed=(*value.fixed, *fixed))
        return value

    def alike(self, a: Any, b: Any) -> bool:
        """Return whether two values of a carry have the same units."""
        if isinstance(a, Labels) and isinstance(b, Labels):
            a_ids, b_ids = self.labels.roots(a.ids), self.labels.roots(b.ids)
            return a.reduced == b.reduced and a_ids.shape == b_ids.shape and np.array_equal(a_ids, b_ids)
        return a is b or a == b

    def stacked(self, values: list[Any]) -> Any:
        """Return the stacked output of a scan, from the outputs of its passes."""
        found = rules.labeled(values)
        if any(value is not None and not isinstance(value, Labels) for value in values):
            for value in values:
                self.lose(value, Reason(LeftOutKind.LOOP, "passes of a `scan` stack it with values that are not units"))
            return Derived(paths_of(values))
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

    def step(self, eqn: core.JaxprEqn, values: list[Any]) -> list[Any]:
        """Label the outputs of one equation."""
        name = eqn.primitive.name
        if name in jaxprs.CONTRACTIONS:
            return [kernels.contract(self, eqn, values)]
        if name in ("split", "unstack"):
            return rearranging.split(self, eqn, values)
        if len(eqn.outvars) != 1:
            return [self.not_followed(eqn, values)] * len(eqn.outvars)
        if rules.labeled(values):
            return [self.labeled(eqn, values)]
        return [self.unlabeled(eqn, values)]

    def labeled(self, eqn: core.JaxprEqn, values: list[Any]) -> Any:
        """Return the output of an equation with one output and a labeled operand."""
        name, first = eqn.primitive.name, values[0]
        if name in jaxprs.ELEMENTWISE:
            return elementwise.elementwise(self, eqn, values)
        if name == "concatenate":
            shapes = [atom.aval.shape for atom in eqn.invars]
            return rearranging.concatenate(self, eqn, values, eqn.params["dimension"], shapes)
        if name == "stack":
            return rearranging.stack(self, eqn, values)
        if name in ("scatter-add", "scatter"):
            return rearranging.scatter(self, eqn, values)
        rule = rules.LABEL_RULES.get(name)
        if rule is None or any(value is not None for value in values[1:]):
            return self.not_followed(eqn, values)
        if name in ("reduce_sum", "reduce_max", "reduce_min"):
            first = rearranging.sum_joined(self, eqn, first)
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

    def unlabeled(self, eqn: core.JaxprEqn, values: list[Any]) -> Any:
        """Return the output of an equation with one output whose operands are parameters, or statistics that mix
        units."""
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
            return rearranging.joined_parameters(self, eqn, values)
        if len(known) == 1 and isinstance(value, Weight):
            if name == "gather" and position == 0:
                return kernels.lookup(self, eqn, value)
            if rules.is_scaling(eqn, position):
                plain = value.plain and name not in ("mul", "div", "neg")
                return dataclasses.replace(elementwise.after(eqn, position, value), plain=plain)
            axes = rules.view_axes(eqn, value.axes) if position == 0 else None
            if axes is not None:
                return dataclasses.replace(value, axes=axes)
        if name in jaxprs.ELEMENTWISE:
            return elementwise.combine(self, eqn, values)
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
