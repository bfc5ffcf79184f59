"""Structured tickets: whole units are pruned, which leaves a smaller dense network."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cbp_jax import replacement
from cbp_jax import units as units_lib
from cbp_jax.numerics import keys
from cbp_jax.numerics.scalars import check_scalar
from cbp_jax.replacement.views import GroupView, UpdatedParams, batch_mean, group_activations
from cbp_jax.tickets import ranking
from cbp_jax.tickets.masks import Mask
from cbp_jax.tickets.prune import rounded_count
from cbp_jax.units.groups import join_path, leaves_by_path, statistics_name

#: By name of group, bool [units]: the units to keep. Groups that are not named keep all units.
Keep = Mapping[str, chex.Array]


def prune_units(
    params: optax.Params,
    units: Sequence[units_lib.UnitGroup],
    fraction: chex.Numeric,
    *,
    keep: Keep | None = None,
    scope: Literal["layer", "global"] = "layer",
    utility: str | replacement.Utility | Mapping[str, chex.Array] = "weight",
    features: units_lib.Features | None = None,
    grads: optax.Updates | None = None,
    key: jax.typing.ArrayLike = 0,
) -> dict[str, chex.Array]:
    """Prune a fraction of the remaining units, those of smallest utility.

    Exactly `round(fraction * remaining)` units are removed, halves rounded to even; of equal utilities the first. This
    is like `prune` for weights, and also works under `jit` and `vmap`.

    Args:
      params: pytree of arrays, may be traced.
      units: groups of `discover_units`, all or selected. Other groups keep all units.
      fraction: the fraction of the remaining units that is pruned, in [0, 1).
      keep: the units that remain from earlier prunings; by default all.
      scope: "layer" prunes the fraction of each group; "global" that of all groups together, whose utilities are
        compared.
      utility: by name of group an array [units], such as the field `utility` in the state of `continual_backprop`; or a
        name or function as in `continual_backprop`, applied to these params, features and gradients. By default the
        magnitude of the outgoing weights, which needs no examples. Note that "contribution" favors units that are
        always active, although a bias could replace them.
      features: activations on some examples, from `with_features`, if the utility needs them.
      grads: gradients, if the utility needs them.
      key: int or jax key, if the utility draws random numbers.

    Returns:
      by name of group a bool [units], true for the remaining units.

    Raises:
      ValueError: the fraction is out of range, the scope or utility is unknown, the units do not match the params,
        features or gradients are missing, the utility needs curvature, an array has another shape, or no unit of a
        group would be left.

    Example:
      >>> import cbp_jax
      >>> apply_fn = lambda params, x: jax.nn.relu(x @ params["w1"]) @ params["w2"]
      >>> params = {"w1": jnp.ones((4, 3)), "w2": jnp.array([[3.0], [1.0], [2.0]])}
      >>> units = cbp_jax.discover_units(apply_fn, params, jnp.ones((1, 4)))
      >>> keep = prune_units(params, units, 1 / 3, utility="weight")
      >>> keep["w1"].tolist(), shrink_params(params, units, keep)["w2"].ravel().tolist()
      ([True, False, True], [3.0, 2.0])
    """
    if scope not in ("layer", "global"):
        raise ValueError(f"scope must be 'layer' or 'global', got {scope!r}")
    check_scalar("fraction", fraction, at_least=0, below=1)
    groups = units_lib.check_units(units, params)
    there = _checked(keep, groups)
    values = _utilities(groups, params, utility, features, grads, key)
    pools = [[group.name] for group in groups] if scope == "layer" else [[group.name for group in groups]]
    left: dict[str, chex.Array] = {}
    for names in pools:
        living = [there[name] for name in names]
        count = rounded_count(fraction, sum(jnp.sum(each, dtype=jnp.int32) for each in living))
        left |= dict(zip(names, ranking.without_least([values[name] for name in names], living, count), strict=True))
    for name, each in left.items():
        if not isinstance(each, jax.core.Tracer) and not each.any():
            raise ValueError(
                f"fraction {fraction} leaves no unit of group {name!r}, which has {int(there[name].sum())}"
            )
    return left


def unit_mask(params: optax.Params, units: Sequence[units_lib.UnitGroup], keep: Keep) -> Mask:
    """Return the mask of weights that corresponds to pruned units: weights that write them and weights that read them
    are dead.

    Args:
      params: pytree of arrays.
      units: groups of `discover_units`.
      keep: the units to keep, may be traced.

    Returns:
      a mask of the params, as `full_mask` makes it, to train under (`masked`).

    Raises:
      ValueError: the units do not match the params, or an array of `keep` has another shape.

    Example:
      >>> import cbp_jax
      >>> apply_fn = lambda params, x: jax.nn.relu(x @ params["w1"]) @ params["w2"]
      >>> params = {"w1": jnp.ones((1, 3)), "w2": jnp.ones((3, 1))}
      >>> units = cbp_jax.discover_units(apply_fn, params, jnp.ones((1, 1)))
      >>> mask = unit_mask(params, units, {"w1": jnp.array([True, False, True])})
      >>> mask["w1"].tolist(), mask["w2"].tolist()
      ([[True, False, True]], [[True], [False], [True]])
    """
    groups = units_lib.check_units(units, params)
    there, leaves = _checked(keep, groups), leaves_by_path(params)
    living = {path: jnp.ones(jnp.shape(leaf), bool) for path, leaf in leaves.items()}
    for group in groups:
        for part in (*group.incoming, *(consumer.kernel for consumer in group.outgoing)):
            living[part.path] &= ~part.mask(~there[group.name], leaves[part.path])
    return jax.tree_util.tree_map_with_path(lambda path, _: living[join_path(path)], params)


def shrink_params(params: optax.Params, units: Sequence[units_lib.UnitGroup], keep: Keep) -> optax.Params:
    """Remove units from the parameters: the smaller network computes the same as the masked one, in less time.

    A unit's rows are removed from all arrays that write it, read it, or belong to it as biases, scales and running
    statistics (if these are in `params`, as in Flax's tree of variables; see `shrink_batch_stats`). An apply function
    that does not depend on sizes can be used unchanged. A Flax module must be created with the new sizes:
    `MLP(hidden=[int(keep[group.name].sum()) for group in units], ...)`.

    Args:
      params: pytree of arrays.
      units: groups of `discover_units`.
      keep: the units that stay, not traced.

    Returns:
      the params with smaller arrays. Up to rounding, outputs are those of `apply_mask(params, unit_mask(params, units,
      keep))`.

    Raises:
      ValueError: the units do not match the params; an array of `keep` is traced or has another shape; no unit of a
        group is left; units to be removed are normalized together with others, whose mean and variance would change; or
        the rest of an array would not be rectangular.

    Example:
      >>> import cbp_jax
      >>> apply_fn = lambda params, x: jax.nn.relu(x @ params["w1"]) @ params["w2"]
      >>> params = {"w1": jnp.array([[1.0, 2.0, 3.0]]), "w2": jnp.ones((3, 1))}
      >>> units = cbp_jax.discover_units(apply_fn, params, jnp.ones((1, 1)))
      >>> small = shrink_params(params, units, {"w1": jnp.array([True, False, True])})
      >>> small["w1"].tolist(), float(apply_fn(small, jnp.ones((1, 1)))[0, 0])
      ([[1.0, 3.0]], 4.0)
    """
    groups = units_lib.check_units(units, params)
    slices = [(group, part) for group in groups for part in (*group.slices(), *group.statistics)]
    return _cut(params, slices, _counted(keep, groups))


def shrink_batch_stats(batch_stats: Any, units: Sequence[units_lib.UnitGroup], keep: Keep) -> Any:
    """Remove units from running statistics that are not in the params, like `shrink_params`.

    Args:
      batch_stats: tree of running statistics, as `reset_batch_stats` takes it.
      units: groups of `discover_units`.
      keep: the units that stay, not traced.

    Returns:
      the tree with smaller arrays.

    Raises:
      ValueError: as in `shrink_params`.
    """
    groups = units_lib.Units(units)
    return _cut(batch_stats, [(group, part) for group in groups for part in group.statistics], _counted(keep, groups))


def _utilities(groups, params, utility, features, grads, key) -> dict[str, chex.Array]:
    """Return utilities by name of group, [units]."""
    if isinstance(utility, Mapping):
        missing = [group.name for group in groups if group.name not in utility]
        if missing:
            raise ValueError(f"utility must have an array for each group; it has none for {missing}")
        values = {group.name: jnp.asarray(utility[group.name]) for group in groups}
    else:
        utility_fn = replacement.get_utility(utility)
        if replacement.needs_curvature(utility):
            raise ValueError(f"utility must not need curvature, which prune_units does not get, got {utility!r}")
        after = UpdatedParams(leaves_by_path(params), jax.tree.map(jnp.zeros_like, leaves_by_path(params)))
        data, impl = keys.as_key_data(key)

        def view(number, group):
            means = ()
            if features is not None:
                activations = group_activations(group, features)
                positions = [consumer.kernel.positions for consumer in group.operands()]
                means = tuple(batch_mean(h, n) for h, n in zip(activations, positions, strict=True))
            drawn = jax.random.fold_in(jax.random.wrap_key_data(data, impl=impl), number)
            gradients = _NoGradients() if grads is None else leaves_by_path(grads)
            return GroupView(group, features, after, gradients, drawn, jnp.ones([], jnp.int32), means)

        values = {group.name: jnp.asarray(utility_fn(view(n, group))) for n, group in enumerate(groups)}
    for group in groups:
        if values[group.name].shape != (group.size,):
            raise ValueError(
                f"utility of group {group.name!r} must be of shape ({group.size},), got {values[group.name].shape}"
            )
    dtype = jnp.result_type(*values.values())
    return {name: value.astype(dtype) for name, value in values.items()}


class _NoGradients(dict):
    """What a utility sees as gradients if there are none."""

    def __missing__(self, path):
        raise ValueError("this utility needs gradients: prune_units(..., grads=...), got grads=None")


def _checked(keep: Keep | None, groups: units_lib.Units) -> dict[str, chex.Array]:
    """Return the remaining units of all groups."""
    keep = dict(keep or {})
    unknown = [name for name in keep if name not in {group.name for group in groups}]
    if unknown:
        raise ValueError(f"keep must be of the groups {[group.name for group in groups]}, got {unknown}")
    found = {group.name: jnp.asarray(keep.get(group.name, np.ones(group.size, bool))) for group in groups}
    for group in groups:
        each = found[group.name]
        if each.shape != (group.size,) or each.dtype != jnp.bool_:
            raise ValueError(
                f"keep[{group.name!r}] must be bool of shape ({group.size},), got {each.dtype}{list(each.shape)}"
            )
    return found


def _counted(keep: Keep, groups: units_lib.Units) -> dict[str, np.ndarray]:
    """Return the same on the host, so that sizes are known."""
    there = _checked(keep, groups)
    for group in groups:
        each = there[group.name]
        if isinstance(each, jax.core.Tracer):
            raise ValueError(f"keep[{group.name!r}] must not be traced: the sizes of arrays depend on it")
        if not each.any():
            raise ValueError(f"keep[{group.name!r}] has no unit left, and nothing could pass through the network")
        if not group.exact and not each.all():
            raise ValueError(
                f"units of group {group.name!r} are normalized together: without some of them the others would change; "
                "prune weights instead, or select other groups"
            )
    return {name: np.asarray(each) for name, each in there.items()}


def _cut(tree: Any, slices: list[tuple[units_lib.UnitGroup, units_lib.ParamSlice]], keep: dict[str, np.ndarray]) -> Any:
    """Return the tree without the rows of removed units, including running statistics in it."""
    leaves = leaves_by_path(tree)
    names = {statistics_name(path): path for path in leaves}
    staying: dict[str, dict[int, np.ndarray]] = {}  # by path and axis
    for group, part in slices:
        path = names.get(statistics_name(part.path))
        if path is None or keep[group.name].all():
            continue
        shape = jnp.shape(leaves[path])
        rows = np.ones(part.rows, bool)
        rows[part.index[:, ~keep[group.name]].ravel()] = False
        grid = rows.reshape([shape[axis] for axis in part.axes])
        along = [grid.any(tuple(other for other in range(grid.ndim) if other != place)) for place in range(grid.ndim)]
        block = np.ones(grid.shape, bool)
        for place, each in enumerate(along):
            block &= np.expand_dims(each, [other for other in range(grid.ndim) if other != place])
        if not (block == grid).all():
            raise ValueError(f"units of group {group.name!r} cannot be cut out of {path!r}: what is left is no array")
        axes = staying.setdefault(path, {axis: np.ones(size, bool) for axis, size in enumerate(shape)})
        for axis, each in zip(part.axes, along, strict=True):
            axes[axis] &= each

    def smaller(key_path, leaf):
        for axis, each in staying.get(join_path(key_path), {}).items():
            if not each.all():
                leaf = jnp.take(leaf, np.flatnonzero(each), axis)
        return leaf

    return jax.tree_util.tree_map_with_path(smaller, tree)
