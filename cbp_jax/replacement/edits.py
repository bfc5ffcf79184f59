"""Reinitializes units: pure functions that take the updates of a step and return modified ones.

Replacing a weight is an update like any other: `fresh - param`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from cbp_jax import units as units_lib
from cbp_jax.numerics.periods import anywhere
from cbp_jax.replacement import reinitialization as reinitializations
from cbp_jax.replacement import resample
from cbp_jax.replacement.reinitialization import Fresh, NewUnits, Reinitialization
from cbp_jax.replacement.views import UpdatedParams

Arrays = dict[str, chex.Array]


def as_mask(chosen: chex.Array, size: int) -> chex.Array:
    """Convert unit numbers [k] to a mask, bool [size]. Numbers out of range mark no unit."""
    if chosen.size == 1:
        return jnp.arange(size) == chosen
    return jnp.zeros(size, bool).at[chosen].set(True, mode="drop")


def compensate(
    after: UpdatedParams, group: units_lib.UnitGroup, chosen: chex.Array, means: tuple[chex.Array, ...]
) -> Arrays:
    """Add the mean contribution of the chosen units to the biases of their consumers.

    A consumer whose output is centered afterwards, as by batch normalization, needs no such bias.

    Args:
      after: the parameters after this step.
      group: the group.
      chosen: int [k], units.
      means: mean activation of the units, [positions, units], for each distinct activation.

    Returns:
      the updates by path.
    """
    updates = dict(after.updates)
    for consumer in group.outgoing:
        if consumer.bias is None:
            if consumer.absorbed:
                continue
            raise ValueError(
                f"{consumer.kernel.path!r}, which reads group {group.name!r}, has no bias to take the mean activation"
            )
        kernel = consumer.kernel
        shape, columns = after.params[kernel.path].shape, kernel.columns(chosen)
        weights = kernel.rows_of(after[kernel.path], chosen).astype(jnp.float32)
        mean = means[consumer.operand].at[:, chosen].get(mode="fill", fill_value=0).ravel()
        others = [axis for axis in range(len(shape)) if axis not in kernel.axes]
        if set(consumer.bias_axes) <= set(others):
            gone = jnp.tensordot(weights, mean, 1)
        else:  # in a grouped convolution the rows of a unit lead to different outputs
            rows = jnp.zeros((*weights.shape[:-1], kernel.rows))
            gone = kernel.undo_rows_last(rows.at[..., columns].set(weights * mean, mode="drop"), shape)
            others = list(range(len(shape)))
        gone = gone.sum(tuple(place for place, axis in enumerate(others) if axis not in consumer.bias_axes))
        updates[consumer.bias] += gone.astype(updates[consumer.bias].dtype)
    return updates


class Seen(NamedTuple):
    """Inputs of a reinitialization besides the parameters; see `NewUnits`."""

    grads: Arrays
    initial: Arrays
    utilities: Sequence[chex.Array | None]  # of each group


def start_anew(
    params: Arrays,
    updates: Arrays,
    groups: Sequence[units_lib.UnitGroup],
    chosen: Sequence[chex.Array],
    initializer: resample.Initializer | None,
    random_key: Callable[[], chex.PRNGKey],
    reinitialization: Reinitialization = reinitializations.resample,
    seen: Seen | None = None,
) -> tuple[Arrays, Arrays]:
    """Change the updates so that the chosen units are reinitialized.

    Args:
      params: parameters by path.
      updates: the step's updates by path.
      groups: all groups.
      chosen: for each group int [k], units, or the group's size for none.
      initializer: of incoming weights. None stands for `he_uniform` with each kernel's own layout, and for embeddings,
        where an input selects one row, for a normal distribution of variance 1 / units.
      random_key: returns the key for the fresh weights.
      reinitialization: what replaced units start from.
      seen: its inputs; not needed where all weights are drawn.

    Returns:
      the updates; and by path a bool mask, broadcastable, of the entries that are new.

    Raises:
      ValueError: the reinitialization returns arrays of wrong shapes.
    """
    updates = dict(updates)
    masks: dict[str, chex.Array] = {}

    def put(part, rows, values):
        """Set the updates of the rows of masked units to values that broadcast to the array."""
        mask = part.mask(rows, params[part.path])
        updates[part.path] = jnp.where(mask, values, updates[part.path])
        masks[part.path] = masks.get(part.path, False) | mask

    def write(part, rows, units, column):
        """Set the rows of some units, given by mask and by number, to values [other axes..., positions * k]."""
        param, update = params[part.path], updates[part.path]
        if column.shape[-1] == 1:
            put(part, rows, jnp.expand_dims(column.squeeze(-1), part.axes) - param)
        else:
            updates[part.path] = _scatter(part, units, param, update, column)
            masks[part.path] = masks.get(part.path, False) | part.mask(rows, param)

    chosen, fresh = _fresh(params, updates, groups, chosen, initializer, random_key, reinitialization, seen)
    replaced = [as_mask(units, group.size) for units, group in zip(chosen, groups, strict=True)]
    for group, rows, units, new in zip(groups, replaced, chosen, fresh, strict=True):
        kernels = [consumer.kernel for consumer in group.outgoing]
        for part in kernels if new.kept is not None else ():
            param, update = params[part.path], updates[part.path]
            kept = part.along_axes(part.to_rows(new.kept, 1.0), param)
            updates[part.path] = jnp.where(kept == 1, update, (kept * (param + update) - param).astype(update.dtype))
        for parts, columns in ((group.biases, new.biases), (kernels, new.outgoing), (group.scales, new.scales)):
            for number, part in enumerate(parts):
                if columns is not None:
                    write(part, rows, units, columns[number])
                elif parts is group.scales:
                    put(part, rows, part.reset - params[part.path])
                else:
                    put(part, rows, -params[part.path])
    # After all outgoing weights, so that a weight between two new units is an incoming weight of the second.
    for group, rows, units, new in zip(groups, replaced, chosen, fresh, strict=True):
        for part, column in zip(group.incoming, new.incoming, strict=True):
            write(part, rows, units, column)
    return updates, masks


def _fresh(params, updates, groups, chosen, initializer, random_key, reinitialization, seen):
    """Return the chosen units of each group, and what they start from."""
    parts = [part for group in groups for part in group.incoming]
    seen = seen or Seen({}, {}, [None] * len(groups))

    def draw():
        key = random_key()
        keys = iter(jax.random.split(key, len(parts)))
        replaced = [as_mask(units, group.size) for units, group in zip(chosen, groups, strict=True)]
        after = UpdatedParams(params, updates)
        for group, mask in zip(groups, replaced, strict=True):
            after = after.without(group, mask)
        fresh = []
        for number, (group, units, mask) in enumerate(zip(groups, chosen, replaced, strict=True)):
            sample = functools.partial(_sample, params, groups, initializer, units.size)
            keys_here, other = tuple(next(keys) for _ in group.incoming), jax.random.fold_in(key, len(parts) + number)
            utility = seen.utilities[number]
            new = NewUnits(group, units, mask, after, seen.grads, seen.initial, utility, sample, keys_here, other)
            fresh.append(_checked(reinitialization, new, params))
        return list(chosen), fresh

    def nothing():
        none = [jnp.full_like(units, group.size) for units, group in zip(chosen, groups, strict=True)]
        _, fresh = jax.eval_shape(draw)
        zeros = jax.tree.map(lambda column: jnp.zeros(column.shape, column.dtype), fresh)
        ones = (None if new.kept is None else jnp.ones_like(new.kept) for new in zeros)
        return none, [new._replace(kept=kept) for new, kept in zip(zeros, ones, strict=True)]

    # Generating random bits is expensive, and most steps replace nothing. The chosen units are passed through the
    # branch, so that the loops over the weights below read them instead of recomputing them for every weight.
    some = jnp.any(jnp.stack([jnp.any(units < group.size) for units, group in zip(chosen, groups, strict=True)]))
    # Under vmap the draw runs in every step. Costlier reinitializations run only if some lane replaces a unit.
    some = some if reinitialization is reinitializations.resample else anywhere(some)
    return jax.lax.cond(some, draw, nothing)


def _sample(params, groups, initializer, count, part, key, outgoing):
    """Draw rows of a slice with the initializer, [other axes..., positions * count]."""
    shape, dtype = params[part.path].shape, params[part.path].dtype
    if initializer is None:
        initializer = (
            _default_of_readers(len(shape), part, groups) if outgoing else _default_initializer(len(shape), part)
        )
    return resample.sample_units(initializer, key, shape, dtype, part.axes, part.positions, count)


def _checked(reinitialization: Reinitialization, new: NewUnits, params: Arrays) -> Fresh:
    """Call the reinitialization, and cast what it returns to the parameters' types."""
    fresh, group = reinitialization(new), new.group
    name = getattr(reinitialization, "__name__", repr(reinitialization))
    if not isinstance(fresh, Fresh):
        raise ValueError(f"reinitialization {name} must return a Fresh, got {type(fresh).__name__}")
    parts = {
        "incoming": group.incoming,
        "outgoing": [consumer.kernel for consumer in group.outgoing],
        "biases": group.biases,
        "scales": group.scales,
    }
    checked: dict[str, Any] = {}
    for field, slices in parts.items():
        arrays = getattr(fresh, field)
        if arrays is None and field != "incoming":
            continue
        want = [part.shape_of_rows(params[part.path].shape, new.chosen.size) for part in slices]
        got = [jnp.shape(array) for array in arrays or ()]
        if got != want:
            raise ValueError(
                f"reinitialization {name} must give {field} of group {group.name!r} the shapes {want}, got {got}"
            )
        checked[field] = tuple(
            jnp.asarray(array, params[part.path].dtype) for array, part in zip(arrays, slices, strict=True)
        )
    if fresh.kept is not None and jnp.shape(fresh.kept) != (group.size,):
        raise ValueError(
            f"reinitialization {name} must give kept of group {group.name!r} the shape ({group.size},), "
            f"got {jnp.shape(fresh.kept)}"
        )
    return fresh._replace(**checked)


