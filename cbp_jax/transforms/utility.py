"""What a unit is worth: the instantaneous utilities whose running means rank the units of a group."""

import dataclasses
from collections.abc import Callable, Mapping

import chex
import jax
import jax.numpy as jnp

from cbp_jax.units import groups


@dataclasses.dataclass(frozen=True)
class GroupView:
    """What a utility may look at, for one group and one step.

    Attributes:
      group: the group.
      features: its activations on this batch, one array [..., units] or [..., positions, units] for each distinct
        activation that its consumers read.
      mean_activation: running means of these, corrected for their start, each [positions, units].
      params: arrays by path: the parameters after the inner update, the outgoing weights of units that were replaced in
        groups in front being 0.
      grads: arrays by path: the gradients of this step.
      magnitude: gives the sum of the absolute weights in each row of a slice, float32 [positions, units].
      key: a typed key of this group and step.
    """

    group: groups.UnitGroup
    features: tuple[chex.Array, ...]
    mean_activation: tuple[chex.Array, ...]
    params: Mapping[str, chex.Array]
    grads: Mapping[str, chex.Array]
    magnitude: Callable[[groups.ParamSlice], chex.Array]
    key: chex.PRNGKey

    def outgoing_magnitude(self) -> chex.Array:
        """Sum of each unit's absolute outgoing weights, [units]."""
        return sum(self.magnitude(consumer.kernel).sum(0) for consumer in self.group.outgoing)

    def incoming_magnitude(self) -> chex.Array:
        """Sum of each unit's absolute incoming weights, biases left out, [units]."""
        return sum(self.magnitude(part).sum(0) for part in self.group.incoming)

    def weighted_activity(self, centred: bool) -> chex.Array:
        """Mean absolute activation times outgoing magnitude, position by position, summed, [units]."""
        total = 0.0
        for consumer in self.group.outgoing:
            centre = self.mean_activation[consumer.operand] if centred else None
            activity = mean_abs(self.features[consumer.operand], consumer.kernel.positions, centre)
            total += jnp.sum(activity * self.magnitude(consumer.kernel), 0)
        return total


Utility = Callable[[GroupView], chex.Array]


def batch_mean(values: chex.Array, positions: int) -> chex.Array:
    """Means over batch and shared positions, float32 [positions, units]."""
    values = values.reshape(-1, positions, values.shape[-1])
    return jnp.mean(values, 0, dtype=jnp.float32)


def mean_abs(values: chex.Array, positions: int, centre: chex.Array | None = None) -> chex.Array:
    """Means of absolute values, taken element by element, [positions, units]."""
    values = values.reshape(-1, positions, values.shape[-1])
    return jnp.mean(jnp.abs(values if centre is None else values - centre), 0, dtype=jnp.float32)


def contribution(view: GroupView) -> chex.Array:
    """`mean|h| sum|w|`: how strongly a unit speaks to those that read it (Dohare et al. 2024, equation 1)."""
    return view.weighted_activity(centred=False)


def zero_contribution(view: GroupView) -> chex.Array:
    """`mean|h - m| sum|w|`: contribution less what a bias could give instead (m the running mean of h)."""
    return view.weighted_activity(centred=True)


def adaptation(view: GroupView) -> chex.Array:
    """`1 / sum|v|`: how fast a unit can change, its incoming weights v being small."""
    return 1.0 / view.incoming_magnitude()


def adaptable_contribution(view: GroupView) -> chex.Array:
    """`mean|h - m| sum|w| / sum|v|`: mean-corrected contribution times adaptation."""
    return zero_contribution(view) / view.incoming_magnitude()


def weight(view: GroupView) -> chex.Array:
    """`sum|w|`: magnitude of the outgoing weights."""
    return view.outgoing_magnitude()


def random(view: GroupView) -> chex.Array:
    """Uniform in [0, 1): any unit is as good as another; the control for all of the above."""
    return jax.random.uniform(view.key, (view.group.size,))


UTILITIES: dict[str, Utility] = {
    function.__name__: function
    for function in (contribution, zero_contribution, adaptation, adaptable_contribution, weight, random)
}


def get_utility(utility: str | Utility) -> Utility:
    """Looks a utility up by name; a callable is taken as it is.

    Raises:
      ValueError: there is no utility of that name.
    """
    if callable(utility):
        return utility
    if not isinstance(utility, str) or utility not in UTILITIES:
        raise ValueError(f"utility must be a callable or one of {sorted(UTILITIES)}, got {utility!r}")
    return UTILITIES[utility]
