"""Running statistics of normalization, which are not part of the parameters."""

from collections.abc import Iterable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from cbp_jax.units import groups


def reset_batch_stats(batch_stats: Any, units: Iterable[groups.UnitGroup], replaced: Mapping[str, chex.Array]) -> Any:
    """Reset the running statistics of replaced units to their initial values: means to 0, variances to 1.

    A replacement is an update of parameters. Running statistics are not parameters, so the training loop must reset
    them itself, after `optax.apply_updates`. `discover_units` finds which leaves belong to which group, if the
    statistics are among its arguments: as an example input that is a tree, `discover_units(lambda params, batch_stats,
    x: ..., variables["params"], variables["batch_stats"], x)`, or in the tree of variables, under "batch_stats".

    Args:
      batch_stats: tree of running statistics, with or without "batch_stats" at its top. Other leaves stay as they are.
      units: groups of `discover_units`.
      replaced: for each group, by name, a bool [units], as in `ContinualBackpropState`. In groups that it does not
        name, no unit is replaced.

    Returns:
      the tree with these entries reset.

    Raises:
      ValueError: the tree lacks running statistics of a group, or no group has any; `replaced` names none of the
        groups, or has a wrong shape.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, cbp_jax
      >>> net = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True), nn.relu, nn.Dense(2)])
      >>> variables = net.init(jax.random.key(0), jnp.ones((5, 4)))
      >>> apply = lambda params, stats, x: net.apply({"params": params, "batch_stats": stats}, x)
      >>> stats = jax.tree.map(lambda leaf: leaf + 7.0, variables["batch_stats"])
      >>> units = cbp_jax.discover_units(apply, variables["params"], stats, jnp.ones((5, 4)))
      >>> stats = cbp_jax.reset_batch_stats(stats, units, {"layers_0": jnp.array([False, True, False])})
      >>> stats["layers_1"]["mean"].tolist(), stats["layers_1"]["var"].tolist()
      ([7.0, 0.0, 7.0], [8.0, 1.0, 8.0])
    """
    units = tuple(units)
    wanted = [(group, part) for group in units for part in group.statistics]
    if not wanted:
        raise ValueError(
            "no group has running statistics; discover the units with them among the arguments: "
            "discover_units(lambda params, batch_stats, x: ..., params, batch_stats, x)"
        )
    sizes = {group.name: group.size for group in units}
    if not sizes.keys() & replaced.keys():
        raise ValueError(f"replaced must have some of the groups {list(sizes)}, got {list(replaced)}")
    for name in sizes.keys() & replaced.keys():
        if jnp.shape(replaced[name]) != (sizes[name],):
            raise ValueError(f"replaced[{name!r}] must be of shape {(sizes[name],)}, got {jnp.shape(replaced[name])}")
    names = {groups.statistics_name(path): path for path in groups.leaves_by_path(batch_stats)}
    masks: dict[str, list[tuple[chex.Array, float]]] = {}
    leaves = groups.leaves_by_path(batch_stats)
    for group, part in wanted:
        if group.name not in replaced:
            continue
        path = names.get(groups.statistics_name(part.path))
        if path is None:
            raise ValueError(
                f"batch_stats must hold {part.path!r}, running statistics of group {group.name!r}; "
                f"it has {sorted(leaves)}"
            )
        masks.setdefault(path, []).append((part.mask(replaced[group.name], leaves[path]), part.reset))

    def reset(key_path, leaf):
        for mask, value in masks.get(groups.join_path(key_path), ()):
            leaf = jnp.where(mask, jnp.asarray(value, leaf.dtype), leaf)
        return leaf

    return jax.tree_util.tree_map_with_path(reset, batch_stats)