def _default_initializer(ndim: int, part: units_lib.ParamSlice) -> resample.Initializer:
    return _embedding(ndim, part.axes) if part.lookup else resample.he_uniform(ndim, part.axes)


def _default_of_readers(ndim: int, part: units_lib.ParamSlice, groups: Sequence[units_lib.UnitGroup]):
    """Return He et al.'s initializer for a kernel whose units lie along the slice's axes."""
    made = [other.axes for group in groups for other in group.incoming if other.path == part.path]
    rest = tuple(axis for axis in range(ndim) if axis not in part.axes)
    # The output layer has no units of its own. Its outputs are the last axis, as in all layers of Flax.
    return resample.he_uniform(ndim, made[0] if made else rest[-1:])


@functools.cache
def _embedding(ndim: int, axes: tuple[int, ...]) -> resample.Initializer:
    others = tuple(axis for axis in range(ndim) if axis not in axes)
    return jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=axes, out_axis=others)


def _scatter(part, units, param, update, column):
    """Return the updates that give the rows of several units fresh weights."""
    rows = part.columns(units)
    flat = part.rows_last(update.astype(jnp.promote_types(update.dtype, param.dtype)))
    old = part.rows_of(param, units)
    flat = flat.at[..., rows].set(column - old, mode="drop")
    return part.undo_rows_last(flat, param.shape)
