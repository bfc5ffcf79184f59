"""How single primitives carry labels and parameters from their operands to their outputs."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.extend import core

from cbp_jax import jaxprs
from cbp_jax.units.values import Derived, Labels, Vector, Weight

REDUCTIONS = frozenset("reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or argmax argmin".split())
# Primitives that only change the order or the shape of values.
REARRANGING = frozenset("transpose squeeze rev reshape broadcast_in_dim tile".split())
_WINDOWS = jaxprs.POOLING | {"reduce_window"}
_CUMULATIVE = frozenset("cumsum cumprod cummax cummin cumlogsumexp".split())
# Elementwise primitives with a scalar operand that map a kernel of zeros to zeros.
_SCALING = frozenset("convert_element_type copy copy_p neg mul div reduce_precision optimization_barrier".split())


def is_scalar_step(eqn: core.JaxprEqn, position: int) -> bool:
    """Return whether the other operands of an elementwise equation are scalar literals."""
    return all(
        isinstance(atom, core.Literal) and np.ndim(atom.val) == 0 for n, atom in enumerate(eqn.invars) if n != position
    )


def is_scaling(eqn: core.JaxprEqn, position: int) -> bool:
    """Return whether an equation multiplies the operand at `position` by a scalar."""
    if eqn.primitive.name not in _SCALING or (eqn.primitive.name == "div" and position == 1):
        return False
    return all(atom.aval.ndim == 0 for n, atom in enumerate(eqn.invars) if n != position)


def view_axes(eqn: core.JaxprEqn, axes: Sequence[int | None]) -> tuple[int | None, ...] | None:
    """Return the leaf's axes of a view after an equation; None if the output is not a view of the leaf.

    `axes` are the leaf's axes of the view before the equation.

    An axis that is sliced no longer corresponds to the leaf's.
    """
    name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
    if name == "transpose":
        return tuple(axes[axis] for axis in eqn.params["permutation"])
    if name == "squeeze":
        dropped = [axis % len(axes) for axis in eqn.params["dimensions"]]
        return tuple(axis for place, axis in enumerate(axes) if place not in dropped)
    if name == "broadcast_in_dim":
        made: list[int | None] = [None] * len(shape)
        for source, place in enumerate(eqn.params["broadcast_dimensions"]):
            if eqn.invars[0].aval.shape[source] == shape[place]:
                made[place] = axes[source]
        return tuple(made)
    if name == "tile":  # a repeated axis does not correspond to the leaf's axis
        return tuple(axis if times == 1 else None for axis, times in zip(axes, eqn.params["reps"], strict=True))
    if name in ("slice", "dynamic_slice"):
        whole = (a == b for a, b in zip(eqn.invars[0].aval.shape, shape, strict=True))
        return tuple(axis if same else None for axis, same in zip(axes, whole, strict=True))
    if name == "reshape" and eqn.params["dimensions"] is None:
        old = [(size, axis) for size, axis in zip(eqn.invars[0].aval.shape, axes, strict=True) if size != 1]
        if [size for size, _ in old] == [size for size in shape if size != 1]:
            rest = iter(axis for _, axis in old)
            return tuple(next(rest) if size != 1 else None for size in shape)
    return None


def lookup_axes(eqn: core.JaxprEqn, axes: Sequence[int | None]) -> tuple[int | None, ...] | None:
    """Do what `view_axes` does, for a gather: an axis that is taken as a whole stays, one that is indexed is lost."""
    numbers = eqn.params["dimension_numbers"]
    if numbers.operand_batching_dims:
        return None
    kept = [axis for axis in range(len(axes)) if axis not in numbers.collapsed_slice_dims]
    made: list[int | None] = [None] * eqn.outvars[0].aval.ndim
    for axis, place in zip(kept, numbers.offset_dims, strict=True):
        if eqn.params["slice_sizes"][axis] == eqn.invars[0].aval.shape[axis]:
            made[place] = axes[axis]
    return tuple(made)


def _gather_labels(eqn: core.JaxprEqn, ids: np.ndarray) -> np.ndarray | None:
    places = lookup_axes(eqn, range(ids.ndim))
    if places is None or any(size > 1 and axis not in places for axis, size in enumerate(ids.shape)):
        return None
    order = [axis for axis in places if axis is not None]
    dropped = tuple(axis for axis in range(ids.ndim) if axis not in order)
    kept = ids.squeeze(dropped)
    kept = kept.transpose(np.argsort(np.argsort(order)) if order else ())
    return kept.reshape([1 if axis is None else ids.shape[axis] for axis in places])


def _reshape_labels(eqn: core.JaxprEqn, ids: np.ndarray) -> np.ndarray | None:
    """Reshape labels, spreading them only over the axes that are split or joined."""
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


def _dynamic_slice_labels(eqn: core.JaxprEqn, ids: np.ndarray) -> np.ndarray | None:
    cut = zip(eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape, ids.shape, strict=True)
    return None if any(size > 1 and a != b for a, b, size in cut) else ids


def _pad_labels(eqn: core.JaxprEqn, ids: np.ndarray) -> np.ndarray | None:
    """Pad labels: elements padded along units belong to no unit, as in a shortcut to more channels."""
    config = [pad if size > 1 else (0, 0, 0) for pad, size in zip(eqn.params["padding_config"], ids.shape, strict=True)]
    if any(low < 0 or high < 0 or inside for low, high, inside in config):
        return None
    return np.pad(ids, [(low, high) for low, high, _ in config], constant_values=-1)


def _parallel_labels(eqn: core.JaxprEqn, ids: np.ndarray) -> np.ndarray | None:
    """Return the labels of a sum or maximum over devices, or over the axes that `vmap` turned them into."""
    axes = tuple(axis for axis in eqn.params["axes"] if isinstance(axis, int))
    return None if any(ids.shape[axis] > 1 for axis in axes) else ids.squeeze(axes)


def scatter_labels(eqn: core.JaxprEqn, ids: np.ndarray) -> np.ndarray | None:
    """Return the labels of an array into which updates with these labels are written; None if a window does not hold
    all units."""
    numbers, (operand, _, updates) = eqn.params["dimension_numbers"], (atom.aval.shape for atom in eqn.invars)
    windows = [axis for axis in range(len(operand)) if axis not in numbers.inserted_window_dims]
    if numbers.operand_batching_dims:
        return None
    places = dict(zip(numbers.update_window_dims, windows, strict=True))
    made = [1] * len(operand)
    for axis, size in enumerate(ids.shape):
        if size > 1:
            if axis not in places or updates[axis] != operand[places[axis]]:
                return None
            made[places[axis]] = size
    return ids.reshape(made)


def _tile_labels(eqn: core.JaxprEqn, ids: np.ndarray) -> np.ndarray:
    return np.tile(ids, [times if size > 1 else 1 for times, size in zip(eqn.params["reps"], ids.shape, strict=True)])


def split_labels(eqn: core.JaxprEqn, ids: np.ndarray) -> list[np.ndarray]:
    """Return the labels of the parts of a split."""
    axis = eqn.params["axis"]
    if ids.shape[axis] == 1:
        return [ids] * len(eqn.outvars)
    return np.split(ids, np.cumsum(eqn.params["sizes"])[:-1], axis)


def unstack_labels(eqn: core.JaxprEqn, ids: np.ndarray) -> list[np.ndarray]:
    """Return the labels of the arrays that an array is unstacked into."""
    axis = eqn.params["axis"]
    return [ids.take(number if ids.shape[axis] > 1 else 0, axis) for number in range(len(eqn.outvars))]


# If a rule returns None, the labels are not followed. The first operand is labeled, the others are not.
LABEL_RULES: dict[str, Callable[[core.JaxprEqn, np.ndarray], np.ndarray | None]] = {
    "transpose": lambda eqn, ids: ids.transpose(eqn.params["permutation"]),
    "squeeze": lambda eqn, ids: ids.squeeze(tuple(eqn.params["dimensions"])),
    "rev": lambda eqn, ids: np.flip(ids, tuple(eqn.params["dimensions"])),
    "reshape": _reshape_labels,
    "broadcast_in_dim": _broadcast_labels,
    "slice": _slice_labels,
    "dynamic_slice": _dynamic_slice_labels,
    "gather": _gather_labels,
    "pad": _pad_labels,
    "tile": _tile_labels,
    **dict.fromkeys(("psum", "pmax", "pmin"), _parallel_labels),
    **dict.fromkeys(REDUCTIONS, _reduce_labels),
    **dict.fromkeys(_WINDOWS, _window_labels),
    **dict.fromkeys(_CUMULATIVE, lambda eqn, ids: None if ids.shape[eqn.params["axis"]] > 1 else ids),
}


def rearranged(eqn: core.JaxprEqn, ids: np.ndarray) -> np.ndarray | None:
    """Return the labels of the output of an equation that only rearranges or selects elements of one operand."""
    name = eqn.primitive.name
    if name in REDUCTIONS and any(eqn.invars[0].aval.shape[axis] > 1 for axis in eqn.params["axes"]):
        return None
    if name in REARRANGING | REDUCTIONS | {"slice", "dynamic_slice", "gather"}:
        return LABEL_RULES[name](eqn, ids)
    return None


class KernelUse:
    """How one equation applies a kernel. If that is not understood, `reason` says why.

    Attributes:
      kernel, operand: positions of the kernel and of the array among the equation's operands.
      operand_axes, kernel_axes: the axes that are batched or summed over, matching each other.
      places: for each free axis of the kernel, the output's axis.
      groups: the number of groups of a grouped convolution.
    """

    def __init__(self, eqn: core.JaxprEqn, values: list[Any]):
        self.reason, self.groups = "", 1
        if eqn.primitive.name == "conv_general_dilated":
            self._convolution(eqn, values)
        else:
            self._product(eqn, values)

    def _convolution(self, eqn: core.JaxprEqn, values: list[Any]) -> None:
        spec = eqn.params["dimension_numbers"]
        if not isinstance(values[1], Weight):
            self.reason = "it is convolved with something that is not a parameter"
        elif eqn.params["batch_group_count"] != 1:
            self.reason = "convolutions grouped over the batch are not followed"
        self.kernel, self.operand = 1, 0
        out_kernel, in_kernel = spec.rhs_spec[:2]
        self.operand_axes, self.kernel_axes = (spec.lhs_spec[1],), (in_kernel,)
        self.places = {out_kernel: spec.out_spec[1]}
        self.groups = eqn.params["feature_group_count"]

    def _product(self, eqn: core.JaxprEqn, values: list[Any]) -> None:
        sides = [number for number, value in enumerate(values) if isinstance(value, Weight)]
        computed = [value for value in values if isinstance(value, Vector | Derived)]
        if len(sides) != 1 and computed:
            self.reason = "a kernel is computed, from other parameters or values, before it is applied"
            return
        if len(sides) != 1:
            self.reason = "its activations are multiplied with activations or with a kernel computed from other values"
            return
        self.kernel = sides[0]
        self.operand = 1 - self.kernel
        contracted, batch = eqn.params["dimension_numbers"]
        mine, other = self.kernel, self.operand
        # Batched axes are both read and written: each member of an ensemble uses its own entries.
        free = [axis for axis in range(len(values[mine].axes)) if axis not in (*contracted[mine], *batch[mine])]
        first = eqn.invars[other].aval.ndim - len(contracted[other]) if mine == 1 else len(batch[mine])
        places = [*enumerate(batch[mine]), *enumerate(free, first)]
        self.places = {axis: place for place, axis in places}
        self.operand_axes = (*batch[other], *contracted[other])
        self.kernel_axes = (*batch[mine], *contracted[mine])


def labeled(values: Sequence[Any]) -> list[Labels]:
    """Return the labeled values among these."""
    return [value for value in values if isinstance(value, Labels)]
