"""The input of a policy or a utility: one group of units at one step."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import chex
import jax.numpy as jnp

from cbp_jax import units as units_lib


@dataclasses.dataclass(frozen=True, eq=False)
class UpdatedParams(Mapping[str, chex.Array]):
    """The parameters by path as they will be after this step.

    Attributes:
      params: parameters by path, before the step.
      updates: the inner optimizer's updates by path.
      dropped: by path a bool mask, broadcastable, of weights that count as 0.
    """

    params: dict[str, chex.Array]
    updates: dict[str, chex.Array]
    dropped: dict[str, chex.Array] = dataclasses.field(default_factory=dict)

    def __getitem__(self, path: str) -> chex.Array:
        after = (self.params[path] + self.updates[path]).astype(self.params[path].dtype)
        return jnp.where(self.dropped[path], 0, after) if path in self.dropped else after

    def __iter__(self) -> Iterator[str]:
        return iter(self.updates)

    def __len__(self) -> int:
        return len(self.updates)

    def magnitude(self, part: units_lib.ParamSlice) -> chex.Array:
        """Return the sum of the absolute weights in each row of a slice, float32 [positions, units]."""
        # Dropped rows get the factor 0 in the sum, so that sums over rows and over columns of a kernel read the same
        # array.
        after = jnp.abs(self.params[part.path] + self.updates[part.path]).astype(jnp.float32)
        return part.sum(after, (~self.dropped[part.path]).astype(jnp.float32) if part.path in self.dropped else None)

    def with_updates(self, updates: dict[str, chex.Array]) -> "UpdatedParams":
        """Return the same with other updates."""
        return dataclasses.replace(self, updates=updates)

    def without(self, group: units_lib.UnitGroup, replaced: chex.Array) -> "UpdatedParams":
        """Return the same where the outgoing weights of the replaced units, bool [units], count as 0."""
        dropped = dict(self.dropped)
        for consumer in group.outgoing:
            path = consumer.kernel.path
            dropped[path] = dropped.get(path, False) | consumer.kernel.mask(replaced, self.params[path])
        return dataclasses.replace(self, dropped=dropped)


@dataclasses.dataclass(frozen=True, eq=False)
class GroupView:
    """The input of a policy or a utility: one group at one step.

    Attributes:
      group: the group.
      captured: what the caller passed as `features`. Use the property `features` instead.
      params: arrays by path: the parameters after the inner update. Outgoing weights of units that were replaced in
        earlier groups are 0.
      grads: arrays by path: the gradients of this step.
      key: a typed key of this group and step.
      count: int32 [], the number of this update, from 1.
      mean_activation: running means of the features, bias-corrected, each [positions, units], if the policy keeps them.
      hessian_diag: arrays by path: the diagonal of the loss's Hessian, if the caller passed it.
    """

    group: units_lib.UnitGroup
    captured: units_lib.Features | None
    params: UpdatedParams
    grads: Mapping[str, chex.Array]
    key: chex.PRNGKey
    count: chex.Array
    mean_activation: tuple[chex.Array, ...] = ()
    hessian_diag: Mapping[str, chex.Array] | None = None

    @functools.cached_property
    def features(self) -> tuple[chex.Array, ...]:
        """The group's activations on this batch.

        One array [..., units] or, where positions have outgoing weights of their own, [..., positions, units], for each
        distinct activation that the group's consumers read.

        Raises:
          ValueError: the caller passed no features, or features of wrong shapes.
        """
        return group_activations(self.group, self.captured)

    def magnitude(self, part: units_lib.ParamSlice) -> chex.Array:
        """Return the sum of the absolute weights in each row of a slice, float32 [positions, units]."""
        return self.params.magnitude(part)

    def outgoing_magnitude(self) -> chex.Array:
        """Return the sum of each unit's absolute outgoing weights, [units]."""
        return sum(self.magnitude(consumer.kernel).sum(0) for consumer in self.group.outgoing)

    def incoming_magnitude(self) -> chex.Array:
        """Return the sum of each unit's absolute incoming weights, biases left out, [units]."""
        return sum(self.magnitude(part).sum(0) for part in self.group.incoming)

    def incoming_gradient(self) -> chex.Array:
        """Sum of the absolute gradients of each unit's incoming weights, biases left out, float32 [units]."""
        gradient = lambda part: jnp.abs(self.grads[part.path].astype(jnp.float32))
        return sum(part.sum(gradient(part)).sum(0) for part in self.group.incoming)

    def weighted_activity(self, centered: bool) -> chex.Array:
        """Return the mean absolute activation times outgoing magnitude at each position, summed over positions,
        [units]."""
        total: chex.Numeric = 0.0
        features = self.features  # raises if there are none
        for consumer in self.group.outgoing:
            center = self.mean_activation[consumer.operand] if centered else None
            activity = mean_abs(features[consumer.operand], consumer.kernel.positions, center)
            total += jnp.sum(activity * self.magnitude(consumer.kernel), 0)
        return total

    def outgoing_sum(self, function: Callable[..., chex.Array], *trees: Mapping[str, chex.Array]) -> chex.Array:
        """Sum a function of each outgoing weight of a unit, float32 [units].

        The weights are those before the inner update, at which gradient and curvature were taken.

        Args:
          function: takes a weight and an entry of each tree; applied elementwise to float32 arrays.
          *trees: arrays by path, as `grads`.
        """
        total = 0.0
        for consumer in self.group.outgoing:
            path = consumer.kernel.path
            entries = (tree[path].astype(jnp.float32) for tree in (self.params.params, *trees))
            total += consumer.kernel.sum(function(*entries)).sum(0)
        return total

    def gate_slope(self) -> chex.Array:
        r"""Return the derivative of the loss with respect to a gate on each unit's activation, float32 [units].

        With a gate of 1 that multiplies the activation :math:`h_i`, it is :math:`\sum h_i\, \partial L / \partial h_i`
        over batch and positions. That is :math:`\sum_j w_{ij}\, \partial L / \partial w_{ij}` over the
        outgoing weights in any network, so the gradients of the weights suffice.
        """
        return self.outgoing_sum(jnp.multiply, self.grads)

    def gate_curvature(self) -> chex.Array:
        r"""Return the second derivative of the loss with respect to a gate on each unit, :math:`\sum_j w_{ij}^2
        h_{ij}`, [units].

        Mixed terms of two weights are dropped: :math:`h` is the Hessian's diagonal.

        Raises:
          ValueError: the caller passed no `hessian_diag`.
        """
        if self.hessian_diag is None:
            raise ValueError(
                "a utility of second order needs the diagonal of the Hessian: tx.update(grads, state, params, "
                "features=features, hessian_diag=...), a tree like the params (see cbp_jax.curvature), got None"
            )
        return self.outgoing_sum(lambda w, h: jnp.square(w) * h, self.hessian_diag)


