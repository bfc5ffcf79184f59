"""Replaces units by editing the inner optimizer's updates."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from cbp_jax import units as units_lib
from cbp_jax.transforms import resample


def as_mask(chosen: chex.Array, size: int) -> chex.Array:
    """Bool [size] of unit numbers [k]; a number that is no unit marks none."""
    if chosen.size == 1:
        return jnp.arange(size) == chosen
    return jnp.zeros(size, bool).at[chosen].set(True, mode="drop")


def replaced_units(opt_state: optax.OptState) -> chex.Array:
    """How many units the last update replaced, whatever the optimizer state is nested in: float32 []."""
    masks = optax.tree_utils.tree_get_all_with_path(opt_state, "replaced")
    return sum(
        (jnp.sum(mask, dtype=jnp.float32) for mask in jax.tree.leaves([found for _, found in masks])),
        jnp.zeros([]),
    )


def _default_initializer(ndim: int, part: units_lib.ParamSlice) -> resample.Initializer:
    return _embedding(ndim, part.axes) if part.lookup else resample.he_uniform(ndim, part.axes)


@functools.cache
def _embedding(ndim: int, axes: tuple[int, ...]) -> resample.Initializer:
    others = tuple(axis for axis in range(ndim) if axis not in axes)
    return jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=axes, out_axis=others)


class Surgery(Mapping[str, Any]):
    """The parameters by path as they will be after this step, and the updates that take them there.

    Groups are treated from front to back: what `drop` has taken from the groups in front is 0 for those behind.

    Args:
      params: parameters by path, before the step.
      updates: the inner optimizer's updates by path.
    """

    def __init__(self, params: dict[str, chex.Array], updates: dict[str, chex.Array]):
        self.params = params
        self.updates = dict(updates)
        self.masks: dict[str, chex.Array] = {}  # bool, broadcastable: which entries are new, after `replace`
        self._dropped: dict[str, chex.Array] = {}  # bool, broadcastable: which entries are 0 so far

    def __getitem__(self, path: str) -> chex.Array:
        after = (self.params[path] + self.updates[path]).astype(self.params[path].dtype)
        return jnp.where(self._dropped[path], 0, after) if path in self._dropped else after

    def __iter__(self):
        return iter(self.updates)

    def __len__(self) -> int:
        return len(self.updates)

    def magnitude(self, part: units_lib.ParamSlice) -> chex.Array:
        """Sum of the absolute weights in each row of a slice, float32 [positions, units]."""
        # Dropped rows are left out by the weights of the sum, so that sums over rows and over columns of a kernel read
        # one and the same array.
        after = jnp.abs(self.params[part.path] + self.updates[part.path]).astype(jnp.float32)
        return part.sum(after, 1.0 - self._dropped[part.path] if part.path in self._dropped else None)

    def drop(self, group: units_lib.UnitGroup, replaced: chex.Array) -> None:
        """Counts the outgoing weights of replaced units [units] as 0 from here on."""
        for consumer in group.outgoing:
            mask = consumer.kernel.mask(replaced, self.params[consumer.kernel.path])
            self._dropped[consumer.kernel.path] = self._dropped.get(consumer.kernel.path, False) | mask

    def compensate(self, group: units_lib.UnitGroup, chosen: chex.Array, means: tuple[chex.Array, ...]) -> None:
        """Lets the biases of the consumers take over what the chosen units give on average.

        A consumer without bias whose mean is subtracted from its output needs none.

        Args:
          group: the group.
          chosen: int [k], units.
          means: mean activation of the units, [positions, units], for each distinct activation.
        """
        for consumer in group.outgoing:
            if consumer.bias is None and consumer.absorbed:
                continue
            kernel = consumer.kernel
            shape, columns = self.params[kernel.path].shape, kernel.columns(chosen)
            weights = kernel.rows_last(self[kernel.path]).at[..., columns].get(mode="fill", fill_value=0)
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
            bias = self.updates[consumer.bias]
            self.updates[consumer.bias] = bias + gone.astype(bias.dtype)

    def replace(
        self,
        groups: Sequence[units_lib.UnitGroup],
        chosen: Sequence[chex.Array],
        initializer: resample.Initializer | None,
        random_key: Callable[[], chex.PRNGKey],
    ) -> None:
        """Sets the updates such that chosen units start anew.

        Args:
          groups: all groups.
          chosen: for each group int [k], units, or the group's size for none.
          initializer: of incoming weights; None for `he_uniform` by each kernel's own layout, and for embeddings, of
            which an input picks one entry, for normal ones of variance 1 / units.
          random_key: makes the key of the draw.
        """
        chosen, fresh = self._draw(groups, chosen, initializer, random_key)
        masks = [as_mask(units, group.size) for units, group in zip(chosen, groups, strict=True)]
        for group, mask in zip(groups, masks, strict=True):
            for part in (*group.biases, *(consumer.kernel for consumer in group.outgoing)):
                self._set(part, mask, -self.params[part.path])
            for part in group.scales:
                self._set(part, mask, part.reset - self.params[part.path])
        # After all zeroing: a weight from one new unit to another ends resampled.
        for group, mask, units, columns in zip(groups, masks, chosen, fresh, strict=True):
            for part, column in zip(group.incoming, columns, strict=True):
                if column.shape[-1] == 1:
                    column = jnp.expand_dims(column.squeeze(-1), part.axes)
                    self._set(part, mask, column - self.params[part.path])
                else:
                    self._scatter(part, mask, units, column)

    def _draw(self, groups, chosen, initializer, random_key):
        """The chosen units and, for each group and incoming slice, fresh weights [other axes..., positions * k]."""
        parts = [(part, units.size) for group, units in zip(groups, chosen, strict=True) for part in group.incoming]

        def draw():
            keys = jax.random.split(random_key(), len(parts))
            columns = iter(
                resample.sample_units(
                    initializer or _default_initializer(self.params[part.path].ndim, part),
                    keys[number],
                    self.params[part.path].shape,
                    self.params[part.path].dtype,
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

        # Random bits are dear, and most steps replace nothing. The chosen units pass through the branch, so that the
        # loops over the weights below read them instead of computing them over again for every weight.
        firsts = [units[0] < group.size for units, group in zip(chosen, groups, strict=True)]
        return jax.lax.cond(jnp.any(jnp.stack(firsts)), draw, nothing)

    def _set(self, part: units_lib.ParamSlice, replaced: chex.Array, values: chex.Array) -> None:
        mask = part.mask(replaced, self.params[part.path])
        self.updates[part.path] = jnp.where(mask, values, self.updates[part.path])
        self.masks[part.path] = self.masks.get(part.path, False) | mask

    def _scatter(self, part, replaced, units, column):
        param, update = self.params[part.path], self.updates[part.path]
        rows = part.columns(units)
        flat = part.rows_last(update.astype(jnp.promote_types(update.dtype, param.dtype)))
        old = part.rows_last(param).at[..., rows].get(mode="fill", fill_value=0)
        flat = flat.at[..., rows].set(column - old, mode="drop")
        self.updates[part.path] = part.undo_rows_last(flat, param.shape)
        self.masks[part.path] = self.masks.get(part.path, False) | part.mask(replaced, param)
