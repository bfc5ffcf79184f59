"""The activations that a caller hands to a transformation's update, checked."""

from collections.abc import Mapping

import chex
import jax.numpy as jnp

from cbp_jax import units as units_lib


def group_activations(group: units_lib.UnitGroup, features: units_lib.Features | None) -> tuple[chex.Array, ...]:
    """Looks up the activations of a group.

    Args:
      group: the group.
      features: what `with_features` returned.

    Returns:
      for each distinct activation that the group's consumers read, an array [..., units] or, where positions have
      outgoing weights of their own, [..., positions, units].

    Raises:
      ValueError: the features are missing, or of other shapes than the group's.
    """
    if not isinstance(features, Mapping) or group.name not in features:
        found = sorted(features) if isinstance(features, Mapping) else features
        raise ValueError(
            f"features must hold the activations of group {group.name!r}: call "
            "`output, features = with_features(apply_fn, units)(params, x)` and pass them as "
            f"`tx.update(grads, state, params, features=features)`; got {found!r}"
        )
    found = features[group.name]
    found = found if isinstance(found, tuple) else (found,)
    expected = [consumer.kernel.index.shape for consumer in group.operands()]
    if len(found) != len(expected):
        raise ValueError(f"features[{group.name!r}] must hold {len(expected)} arrays, got {len(found)}")
    for values, (positions, size) in zip(found, expected, strict=True):
        trailing = (size,) if positions == 1 else (positions, size)
        if jnp.shape(values)[-len(trailing) :] != trailing:
            raise ValueError(
                f"features[{group.name!r}] must be of shape [..., {', '.join(map(str, trailing))}], "
                f"got {jnp.shape(values)}"
            )
    return found