def batch_mean(values: chex.Array, positions: int) -> chex.Array:
    """Return means over batch and shared positions, float32 [positions, units]."""
    values = values.reshape(-1, positions, values.shape[-1])
    return jnp.mean(values, 0, dtype=jnp.float32)


def mean_abs(values: chex.Array, positions: int, center: chex.Array | None = None) -> chex.Array:
    """Return means of absolute values, taken element by element, [positions, units]."""
    values = values.reshape(-1, positions, values.shape[-1])
    return jnp.mean(jnp.abs(values if center is None else values - center), 0, dtype=jnp.float32)


def group_activations(group: units_lib.UnitGroup, features: units_lib.Features | None) -> tuple[chex.Array, ...]:
    """Look up the activations of a group.

    Args:
      group: the group.
      features: what `with_features` returned.

    Returns:
      for each distinct activation that the group's consumers read, an array [..., units] or, where positions have
      outgoing weights of their own, [..., positions, units].

    Raises:
      ValueError: the features are missing, or of wrong shapes.
    """
    if not isinstance(features, Mapping) or group.name not in features:
        found = sorted(features) if isinstance(features, Mapping) else features
        raise ValueError(
            f"features must hold the activations of group {group.name!r}: call "
            "`output, features = with_features(apply_fn, units)(params, x)` and pass them as "
            "`tx.update(grads, state, params, features=features)` (cbp_jax.TrainState does so, but Flax's TrainState "
            f"cannot); got {found!r}"
        )
    arrays = features[group.name]
    arrays = arrays if isinstance(arrays, tuple) else (arrays,)
    expected = [consumer.kernel.index.shape for consumer in group.operands()]
    if len(arrays) != len(expected):
        raise ValueError(f"features[{group.name!r}] must hold {len(expected)} arrays, got {len(arrays)}")
    for values, (positions, size) in zip(arrays, expected, strict=True):
        trailing = (size,) if positions == 1 else (positions, size)
        if jnp.shape(values)[-len(trailing) :] != trailing:
            raise ValueError(
                f"features[{group.name!r}] must be of shape [..., {', '.join(map(str, trailing))}], "
                f"got {jnp.shape(values)}"
            )
    return arrays
