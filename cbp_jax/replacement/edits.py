"""Makes units start anew: pure functions that take the updates of a step and return others.

A unit that is drawn anew is an update like any other, `fresh - param`.
"""

import functools
from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp

from cbp_jax import units as units_lib
from cbp_jax.replacement import resample
from cbp_jax.replacement.views import UpdatedParams

Arrays = dict[str, chex.Array]


def as_mask(chosen: chex.Array, size: int) -> chex.Array:
    """Bool [size] of unit numbers [k]; a number that is no unit marks none."""
    if chosen.size == 1:
        return jnp.arange(size) == chosen
    return jnp.zeros(size, bool).at[chosen].set(True, mode="drop")


def compensate(
    after: UpdatedParams, group: units_lib.UnitGroup, chosen: chex.Array, means: tuple[chex.Array, ...]
) -> Arrays:
    """Lets the biases of the consumers take over what the chosen units give on average.

    A consumer without bias whose mean is subtracted from its output needs none.

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
        if consumer.bias is None and consumer.absorbed:
            continue
        kernel = consumer.kernel
        shape, columns = after.params[kernel.path].shape, kernel.columns(chosen)
        weights = kernel.rows_last(after[kernel.path]).at[..., columns].get(mode="fill", fill_value=0)
        weights = weights.astype(jnp.float32)
        mean = means[consumer.operand].at[:, chosen].get(mode="fill", fill_value=0).ravel()
        others = [axis for axis in range(len(shape)) if axis not in kernel.axes]
        if set(consumer.bias_axes) <= set(others):
            gone = jnp.tensordot(weights, mean, 1)
        else:  # in a grouped convolution the rows of a unit lead to different outputs
            rows = jnp.zeros((*weights.shape[:-1], kernel.rows))
            gone = kernel.undo_rows_last(rows.at[..., columns].set(weights * mean, mode="drop"), shape)
            others = range(len(shape))
        gone = gone.sum(tuple(place for place, axis in enumerate(others) if axis not in consumer.bias_axes))
        updates[consumer.bias] += gone.astype(updates[consumer.bias].dtype)
    return updates


def start_anew(
    params: Arrays,
    updates: Arrays,
    groups: Sequence[units_lib.UnitGroup],
    chosen: Sequence[chex.Array],
    initializer: resample.Initializer | None,
    random_key: Callable[[], chex.PRNGKey],
) -> tuple[Arrays, Arrays]:
    """Changes the updates such that chosen units start anew.

    Args:
      params: parameters by path.
      updates: the step's updates by path.
      groups: all groups.
      chosen: for each group int [k], units, or the group's size for none.
      initializer: of incoming weights; None for `he_uniform` by each kernel's own layout, and for embeddings, of
        which an input picks one entry, for normal ones of variance 1 / units.
      random_key: makes the key of the draw.

    Returns:
      the updates, and by path a bool mask, broadcastable: which entries are new.
    """
    updates, masks = dict(updates), {}

    def put(part, rows, values):
        """Sets the updates of a slice's rows, the units in a mask, to values that broadcast to the array."""
        mask = part.mask(rows, params[part.path])
        updates[part.path] = jnp.where(mask, values, updates[part.path])
        masks[part.path] = masks.get(part.path, False) | mask

    chosen, fresh = _draw(params, groups, chosen, initializer, random_key)
    replaced = [as_mask(units, group.size) for units, group in zip(chosen, groups, strict=True)]
    for group, units in zip(groups, replaced, strict=True):
        for part in (*group.biases, *(consumer.kernel for consumer in group.outgoing)):
            put(part, units, -params[part.path])
        for part in group.scales:
            put(part, units, part.reset - params[part.path])
    # After all zeroing: a weight from one new unit to another ends resampled.
    for group, mask, units, columns in zip(groups, replaced, chosen, fresh, strict=True):
        for part, column in zip(group.incoming, columns, strict=True):
            param, update = params[part.path], updates[part.path]
            if column.shape[-1] == 1:
                put(part, mask, jnp.expand_dims(column.squeeze(-1), part.axes) - param)
            else:
                updates[part.path] = _scatter(part, units, param, update, column)
                masks[part.path] = masks.get(part.path, False) | part.mask(mask, param)
    return updates, masks


def _draw(params, groups, chosen, initializer, random_key):
    """The chosen units and, for each group and incoming slice, fresh weights [other axes..., positions * k]."""
    parts = [(part, units.size) for group, units in zip(groups, chosen, strict=True) for part in group.incoming]

    def draw():
        keys = jax.random.split(random_key(), len(parts))
        columns = iter(
            resample.sample_units(
                initializer or _default_initializer(params[part.path].ndim, part),
                keys[number],
                params[part.path].shape,
                params[part.path].dtype,
                part.axes,
                part.positions,
                count,
            )
            for number, (part, count) in enumerate(parts)
        )
        return list(chosen), [[next(columns) for _ in group.incoming] for group in groups]

    def nothing():
        none = [jnp.full_like(units, group.size) for units, group in zip(chosen, groups, strict=True)]
        _, columns = jax.eval_shape(draw)
        return none, jax.tree.map(lambda column: jnp.zeros(column.shape, column.dtype), columns)

    # Generating random bits is expensive, and most steps replace nothing. The chosen units pass through the branch, so
    # that the loops over the weights below read them instead of computing them over again for every weight.
    some = [jnp.any(units < group.size) for units, group in zip(chosen, groups, strict=True)]
    return jax.lax.cond(jnp.any(jnp.stack(some)), draw, nothing)


def _default_initializer(ndim: int, part: units_lib.ParamSlice) -> resample.Initializer:
    return _embedding(ndim, part.axes) if part.lookup else resample.he_uniform(ndim, part.axes)


@functools.cache
def _embedding(ndim: int, axes: tuple[int, ...]) -> resample.Initializer:
    others = tuple(axis for axis in range(ndim) if axis not in axes)
    return jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=axes, out_axis=others)


def _scatter(part, units, param, update, column):
    """The updates where the rows of several units get fresh weights."""
    rows = part.columns(units)
    flat = part.rows_last(update.astype(jnp.promote_types(update.dtype, param.dtype)))
    old = part.rows_last(param).at[..., rows].get(mode="fill", fill_value=0)
    flat = flat.at[..., rows].set(column - old, mode="drop")
    return part.undo_rows_last(flat, param.shape)
