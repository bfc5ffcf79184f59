"""Finds the units of a network in its jaxpr.

Every element of every array is labelled with the unit that it stands for. The labels of an array are integers
of a shape that broadcasts to the array's, so that reshapes, transposes, concatenations and sums of arrays are
the same operations on their labels. A kernel that is contracted makes new labels along its free axes and, where it
contracts labelled values, reads them. What the walk does not understand leaves the labels it met out, with
the reason.
"""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.extend import core

from cbp_jax.units import groups, tracing

# Primitives that act element by element: each output element depends on the same element of every operand.
_ELEMENTWISE = frozenset(
    """abs acos acosh add and asin asinh atan atan2 atanh cbrt ceil clamp convert_element_type copy copy_p cos cosh
    digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le lgamma log log1p logistic lt
    max min mul name ne neg nextafter not optimization_barrier or pow real reduce_precision rem round rsqrt select_n
    sharding_constraint sign sin sinh sqrt square stop_gradient sub tan tanh xor""".split()
)
_REDUCTIONS = frozenset("reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or argmax argmin".split())
_WINDOWS = frozenset("reduce_window_max reduce_window_min reduce_window_sum reduce_window".split())
# Elementwise primitives that leave a kernel of zeros a kernel of zeros, the other operand being a scalar.
_SCALING = frozenset("convert_element_type copy copy_p neg mul div reduce_precision optimization_barrier".split())


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A parameter, perhaps cast, scaled, transposed or broadcast: the leaf's axis behind each axis, or None."""

    path: str
    axes: tuple[int | None, ...]
    plain: bool = True  # not scaled


@dataclasses.dataclass(frozen=True)
class _Derived:
    """A value computed from parameters alone or in ways that are not followed."""

    paths: frozenset[str]


@dataclasses.dataclass(frozen=True, eq=False)
class _Labels:
    """Units of an array's elements, broadcastable to its shape; -1 where an element is of no unit."""

    ids: np.ndarray


@dataclasses.dataclass
class Contraction:
    """A kernel applied to an array.

    Attributes:
      path: the kernel.
      in_axes: its axes that are summed over.
      out_axes: its axes that make the output.
      operand: the array it is applied to.
      operand_axes: the axes of that array that are summed over, matching `in_axes`.
      labels: the units of the operand's contracted elements, [in_axes...]; None if it carries none.
      out_places: the output's axes that `out_axes` make.
      plain: whether the kernel is applied as it is, not scaled.
      bias: path of a parameter that is added to the output as it is, and the kernel's axes that its axes stand for.
    """

    path: str
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    operand: core.Var
    operand_axes: tuple[int, ...]
    labels: np.ndarray | None
    out_places: tuple[int, ...]
    plain: bool
    bias: tuple[str, tuple[int, ...]] | None = None


