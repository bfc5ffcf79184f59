"""Walks through a traced network and labels every element of every array with its unit.

The labels of an array are integers of a shape that broadcasts to the array's, so that reshapes, transposes,
concatenations and sums of arrays are the same operations on their labels. A kernel that is contracted makes new labels
along its free axes and, where it contracts labelled values, reads them. What the walk does not understand leaves the
labels it met out, with the reason.
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
from cbp_jax.units.values import Contraction, Derived, Labels, LeftOutKind, Reason, UnionFind, Vector, Weight

_SHARED = Reason(LeftOutKind.SHARED, "it shares weights with values that are not units")
# What equations make of numbers, as in the count by which a sum is divided.
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
      weight: the parameter as it met them.
    """

    path: str
    axes: tuple[int, ...]
    role: str
    ids: np.ndarray
    weight: Weight


def walk(trace: tracing.Trace) -> "Walk":
    """Walks through a network; what turns out not to be used as running statistics are is data."""
    while data := (found := Walk(trace)).data():
        trace = trace.with_data(data)
    return found


class Walk:
    """One pass over a traced network; `contractions` in forward order is what `with_features` needs of it."""

    def __init__(self, trace: tracing.Trace):
        self.contractions: list[Contraction] = []
        self.labels = UnionFind()
        self.producers: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}  # kernel and free axes -> labels
        self.readers: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}  # kernel and row axes -> labels
        self.claims: list[Claim] = []
        self.uses: dict[str, set[Any]] = {}  # the ways in which a parameter is used
        self.kinds: dict[str, str] = {}  # "dense", "conv" or "embedding", by kernel
        self.made_by: dict[core.Var, Contraction] = {}  # outputs of contractions, for their biases
        self.lost: list[tuple[np.ndarray, Reason]] = []  # labels that are left out, and why
        self.normalized: list[tuple[moments.Statistic, np.ndarray]] = []  # statistics, and the labels that they meet
        self.sums: list[np.ndarray] = []  # units that were added to others
        self.products: list[np.ndarray] = []  # units whose activations are contracted with each other
        self.used_otherwise: dict[str, str] = {}  # parameters used in ways not followed
        self.misused: set[str] = set()  # state that is used as no statistic is
        self.numbers: dict[core.Var, float] = {}  # arrays that are one number throughout
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
        self.checked: list[bool] = []  # of each output, whether it is more than new running statistics
        outputs = self.run(trace.jaxpr, inputs, nested=False)
        for (key_path, _), value in zip(jax.tree_util.tree_leaves_with_path(trace.out_tree), outputs, strict=True):
            # New running statistics leave by the name that old ones came in by.
            if isinstance(value, Labels) and value.running and value.reduced:
                name = f"/{groups.join_path(key_path)}"
                if any(name.endswith(f"/{groups.statistics_name(path)}") for path in self.states):
                    self.checked.append(False)
                    continue
            self.checked.append(True)
            self.lose(value, Reason(LeftOutKind.OUTPUT, "it is part of the network's output"))

    def data(self) -> set[str]:
        """Leaves of inputs that came as state and are none.

        A statistic is a number for each unit, which is only used to normalize and only updated from a sum over the
        batch. What stands under "batch_stats" is taken for one.
        """
        inputs = {path for path in self.states if not path.startswith(f"{groups.STATISTICS}/")}
        found = inputs & (self.uses.keys() | self.used_otherwise.keys() | self.misused)
        for claim in self.claims:
            other = [size for axis, size in enumerate(self.shapes[claim.path]) if axis not in claim.axes]
            if claim.path in inputs and max(other, default=1) > 1:
                found.add(claim.path)
        return found

    def run(self, closed: core.ClosedJaxpr, inputs: list[Any], nested: bool) -> list[Any]:
        """Labels the outputs of a jaxpr whose inputs are labelled."""
        env: dict[core.Var, Any] = dict(zip(closed.jaxpr.invars, inputs, strict=True))
        for var, value in zip(closed.jaxpr.constvars, closed.consts, strict=True):
            self.note_number(var, value)

        def read(atom):
            return None if isinstance(atom, core.Literal) else env.get(atom)

        for eqn in jaxprs.live_equations(closed.jaxpr):
            values = [read(atom) for atom in eqn.invars]
            body = jaxprs.call_body(eqn)
            if all(value is None for value in values):
                numbers, made = [self.number(atom) for atom in eqn.invars], _ARITHMETIC.get(eqn.primitive.name)
                if made is not None:
                    self.note_number(eqn.outvars[0], None if None in numbers else made(*numbers))
                continue
            if body is not None:
                for var, atom in zip(body.jaxpr.invars, eqn.invars, strict=True):
                    self.note_number(var, self.number(atom))
                results = self.run(body, values, nested or not jaxprs.is_remat(eqn))
            elif nested and eqn.primitive.name in jaxprs.CONTRACTIONS:
                results = [self.not_followed(eqn, values)] * len(eqn.outvars)
            else:
                results = self.step(eqn, values)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in closed.jaxpr.outvars]

    def number(self, atom: core.Var | core.Literal) -> float | None:
        """The number that an array is throughout, if that is known."""
        if isinstance(atom, core.Literal):
            return float(atom.val) if np.ndim(atom.val) == 0 and np.isrealobj(atom.val) else None
        return self.numbers.get(atom)

    def note_number(self, var: core.Var, value: Any) -> None:
        """Notes of a variable that it is a number, or, since bodies of calls are met again, that it is none."""
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
        """The output of an equation with one output and a labelled operand."""
        name, first = eqn.primitive.name, values[0]
        if name in jaxprs.ELEMENTWISE:
            return self.elementwise(eqn, values)
        if name == "concatenate":
            shapes = [atom.aval.shape for atom in eqn.invars]
            return self.concatenate(eqn, values, eqn.params["dimension"], shapes)
        if name == "stack":
            return self.stack(eqn, values)
        rule = rules.LABEL_RULES.get(name)
        if rule is None or any(value is not None for value in values[1:]):
            return self.not_followed(eqn, values)
        if name in ("reduce_sum", "reduce_max", "reduce_min"):
            first = self.sum_joined(eqn, first)
        ids = rule(eqn, first.ids)
        if ids is not None:
            reduced = first.reduced or name == "reduce_sum"
            form = first.form if name in rules.REARRANGING else moments.Form()
            return Labels(ids, reduced, first.running, form=form)
        if name == "reduce_sum":  # over units: a statistic that mixes them
            return Vector(statistic=moments.of_sum(eqn, first.ids, first.form))
        return self.not_followed(eqn, values)

    def sum_joined(self, eqn: core.JaxprEqn, value: Labels) -> Labels:
        """Makes those units one that a reduction brings together from arrays that were put side by side."""
        axes = [axis for axis in eqn.params["axes"] if axis in value.joined]
        return dataclasses.replace(value, ids=self.merge(value.ids, tuple(axes), keep=True))

    def unlabelled(self, eqn: core.JaxprEqn, values: list[Any]) -> Any:
        """The output of an equation with one output on parameters and statistics that mix units."""
        name = eqn.primitive.name
        known = [(position, value) for position, value in enumerate(values) if value is not None]
        if any(isinstance(value, Derived) for _, value in known):
            return self.not_followed(eqn, values)
        position, value = known[0]
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

    def combine(self, eqn: core.JaxprEqn, values: list[Any]) -> Vector:
        """An elementwise function of parameters and statistics."""
        vectors = [None if value is None else _as_vector(value, eqn.outvars[0].aval.ndim) for value in values]
        parts = [_after(eqn, n, part) for n, vector in enumerate(vectors) if vector for part in vector.parts]
        numbers = [self.number(atom) for atom in eqn.invars]
        return Vector(tuple(parts), moments.combine(eqn, _statistics(vectors), numbers))

    def split(self, eqn: core.JaxprEqn, values: list[Any]) -> list[Any]:
        """Labels the parts of an array that is cut, or taken apart, along one axis."""
        (value,) = values
        axis, count, cut = eqn.params["axis"], len(eqn.outvars), eqn.primitive.name == "split"
        if isinstance(value, Labels):
            parts = rules.split_labels(eqn, value.ids) if cut else rules.unstack_labels(eqn, value.ids)
            joined = value.joined if cut else frozenset(a - (a > axis) for a in value.joined if a != axis)
            return [Labels(ids, value.reduced, value.running, joined) for ids in parts]
        if isinstance(value, Weight):
            here = (None,) if cut else ()
            return [dataclasses.replace(value, axes=(*value.axes[:axis], *here, *value.axes[axis + 1 :]))] * count
        if isinstance(value, Vector) and not value.parts and value.statistic is not None:
            sets = value.statistic.sets
            parts = rules.split_labels(eqn, sets) if cut else rules.unstack_labels(eqn, sets)
            return [Vector(statistic=dataclasses.replace(value.statistic, sets=sets)) for sets in parts]
        return [self.not_followed(eqn, values)] * count

    def stack(self, eqn: core.JaxprEqn, values: list[Any]) -> Any:
        """Labels arrays that are put together along a new axis: each gets it, and then they are put side by side."""
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
        """Leaves every labelled operand out and marks parameters as used in another way."""
        reason = tracing.not_followed(eqn.primitive.name, "its activations pass through")
        reason = Reason(LeftOutKind.NOT_FOLLOWED, text) if text else reason
        for value in values:
            self.lose(value, reason)
        paths = _paths(values)
        derived = any(isinstance(value, Derived) for value in values)  # then nothing is said of a statistic beside it
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
        """Leaves units out; numbers below 0 are none."""
        self.lost.append((np.unique(ids[ids >= 0]), reason))

    def elementwise(self, eqn: core.JaxprEqn, values: list[Any]) -> Any:
        """Units that meet in one element become one unit; parameters that meet them are their biases and scales."""
        name, found = eqn.primitive.name, rules.labelled(values)
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
        """The units that meet others in one element."""
        a, b = np.broadcast_arrays(self.labels.roots(a), self.labels.roots(b))
        differ = (a != b) & (a >= 0) & (b >= 0)
        return np.unique(np.concatenate([a[differ], b[differ]]))

    def join(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Makes units one that meet in one element, and gives the labels of all elements."""
        self.labels.union(a, b)
        a, b = np.broadcast_arrays(a, b)
        return np.where(a >= 0, a, b)

    def is_statistic(self, eqn: core.JaxprEqn, position: int, value: Weight | Vector) -> bool:
        """Whether state that meets units in an equation is used as a mean or a variance is."""
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
        # The axes along which units differ; a unit of its own may stand on an axis of length 1.
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
            if not part.state:
                self.uses.setdefault(part.path, set()).add((role, leaf_axes))
            self.claims.append(Claim(part.path, leaf_axes, role, rows, part))
            if role == "bias" and isinstance(value, Weight):
                self.bias(eqn, position, value)
        return True

    def bias(self, eqn: core.JaxprEqn, position: int, weight: Weight) -> None:
        """Records that `weight` is the bias of the kernel whose output it is added to, if it is."""
        source = eqn.invars[1 - position]
        made = self.made_by.get(source) if isinstance(source, core.Var) else None
        if made is None or made.bias is not None or not (made.plain and weight.plain) or eqn.primitive.name != "add":
            return
        # Its axes are those that the kernel makes, in the kernel's order.
        kernel_axis = dict(zip(made.out_places, made.out_axes, strict=True))
        leaf_axis = {axis: kernel_axis.get(place) for place, axis in enumerate(weight.axes) if axis is not None}
        axes = [leaf_axis.get(axis) for axis in range(len(self.shapes[weight.path]))]
        if None not in axes and len(axes) == len(kernel_axis) and axes == sorted(axes):
            made.bias = (weight.path, tuple(axes))
            self.made_by[eqn.outvars[0]] = made

    def merge(self, ids: np.ndarray, axes: tuple[int, ...], keep: bool = False) -> np.ndarray:
        """Makes one unit of those that differ only along `axes`, which share weights, and drops these axes."""
        for axis in axes:
            whole = ids
            ids = whole.max(axis, keepdims=True)
            self.labels.union(ids, whole)
            mixed = np.broadcast_to((whole < 0).any(axis, keepdims=True) & (ids >= 0), ids.shape)
            if mixed.any():
                self.lose_units(ids[mixed], _SHARED)
        return ids if keep else ids.squeeze(axes)

    def contraction(self, eqn: core.JaxprEqn, values: list[Any]) -> Any:
        """A kernel reads labelled units, if its operand has them, and makes new ones."""
        if rules.labelled(values) and all(value is None or isinstance(value, Labels) for value in values):
            return self.product(eqn, values)
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
            if labels is not None and inside == 1:  # depthwise: a channel goes on as itself
                coupled, labels = labels[rows[0]], None
            elif labels is not None:
                labels, in_axes = labels[rows], (*in_axes, *out_axes)
        places = tuple(use.places.values())
        rows = rows.ravel() if use.groups > 1 else None
        made = Contraction(path, in_axes, out_axes, operand, use.operand_axes, rows, labels, places, weight.plain)
        self.contractions.append(made)
        self.made_by[eqn.outvars[0]] = made
        self.uses.setdefault(path, set()).add(("kernel", in_axes, out_axes, use.groups))
        self.kinds.setdefault(path, "dense" if eqn.primitive.name == "dot_general" else "conv")
        if labels is not None:
            known = self.readers.setdefault((path, in_axes), labels)
            self.labels.union(known, labels)  # units that are read by the same weights are one
            mixed = (known < 0) != (labels < 0)
            if mixed.any():
                self.lose_units(np.concatenate([known[mixed], labels[mixed]]), _SHARED)
        return Labels(self.produce(path, out_axes, places, eqn.outvars[0].aval.ndim, coupled))

    def produce(
        self,
        path: str,
        axes: tuple[int, ...],
        places: tuple[int, ...],
        ndim: int,
        coupled: np.ndarray | None = None,
    ) -> np.ndarray:
        """The labels that the free axes of a kernel make on an array, at the given places.

        Args:
          path: the kernel.
          axes: its free axes.
          places: the array's axes that these make.
          ndim: the array's number of axes.
          coupled: units that go on as themselves, or -1 for new ones; None for all new.
        """
        key, sizes = (path, axes), [self.shapes[path][axis] for axis in axes]
        if key not in self.producers:
            new = self.labels.new(sizes)
            self.producers[key] = new if coupled is None else np.where(coupled >= 0, coupled, new)
        if coupled is not None:
            self.labels.union(self.producers[key], coupled)
        shape = [1] * ndim
        for size, place in zip(sizes, places, strict=True):
            shape[place] = size
        return self.producers[key].transpose(np.argsort(places)).reshape(shape)

    def lookup(self, eqn: core.JaxprEqn, table: Weight) -> Any:
        """Rows of a table that are taken by number: the rest of its axes make units."""
        axes = rules.lookup_axes(eqn, table.axes)
        found = () if axes is None else tuple((axis, place) for place, axis in enumerate(axes) if axis is not None)
        if not found or len(found) == len(self.shapes[table.path]):
            return self.not_followed(eqn, [table])
        own = tuple(axis for axis, _ in found)
        self.uses.setdefault(table.path, set()).add(("lookup", own))
        self.kinds.setdefault(table.path, "embedding")
        places = tuple(place for _, place in found)
        return Labels(self.produce(table.path, own, places, eqn.outvars[0].aval.ndim))

    def product(self, eqn: core.JaxprEqn, values: list[Any]) -> Any:
        """Activations times activations: those that are summed over, and all that meet, become one unit."""
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
        for other in sides[1:]:
            self.products.append(np.unique(np.concatenate([ids[ids >= 0], other[other >= 0]])))
            ids = self.join(ids, other)
        return Labels(ids)

    def concatenate(self, eqn: core.JaxprEqn, values: list[Any], axis: int, shapes: list[tuple[int, ...]]) -> Any:
        """Labels side by side; a parameter beside units, as a class token beside patches, is a bias of its own."""
        parts, single = [], []
        for shape, value in zip(shapes, values, strict=True):
            if shape[axis] == 0:
                continue
            ids = np.full((1,) * len(shape), -1)
            if isinstance(value, Weight):
                own = [(leaf, place) for place, leaf in enumerate(value.axes) if leaf is not None and place != axis]
                leaf_axes = tuple(leaf for leaf, place in own if shape[place] > 1)
                places = tuple(place for _, place in own if shape[place] > 1)
                if not places:
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
        if not parts:  # of no elements
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
    """A parameter as the vector that it is on an array of `ndim` axes; a scalar has none."""
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
        elif isinstance(value, Vector):
            paths.update(part.path for part in value.parts)
        elif isinstance(value, Derived):
            paths.update(value.paths)
    return frozenset(paths)
