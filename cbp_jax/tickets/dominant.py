r"""Dominant winning tickets: the few weights of a pre-trained network that fine-tuning has to change.

A network :math:`\theta_0` is fine-tuned to :math:`\theta`, preferably with a penalty :math:`\lambda \lVert \theta -
\theta_0 \rVert_1` (`cbp_jax.proximal_l1_init`). The ticket is where :math:`|\theta - \theta_0|` is large. It is
evaluated by the network with only these changes (`transplant`).

References:
  Gong et al., `Finding the dominant winning ticket in pre-trained language models
  <https://aclanthology.org/2022.findings-acl.115/>`_, Findings of ACL 2022
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cbp_jax.lora.adapter import kernel_axes
from cbp_jax.tickets.masks import check_mask
from cbp_jax.units.groups import join_path, leaves_by_path

Axis = Literal["row", "column", "both"]
_SIDES = {"row": ("row",), "column": ("column",), "both": ("row", "column")}


@functools.partial(jax.tree_util.register_dataclass, data_fields=("mask", "dimensions"), meta_fields=())
@dataclasses.dataclass(frozen=True, eq=False)
class Ticket:
    """The weights that fine-tuning has to change. A pytree, so that compiled functions take it.

    Attributes:
      mask: a bool tree like the params, true where a change is kept.
      dimensions: by the path of each matrix, the rows or columns that contain weights of the ticket, int array,
        ascending. If the axis is "both", a dict of "row" and "column" to these.
    """

    mask: Any
    dimensions: dict[str, Any]

    @property
    def density(self) -> float:
        """The fraction of all weights that are changed."""
        leaves = jax.tree.leaves(self.mask)
        return sum(int(np.count_nonzero(leaf)) for leaf in leaves) / sum(leaf.size for leaf in leaves)


def dominant_ticket(
    initial: optax.Params,
    tuned: optax.Params,
    *,
    threshold: float | None = None,
    keep: float | None = None,
    dimensions: int | None = None,
    axis: Axis = "row",
) -> Ticket:
    r"""Find where a network has changed most. Pass exactly one of `threshold`, `keep` and `dimensions`.

    It is computed on the host, in NumPy, and cannot be traced.

    Args:
      initial: :math:`\theta_0`, any tree of arrays.
      tuned: :math:`\theta`, of the same structure.
      threshold: selects all weights with :math:`|\theta - \theta_0|` above it, in every leaf (Algorithm 1 of Gong et
        al.).
      keep: selects exactly this number of weights (an int), or this fraction of all (a float), those of largest change
        over all leaves. Of equal changes the first ones are kept. If fewer weights have changed, others are selected
        too.
      dimensions: selects in every matrix this number of rows or columns, those whose changes have the largest L1 norm;
        all of them if a matrix has fewer. A matrix is a leaf of at least two axes that is not named "bias". Its rows
        are inputs and its columns outputs, as in `cbp_jax.lora.init` by default: the last axis is the output, so for
        Equinox, whose kernels are [out, in], rows are outputs. Other leaves are not selected then.
      axis: "row", "column", or "both", the union of that number of each.

    Returns:
      the ticket.

    Raises:
      ValueError: not exactly one of the three is given, or it is out of range; the trees differ or have no weights; a
        change is not a number.

    Example:
      >>> initial, tuned = {"w": jnp.zeros((2, 3))}, {"w": jnp.array([[0.0, 1.0, 0.0], [0.1, 0.0, 3.0]])}
      >>> ticket = dominant_ticket(initial, tuned, keep=2, axis="column")
      >>> ticket.mask["w"].tolist(), round(ticket.density, 2), ticket.dimensions["w"].tolist()
      ([[False, True, False], [False, False, True]], 0.33, [1, 2])
      >>> dominant_ticket(initial, tuned, dimensions=1).mask["w"].tolist()
      [[False, False, False], [True, True, True]]
    """
    given = {"threshold": threshold, "keep": keep, "dimensions": dimensions}
    if sum(value is not None for value in given.values()) != 1:
        raise ValueError(f"exactly one of threshold, keep and dimensions must be given, got {given}")
    if axis not in _SIDES:
        raise ValueError(f"axis must be 'row', 'column' or 'both', got {axis!r}")
    for name, value in given.items():
        if value is not None:
            _check_number(name, value, whole=name == "dimensions")
    changes = _changes(initial, tuned)
    if threshold is not None:
        masks = {path: change > threshold for path, change in changes.items()}
    elif keep is not None:
        masks = _largest(changes, keep)
    elif dimensions is not None:
        masks = {path: np.zeros(change.shape, bool) for path, change in changes.items()}
        for path, change in changes.items():
            if _is_matrix(path, change):
                masks[path] = _lines(path, change, dimensions, axis)
    found = {path: _dimensions_of(path, mask, axis) for path, mask in masks.items() if _is_matrix(path, mask)}
    mask = jax.tree.unflatten(jax.tree.structure(initial), [jnp.asarray(mask) for mask in masks.values()])
    return Ticket(mask, found)


def transplant(initial: optax.Params, tuned: optax.Params, mask: Any) -> optax.Params:
    r"""Return the initial network with only a ticket's changes, :math:`\theta_0 + m \odot (\theta - \theta_0)`.

    Args:
      initial: :math:`\theta_0`.
      tuned: :math:`\theta`.
      mask: :math:`m`, a bool tree like them, or the ticket.

    Returns:
      the params, in which every weight is bit for bit that of one of the two networks.

    Raises:
      ValueError: the mask is not bool, or the trees differ in structure or shapes.

    Example:
      >>> transplant(jnp.zeros(2), jnp.ones(2), jnp.array([True, False])).tolist()
      [1.0, 0.0]
    """
    mask = mask_of(mask)
    check_mask(mask, initial)
    _check_leaves("tuned", tuned, initial)
    return jax.tree.map(jnp.where, mask, tuned, initial)


def masked_changes(
    inner: optax.GradientTransformation, mask: Any, initial: optax.Params
) -> optax.GradientTransformation:
    """Train only a ticket: all other weights stay at their initial values.

    If they differ at first, they return to their initial values, up to rounding in the first step and exactly in the
    second.

    Args:
      inner: the optimizer. Outside of the ticket it sees gradients of 0.
      mask: a bool tree like the params, or the ticket.
      initial: the network with the values of all other weights.

    Returns:
      an optax transformation, whose state is that of `inner`. Its update needs the params.

    Raises:
      ValueError: the mask is not bool, or not of the structure and shapes of `initial`; in `update`, params are
        missing, or not of those shapes.

    Example:
      >>> tx = masked_changes(optax.sgd(0.5), jnp.array([True, False]), jnp.zeros(2))
      >>> params = jnp.zeros(2)
      >>> updates, _ = tx.update(jnp.ones(2), tx.init(params), params)
      >>> updates.tolist()
      [-0.5, 0.0]
    """
    inner = optax.with_extra_args_support(inner)
    # By path, since a wrapper may pass only some of the params.
    check_mask(mask_of(mask), initial)
    kept, start = leaves_by_path(mask_of(mask)), leaves_by_path(initial)

    def inside(key_path, grad):
        return jnp.where(kept[join_path(key_path)], grad, jnp.zeros_like(grad))

    def update_fn(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError("masked_changes needs the params: tx.update(grads, state, params), got params=None")
        for path, leaf in leaves_by_path(params).items():
            if path not in start or jnp.shape(leaf) != jnp.shape(start[path]):
                found = f"the shape {jnp.shape(start[path])}" if path in start else "nothing"
                raise ValueError(
                    f"initial must have {path!r} in the shape {jnp.shape(leaf)}, as the params, got {found}"
                )
        updates = jax.tree_util.tree_map_with_path(inside, updates)
        updates, state = inner.update(updates, state, params, **extra_args)

        def outside(key_path, update, param):
            path = join_path(key_path)
            return jnp.where(kept[path], update, start[path] - param).astype(update.dtype)

        return jax.tree_util.tree_map_with_path(outside, updates, params), state

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def mask_of(mask: Any) -> Any:
    """Return the mask of a ticket; a mask is returned as it is."""
    return mask.mask if isinstance(mask, Ticket) else mask


def _check_leaves(name: str, tree: Any, initial: optax.Params) -> None:
    """Raise unless a tree has the paths and shapes of the initial params."""
    shapes = [{path: jnp.shape(leaf) for path, leaf in leaves_by_path(one).items()} for one in (initial, tree)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{name} must have the leaves of initial, {shapes[0]}, got {shapes[1]}")


def _check_number(name: str, value: Any, whole: bool) -> None:
    kind = np.asarray(value).dtype if np.ndim(value) == 0 and not isinstance(value, str | bytes) else None
    numbers = np.integer if whole else np.number
    if kind is None or not np.issubdtype(kind, numbers) or np.issubdtype(kind, np.complexfloating) or not value >= 0:
        allowed = "a number of rows or columns" if whole else "a number of at least 0"
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def _changes(initial: optax.Params, tuned: optax.Params) -> dict[str, np.ndarray]:
    """Return absolute changes by path, on the host, in float32 or wider."""
    _check_leaves("tuned", tuned, initial)
    before, after = leaves_by_path(initial), leaves_by_path(tuned)
    if not sum(np.size(leaf) for leaf in before.values()):
        raise ValueError(f"initial must have weights, got {initial!r}")
    found = {}
    for path, leaf in before.items():
        wide = np.promote_types(np.asarray(leaf).dtype, np.float32)
        found[path] = np.abs(np.asarray(after[path]).astype(wide) - np.asarray(leaf).astype(wide))
        if np.isnan(found[path]).any():
            raise ValueError(f"tuned: some changes of {path!r} are not a number")
    return found


def _largest(changes: dict[str, np.ndarray], keep: float) -> dict[str, np.ndarray]:
    """Return the masks of exactly the given number of largest changes over all leaves; of equal changes the first."""
    every = np.concatenate([change.ravel() for change in changes.values()])
    whole = np.issubdtype(np.asarray(keep).dtype, np.integer)
    if not 0 <= keep <= (every.size if whole else 1):
        raise ValueError(f"keep must be a count up to {every.size}, or a fraction in [0, 1], got {keep}")
    count = int(keep) if whole else round(float(keep) * every.size)
    if count == 0:
        mask = np.zeros(every.size, bool)
    else:
        least = _kth_largest(every, count)
        mask = every > least
        equal = np.flatnonzero(every == least)
        mask[equal[: count - np.count_nonzero(mask)]] = True
    ends = np.cumsum([change.size for change in changes.values()])
    parts = np.split(mask, ends[:-1])
    return {path: part.reshape(changes[path].shape) for path, part in zip(changes, parts, strict=True)}


def _kth_largest(values: np.ndarray, k: int) -> Any:
    """Return the k-th largest of non-negative numbers. A partition would be slow because of the many ties after
    fine-tuning."""
    if values.dtype != np.float32:
        return np.partition(values, values.size - k)[values.size - k]
    bits, found = values.view(np.uint32), np.uint32(0)  # ordered like the numbers
    for shift in (16, 0):  # counts the upper halves, then the lower
        half = (bits >> np.uint32(shift)) & np.uint32(0xFFFF)
        above = np.cumsum(np.bincount(half, minlength=2**16)[::-1])
        place = int(np.searchsorted(above, k))
        chosen = 2**16 - 1 - place
        k -= int(above[place - 1]) if place else 0
        found |= np.uint32(chosen << shift)
        bits = bits[half == chosen]
    return np.asarray(found, np.uint32).view(np.float32)[()]


def _is_matrix(path: str, array: np.ndarray) -> bool:
    return array.ndim >= 2 and path.rpartition("/")[2] != "bias"


def _order(path: str, ndim: int) -> tuple[tuple[int, ...], int]:
    """Return the axes of a leaf, row axes first, and the number of row axes. A leaf of one axis is one row."""
    if ndim < 2:
        return tuple(range(ndim)), 0
    axes = kernel_axes(path, ndim)
    return (*axes.inputs, *axes.outputs), len(axes.inputs)


def as_matrix(path: str, array: np.ndarray) -> np.ndarray:
    """Return a leaf as a matrix of its input axes by its output axes."""
    order, count = _order(path, array.ndim)
    array = array.transpose(order)
    return array.reshape(int(np.prod(array.shape[:count])), -1)


def _lines(path: str, change: np.ndarray, count: int, axis: Axis) -> np.ndarray:
    """Return the mask of the rows or columns with the largest change."""
    order, _ = _order(path, change.ndim)
    matrix = as_matrix(path, change)
    mask = np.zeros(matrix.shape, bool)
    for side in _SIDES[axis]:
        size = matrix.sum(1 if side == "row" else 0, dtype=np.float64)
        chosen = np.argsort(-size, kind="stable")[: int(count)]
        if side == "row":
            mask[chosen] = True
        else:
            mask[:, chosen] = True
    return mask.reshape([change.shape[place] for place in order]).transpose(np.argsort(order))


def _dimensions_of(path: str, mask: np.ndarray, axis: Axis) -> Any:
    matrix = as_matrix(path, mask)
    found = {side: np.flatnonzero(matrix.any(1 if side == "row" else 0)) for side in ("row", "column")}
    return found if axis == "both" else found[axis]