class _UnionFind:
    def __init__(self):
        self.parent: list[int] = []

    def new(self, shape: tuple[int, ...]) -> np.ndarray:
        start, count = len(self.parent), int(np.prod(shape))
        self.parent.extend(range(start, start + count))
        return np.arange(start, start + count).reshape(shape)

    def find(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i

    def roots(self, ids: np.ndarray) -> np.ndarray:
        values, inverse = np.unique(ids, return_inverse=True)
        found = np.array([self.find(i) if i >= 0 else -1 for i in values.tolist()], int)
        return found[inverse].reshape(ids.shape)

    def union(self, a: np.ndarray, b: np.ndarray) -> None:
        a, b = np.broadcast_arrays(a, b)
        keep = (a != b) & (a >= 0) & (b >= 0)
        for i, j in set(zip(a[keep].tolist(), b[keep].tolist(), strict=True)):
            i, j = self.find(i), self.find(j)
            self.parent[max(i, j)] = min(i, j)


class Walk:
    """One pass over a traced network; `contractions` in forward order is what `with_features` needs of it."""

    def __init__(self, trace: tracing.Trace):
        self.contractions: list[Contraction] = []
        self.labels = _UnionFind()
        self.producers: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}  # kernel and free axes -> labels
        self.made_by: dict[core.Var, Contraction] = {}  # outputs of contractions, for their biases
        self.biases: list[tuple[str, tuple[int, ...], np.ndarray]] = []
        self.lost: list[tuple[np.ndarray, str]] = []  # labels that are left out, and why
        self.used_otherwise: dict[str, str] = {}  # parameters used in ways not followed
        self.uses: collections.Counter[str] = collections.Counter()  # of parameters, in ways that are followed
        jaxpr = trace.jaxpr.jaxpr
        self.shapes = {trace.param_paths[var]: var.aval.shape for var in jaxpr.invars if var in trace.param_paths}
        inputs = [
            _Weight(trace.param_paths[var], tuple(range(var.aval.ndim))) if var in trace.param_paths else None
            for var in jaxpr.invars
        ]
        for value in self.run(trace.jaxpr, inputs, nested=False):
            self.lose(value, "it is part of the network's output")

    def run(self, closed: core.ClosedJaxpr, inputs: list[Any], nested: bool) -> list[Any]:
        """Labels the outputs of a jaxpr whose inputs are labelled."""
        env: dict[core.Var, Any] = dict(zip(closed.jaxpr.invars, inputs, strict=True))

        def read(atom):
            return None if isinstance(atom, core.Literal) else env.get(atom)

        for eqn in tracing.live_equations(closed.jaxpr):
            values = [read(atom) for atom in eqn.invars]
            if all(value is None for value in values):
                continue
            body = tracing.call_body(eqn)
            if body is not None:
                results = self.run(body, values, nested=True)
            elif len(eqn.outvars) == 1 and not (nested and eqn.primitive.name in tracing.CONTRACTIONS):
                results = [self.step(eqn, values)]
            else:
                results = [self.not_followed(eqn, values)] * len(eqn.outvars)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in closed.jaxpr.outvars]

    def step(self, eqn: core.JaxprEqn, values: list[Any]) -> Any:
        """Labels the output of one equation."""
        name = eqn.primitive.name
        if name in tracing.CONTRACTIONS:
            return self.contraction(eqn, values)
        if any(isinstance(value, _Labels) for value in values):
            if name in _ELEMENTWISE:
                return self.elementwise(eqn, values)
            if name == "concatenate":
                return self.concatenate(eqn, values)
            rule = _LABEL_RULES.get(name)
            rest = values[1:]
            if rule is None or any(isinstance(value, _Labels) for value in rest):
                return self.not_followed(eqn, values)
            ids = rule(eqn, values[0].ids)
            return self.not_followed(eqn, values) if ids is None else _Labels(ids)
        weights = [value for value in values if value is not None]
        if len(weights) == 1 and isinstance(weights[0], _Weight):
            axes = _view_axes(eqn, values)
            if axes is not None:
                return _Weight(weights[0].path, axes, weights[0].plain and name not in ("mul", "div", "neg"))
        return self.not_followed(eqn, values)

    def not_followed(self, eqn: core.JaxprEqn, values: list[Any], reason: str | None = None) -> Any:
        """Leaves every labelled operand out and marks parameters as used in another way."""
        reason = reason or f"its activations pass through `{eqn.primitive.name}`, which is not followed"
        for value in values:
            self.lose(value, reason)
        paths = _paths(values)
        for path in paths:
            self.used_otherwise.setdefault(path, eqn.primitive.name)
        labelled = any(isinstance(value, _Labels) for value in values)
        return _Derived(paths) if paths and not labelled else None

    def lose(self, value: Any, reason: str) -> None:
        """Leaves the units of a value out."""
        if isinstance(value, _Labels):
            self.lost.append((np.unique(value.ids[value.ids >= 0]), reason))

    def elementwise(self, eqn: core.JaxprEqn, values: list[Any]) -> Any:
        """Units that meet in one element become one unit; a parameter that is added to them is their bias."""
        ids = None
        for value in values:
            if isinstance(value, _Labels):
                if ids is not None:
                    self.labels.union(ids, value.ids)
                    a, b = np.broadcast_arrays(ids, value.ids)
                    ids = np.where(a >= 0, a, b)
                else:
                    ids = value.ids
        for position, value in enumerate(values):
            if isinstance(value, _Derived):
                return self.not_followed(
                    eqn,
                    values,
                    f"its activations meet a value computed from {', '.join(sorted(value.paths))}",
                )
            if isinstance(value, _Weight):
                varying = [axis for axis, size in enumerate(ids.shape) if size > 1] or list(range(ids.ndim))
                offset = len(ids.shape) - len(value.axes)
                own = [a for a in varying if a >= offset and value.axes[a - offset] is not None]
                self.uses[value.path] += 1
                if not own:
                    continue  # a parameter shared by all units
                if eqn.primitive.name not in ("add", "sub"):
                    return self.not_followed(
                        eqn,
                        values,
                        f"its activations meet the parameter {value.path} in `{eqn.primitive.name}`",
                    )
                self.bias(eqn, position, value, ids)
        return _Labels(ids)

    def bias(self, eqn: core.JaxprEqn, position: int, weight: _Weight, ids: np.ndarray) -> None:
        """Records that `weight` is added to units, and to which contraction's output."""
        offset = ids.ndim - len(weight.axes)
        kept = [axis for axis in range(len(weight.axes)) if weight.axes[axis] is not None]
        other = tuple(a for a in range(ids.ndim) if a - offset not in kept)
        merged = self.merge(ids, other)  # one bias for several units makes them one unit
        full = np.broadcast_to(merged, [self.shapes[weight.path][weight.axes[a]] for a in kept])
        self.biases.append((weight.path, tuple(weight.axes[a] for a in kept), full))
        source = eqn.invars[1 - position]
        made = self.made_by.get(source) if isinstance(source, core.Var) else None
        if made is None or made.bias is not None or not (made.plain and weight.plain) or eqn.primitive.name != "add":
            return
        # The bias of a kernel: its axes are those that the kernel makes, in the kernel's order.
        kernel_axis = dict(zip(made.out_places, made.out_axes, strict=True))
        leaf_axis = {weight.axes[a]: kernel_axis.get(a + offset) for a in kept}
        axes = [leaf_axis.get(axis) for axis in range(len(self.shapes[weight.path]))]
        if None not in axes and len(axes) == len(kernel_axis) and axes == sorted(axes):
            made.bias = (weight.path, tuple(axes))

    def merge(self, ids: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
        """Makes one unit of those that differ only along `axes`, which share weights, and drops these axes."""
        for axis in axes:
            whole = ids
            ids = whole.max(axis, keepdims=True)
            self.labels.union(ids, whole)
            mixed = np.broadcast_to((whole < 0).any(axis, keepdims=True) & (ids >= 0), ids.shape)
            if mixed.any():
                self.lost.append((np.unique(ids[mixed]), "it shares weights with values that are not units"))
        return ids.squeeze(axes)

    def contraction(self, eqn: core.JaxprEqn, values: list[Any]) -> Any:
        """A kernel reads labelled units, if its operand has them, and makes new ones."""
        spec = _contraction_spec(eqn, values)
        if isinstance(spec, str):
            return self.not_followed(eqn, values, spec)
        weight, value, operand, operand_axes, kernel_axes, out_positions = spec
        in_axes = tuple(weight.axes[axis] for axis in kernel_axes)
        out_axes = tuple(weight.axes[axis] for axis in out_positions)
        if any(axis is None for axis in (*in_axes, *out_axes)):
            return self.not_followed(eqn, values, f"the kernel {weight.path} is broadcast before it is used")
        labels = None
        if isinstance(value, _Labels):
            order = (*operand_axes, *(a for a in range(value.ids.ndim) if a not in operand_axes))
            ids = value.ids.transpose(order)
            ids = self.merge(ids, tuple(range(len(operand_axes), ids.ndim)))
            labels = np.broadcast_to(ids, [operand.aval.shape[axis] for axis in operand_axes])
        elif isinstance(value, _Weight):
            return self.not_followed(eqn, values, f"the kernel {weight.path} is applied to other parameters")
        places = tuple(out_positions.values())
        made = Contraction(weight.path, in_axes, out_axes, operand, operand_axes, labels, places, weight.plain)
        self.contractions.append(made)
        self.uses[weight.path] += 1
        self.made_by[eqn.outvars[0]] = made
        key = (weight.path, out_axes)
        if key not in self.producers:
            self.producers[key] = self.labels.new([self.shapes[weight.path][axis] for axis in out_axes])
        shape = [1] * eqn.outvars[0].aval.ndim
        for axis, place in zip(out_axes, places, strict=True):
            shape[place] = self.shapes[weight.path][axis]
        order = np.argsort(places)
        return _Labels(self.producers[key].transpose(order).reshape(shape))

    def concatenate(self, eqn: core.JaxprEqn, values: list[Any]) -> Any:
        """Labels side by side."""
        axis = eqn.params["dimension"]
        parts = []
        for atom, value in zip(eqn.invars, values, strict=True):
            if isinstance(value, _Weight | _Derived):
                return self.not_followed(eqn, values)
            ids = value.ids if value is not None else np.full((1,) * atom.aval.ndim, -1)
            shape = list(ids.shape)
            shape[axis] = atom.aval.shape[axis]
            parts.append(np.broadcast_to(ids, shape))
        shape = np.broadcast_shapes(*(np.take(part, [0], axis).shape for part in parts))
        whole = [np.broadcast_to(p, (*shape[:axis], p.shape[axis], *shape[axis + 1 :])) for p in parts]
        return _Labels(np.concatenate(whole, axis))


def _paths(values: list[Any]) -> frozenset[str]:
    paths = [{value.path} if isinstance(value, _Weight) else value.paths for value in values
             if isinstance(value, _Weight | _Derived)]  # fmt: skip
    return frozenset().union(*paths)


def _contraction_spec(eqn: core.JaxprEqn, values: list[Any]) -> Any:
    """Which operand is the kernel and how its axes are used, or the reason why that is not understood."""
    name = eqn.primitive.name
    if name == "conv_general_dilated":
        spec = eqn.params["dimension_numbers"]
        if not isinstance(values[1], _Weight):
            return "it is convolved with something that is not a parameter"
        if eqn.params["feature_group_count"] != 1 or eqn.params["batch_group_count"] != 1:
            return "grouped convolutions are not followed"
        out_kernel, in_kernel = spec.rhs_spec[:2]
        operand_axes = (spec.lhs_spec[1],)
        return values[1], values[0], eqn.invars[0], operand_axes, (in_kernel,), {out_kernel: spec.out_spec[1]}
    sides = [number for number, value in enumerate(values) if isinstance(value, _Weight)]
    if len(sides) != 1:
        return "its activations are multiplied with activations or with a kernel computed from other values"
    kernel = sides[0]
    contracted, batch = eqn.params["dimension_numbers"]
    if batch[0]:
        return f"the kernel {values[kernel].path} is used in a batched product"
    operand = eqn.invars[1 - kernel]
    free = [axis for axis in range(len(values[kernel].axes)) if axis not in contracted[kernel]]
    first = operand.aval.ndim - len(contracted[1 - kernel]) if kernel == 1 else 0
    places = {axis: first + number for number, axis in enumerate(free)}
    operand_axes, kernel_axes = tuple(contracted[1 - kernel]), tuple(contracted[kernel])
    return values[kernel], values[1 - kernel], operand, operand_axes, kernel_axes, places


def _view_axes(eqn: core.JaxprEqn, values: list[Any]) -> tuple[int | None, ...] | None:
    """The leaf's axes behind the output of an equation on one parameter, None if it is no view of it."""
    number = next(n for n, value in enumerate(values) if value is not None)
    weight, name, shape = values[number], eqn.primitive.name, eqn.outvars[0].aval.shape
    if name in _SCALING and all(atom.aval.ndim == 0 for n, atom in enumerate(eqn.invars) if n != number):
        return None if name == "div" and number == 1 else weight.axes
    if number != 0:
        return None
    if name == "transpose":
        return tuple(weight.axes[axis] for axis in eqn.params["permutation"])
    if name == "squeeze":
        dropped = [axis % len(weight.axes) for axis in eqn.params["dimensions"]]
        return tuple(axis for place, axis in enumerate(weight.axes) if place not in dropped)
    if name == "broadcast_in_dim":
        axes: list[int | None] = [None] * len(shape)
        for source, place in enumerate(eqn.params["broadcast_dimensions"]):
            if eqn.invars[0].aval.shape[source] == shape[place]:
                axes[place] = weight.axes[source]
        return tuple(axes)
    if name == "reshape" and eqn.params["dimensions"] is None:
        old = [(size, axis) for size, axis in zip(eqn.invars[0].aval.shape, weight.axes, strict=True) if size != 1]
        new = [size for size in shape if size != 1]
        if [size for size, _ in old] == new:
            rest = iter(axis for _, axis in old)
            return tuple(next(rest) if size != 1 else None for size in shape)
    return None


def _reshape_labels(eqn: core.JaxprEqn, ids: np.ndarray) -> np.ndarray | None:
    """Reshapes labels, spreading them only over the axes that are split or joined."""
    if eqn.params["dimensions"] is not None:
        return None
    old, new = list(eqn.invars[0].aval.shape), list(eqn.outvars[0].aval.shape)
    if 0 in old:
        return None
    pieces_old, pieces_new = [], []
    i = j = 0
    while i < len(old) or j < len(new):  # cut both shapes into the smallest pieces of equal size
        a, b = i, j
        size_a = size_b = 1
        while True:
            if i < len(old) and (size_a <= size_b or j == len(new)):
                size_a, i = size_a * old[i], i + 1
            elif j < len(new):
                size_b, j = size_b * new[j], j + 1
            if size_a == size_b and (i > a or i == len(old)) and (j > b or j == len(new)):
                break
        pieces_old.append((a, i))
        pieces_new.append((b, j))
    shape_old, shape_new = list(ids.shape), [1] * len(new)
    for (a, i), (b, j) in zip(pieces_old, pieces_new, strict=True):
        if any(size > 1 for size in ids.shape[a:i]):
            shape_old[a:i], shape_new[b:j] = old[a:i], new[b:j]
    return np.broadcast_to(ids, shape_old).reshape(shape_new)


def _reduce_labels(eqn: core.JaxprEqn, ids: np.ndarray) -> np.ndarray | None:
    axes = tuple(eqn.params["axes"])
    return None if any(ids.shape[axis] > 1 for axis in axes) else ids.squeeze(axes)


def _window_labels(eqn: core.JaxprEqn, ids: np.ndarray) -> np.ndarray | None:
    params = eqn.params
    for axis, size in enumerate(ids.shape):
        whole = (params["window_dimensions"][axis], params["window_strides"][axis], *params["padding"][axis])
        if size > 1 and whole != (1, 1, 0, 0):
            return None
    return ids


def _broadcast_labels(eqn: core.JaxprEqn, ids: np.ndarray) -> np.ndarray:
    shape = [1] * len(eqn.params["shape"])
    for source, place in enumerate(eqn.params["broadcast_dimensions"]):
        shape[place] = ids.shape[source]
    return ids.reshape(shape)


def _slice_labels(eqn: core.JaxprEqn, ids: np.ndarray) -> np.ndarray:
    params = eqn.params
    strides = params["strides"] or (1,) * ids.ndim
    cuts = zip(params["start_indices"], params["limit_indices"], strides, ids.shape, strict=True)
    return ids[tuple(slice(a, b, step) if size > 1 else slice(None) for a, b, step, size in cuts)]


def _pad_labels(eqn: core.JaxprEqn, ids: np.ndarray) -> np.ndarray | None:
    config = eqn.params["padding_config"]
    if any(size > 1 and tuple(pad) != (0, 0, 0) for pad, size in zip(config, ids.shape, strict=True)):
        return None
    return ids


_LABEL_RULES: dict[str, Callable[[core.JaxprEqn, np.ndarray], np.ndarray | None]] = {
    "transpose": lambda eqn, ids: ids.transpose(eqn.params["permutation"]),
    "squeeze": lambda eqn, ids: ids.squeeze(tuple(eqn.params["dimensions"])),
    "rev": lambda eqn, ids: np.flip(ids, tuple(eqn.params["dimensions"])),
    "reshape": _reshape_labels,
    "broadcast_in_dim": _broadcast_labels,
    "slice": _slice_labels,
    "pad": _pad_labels,
    **dict.fromkeys(_REDUCTIONS, _reduce_labels),
    **dict.fromkeys(_WINDOWS, _window_labels),
}


def discover_units(apply_fn: Callable[..., Any], params: Any, *example_inputs: Any) -> groups.Units:
    """Finds the groups of units that can be replaced in a network.

    The function is traced, not run. A unit is whatever a kernel makes along its free axis: its *incoming* weights
    are that column, and its *outgoing* weights are the rows of the kernels that contract the array it ends up
    in, however many elementwise maps, poolings, dropouts, transposes and reshapes lie between.

    Args:
      apply_fn: `apply_fn(params, *inputs) -> outputs`, any function that JAX can trace: `flax_model.apply`, a
        function that merges an NNX graph, bare JAX.
      params: pytree of arrays (or of `jax.ShapeDtypeStruct`).
      *example_inputs: arrays (or `jax.ShapeDtypeStruct`) of the shapes that the network takes.

    Returns:
      the groups in forward order, a tuple of `UnitGroup` that prints as a table. Its `left_out` names each layer
      that is no group, with the reason: the output layer, or a construct that is not understood.

    Raises:
      ValueError: there is no group; the message names what was left out and why.

    Example:
      >>> import jax.numpy as jnp
      >>> def apply(params, x):
      ...   return jnp.maximum(x @ params["w1"] + params["b1"], 0) @ params["w2"]
      >>> params = {"w1": jnp.ones((4, 3)), "b1": jnp.zeros(3), "w2": jnp.ones((3, 2))}
      >>> print(discover_units(apply, params, jnp.ones((1, 4))))
      group  size  incoming  bias  outgoing
      w1        3  w1        b1    w2
      left out: w2 (2 units): it is part of the network's output
    """
    if not callable(apply_fn):
        raise TypeError(f"apply_fn must be a function of (params, *inputs); found {type(apply_fn).__name__}")
    walk = Walk(tracing.trace_network(apply_fn, params, *example_inputs))
    return _build(walk)


def _build(walk: Walk) -> groups.Units:
    """Cuts the labels into groups: kernels whose units were made one belong together."""
    roots = {key: walk.labels.roots(ids).ravel() for key, ids in walk.producers.items()}
    names = _layer_names([path for path, _ in roots])
    owner: dict[int, int] = {}  # root -> number of its group
    members: list[list[tuple[str, tuple[int, ...]]]] = []
    for key, ids in roots.items():
        met = sorted({owner[root] for root in ids.tolist() if root in owner})
        number = met[0] if met else len(members)
        if not met:
            members.append([])
        for other in met[1:]:
            members[number] += members[other]
            members[other] = []
            owner = {root: number if group == other else group for root, group in owner.items()}
        members[number].append(key)
        owner.update(dict.fromkeys(ids.tolist(), number))

    lost: dict[int, str] = {}
    for ids, reason in walk.lost:
        for root in walk.labels.roots(ids).tolist():
            lost.setdefault(owner[root], reason)
    found, left_out = [], []
    for number, keys in enumerate(members):
        if not keys:
            continue
        units = list(dict.fromkeys(root for key in keys for root in roots[key].tolist()))
        name = names[keys[0][0]]
        try:
            if number in lost:
                raise _LeaveOut(lost[number])
            if len(units) == 1 and sum(roots[key].size for key in keys) > len(keys):
                raise _LeaveOut("all its columns are one unit: they share weights or are mixed element by element")
            group = _group(walk, name, units, keys)
            for part in group.slices():
                if walk.uses[part.path] > 1:
                    raise _LeaveOut(f"{part.path} is used more than once")
                if part.path in walk.used_otherwise:
                    raise _LeaveOut(f"{part.path} is also used in `{walk.used_otherwise[part.path]}`")
            found.append(group)
        except _LeaveOut as reason:
            left_out.append(groups.LeftOut(name, len(units), str(reason)))
    # Kernels that never made labels were met in equations that are not followed.
    made = {path for path, _ in roots}
    for path, primitive in walk.used_otherwise.items():
        if path not in made and len(walk.shapes[path]) > 1:
            reason = f"{path} is used in `{primitive}`, which is not followed"
            left_out.append(groups.LeftOut(path, walk.shapes[path][-1], reason))
    if not found:
        reasons = "; ".join(f"{item.name}: {item.reason}" for item in left_out)
        raise ValueError(f"no units can be replaced in this network: {reasons or 'it applies no kernel'}")
    return groups.Units(found, left_out)


class _LeaveOut(Exception):
    """The group at hand is left out; the message says why."""


def _group(walk: Walk, name: str, units: list[int], keys: list[tuple[str, tuple[int, ...]]]) -> groups.UnitGroup:
    number = {root: unit for unit, root in enumerate(units)}

    def part(path: str, axes: tuple[int, ...], ids: np.ndarray) -> groups.ParamSlice | None:
        unit_of_row = np.array([number.get(root, -1) for root in walk.labels.roots(ids).ravel().tolist()])
        counts = np.bincount(unit_of_row[unit_of_row >= 0], minlength=len(units))
        if counts.max() == 0:
            return None
        if counts.min() != counts.max():
            raise _LeaveOut(f"its units own different numbers of rows of {path}")
        order = np.argsort(unit_of_row, kind="stable")[np.count_nonzero(unit_of_row < 0) :]
        return groups.ParamSlice(path, axes, order.reshape(len(units), -1).T, unit_of_row.size)

    incoming = [part(path, axes, walk.producers[path, axes]) for path, axes in keys]
    biases = [found for path, axes, ids in walk.biases if (found := part(path, axes, ids)) is not None]
    outgoing, operands = [], {}
    for contraction in walk.contractions:
        if contraction.labels is None:
            continue
        kernel = part(contraction.path, contraction.in_axes, contraction.labels)
        if kernel is not None:
            operand = operands.setdefault((contraction.operand, contraction.operand_axes), len(operands))
            bias, bias_axes = contraction.bias or (None, ())
            if bias is not None and (walk.uses[bias] > 1 or bias in walk.used_otherwise):
                bias, bias_axes = None, ()
            outgoing.append(groups.Consumer(kernel, bias, bias_axes, operand))
    if not outgoing:
        raise _LeaveOut("no kernel reads it")
    return groups.UnitGroup(name, len(units), tuple(incoming), tuple(biases), tuple(outgoing))


def _layer_names(paths: list[str]) -> dict[str, str]:
    """The path of the layer of each kernel; the kernel's own where its layer holds several."""
    layers = {path: path.removesuffix("/value").rpartition("/")[0] for path in paths}
    counts: dict[str, int] = {}
    for layer in layers.values():
        counts[layer] = counts.get(layer, 0) + 1
    return {path: layer if layer and counts[layer] == 1 else path for path, layer in layers.items()}
