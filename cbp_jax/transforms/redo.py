"""ReDo (Sokar et al., 2023): recycles all dormant units, now and then."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from cbp_jax import units as units_lib
from cbp_jax.transforms import inner_state as inner_state_lib
from cbp_jax.transforms import keys, resample
from cbp_jax.transforms import surgery as surgery_lib
from cbp_jax.transforms.activations import group_activations
from cbp_jax.transforms.scalars import check_scalar


class RedoState(NamedTuple):
    """State of :func:`redo`."""

    key: chex.Array  # raw uint32 key data, constant
    count: chex.Array  # int32 [], updates so far
    replaced: dict[str, chex.Array]  # by group name bool [units], units recycled in the last update
    inner_state: optax.OptState


def redo(
    inner: optax.GradientTransformation,
    units: Sequence[units_lib.UnitGroup],
    *,
    threshold: chex.Numeric = 0.1,
    every: chex.Numeric = 1000,
    initializer: resample.Initializer | None = None,
    reset_inner_state: bool = True,
    key: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Recycles dormant units once in so many updates.

    After the inner optimizer's update number `every`, 2 `every`, ..., the units i of a group of H whose activations
    on this update's batch are small beside the group's,

    .. math:: s_i = \frac{E|h_i|}{\frac{1}{H} \sum_k E|h_k|} \le \tau,

    are recycled: incoming weights are drawn anew, scales of normalisation become 1, biases and outgoing weights 0.
    (Running statistics are no parameters: `reset_batch_stats` takes the state's `replaced`.) The mean runs over
    examples and positions; where consumers read different arrays, the score is the mean of the scores on each. A
    group that is silent on the whole batch is recycled whole, as :func:`metrics.dormant_fraction` counts it; one
    whose activations are not finite is left alone. The batch should be large enough for the scores to mean something:
    on a single example about half of all ReLU units are silent.

    A replacement is an update like any other, `fresh - param`; groups are treated from front to back, and what stands
    in front of and behind this in a chain is as for :func:`continual_backprop`. Other updates are bit for bit those
    of `inner`.

    Args:
      inner: the optimizer that trains the network.
      units: groups of `discover_units`, or written by hand.
      threshold: :math:`\tau`, largest score of a dormant unit, >= 0. May be traced.
      every: updates from one recycling to the next, a whole number >= 1. May be traced.
      initializer: `jax.nn.initializers` function for the incoming weights; entries have the distribution that it
        gives to the full kernel. The default is He et al.'s uniform one, whatever the kernel's layout.
      reset_inner_state: set the inner optimizer's moments of all replaced weights to their initial values.
      key: int or jax key for the fresh weights. `init` mixes the params into it (see :func:`keys.init_key`).

    Returns:
      a transformation whose update takes the `features` that `with_features` returned:
      `tx.update(grads, state, params, features=features)`. Its state is a `RedoState`.

    Raises:
      ValueError: an argument is out of range; in `init`, units that do not match the params, or an inner state that is
        not understood; in `update`, params or features are missing or of wrong shapes.

    Example:
      >>> import jax, jax.numpy as jnp, optax, cbp_jax
      >>> def apply_fn(params, x):
      ...   return jax.nn.relu(x @ params["w1"]) @ params["w2"]
      >>> params = {"w1": jnp.ones((4, 8)).at[:, 3].set(-1.0), "w2": jnp.ones((8, 2))}
      >>> units = cbp_jax.discover_units(apply_fn, params, jnp.ones((5, 4)))
      >>> _, features = cbp_jax.with_features(apply_fn, units)(params, jnp.ones((5, 4)))
      >>> tx = redo(optax.sgd(0.01), units, every=1)
      >>> updates, state = tx.update(params, tx.init(params), params, features=features)
      >>> state.replaced["w1"].tolist(), optax.apply_updates(params, updates)["w2"][3].tolist()
      ([False, False, False, True, False, False, False, False], [0.0, 0.0])

    References:
      Sokar et al., `The dormant neuron phenomenon in deep reinforcement learning
      <https://arxiv.org/abs/2302.12902>`_, ICML 2023
    """
    check_scalar("threshold", threshold, at_least=0)
    check_scalar("every", every, at_least=1)
    if not isinstance(every, jax.core.Tracer) and float(every) != int(every):
        raise ValueError(f"every must be a whole number, got {every}")
    if initializer is not None and not callable(initializer):
        raise TypeError(f"initializer must be a function of (key, shape, dtype) or None, got {initializer!r}")
    units = tuple(units)
    key_data, key_impl = keys.as_key_data(key)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> RedoState:
        checked = units_lib.check_units(units, params)
        inner_state = inner.init(params)
        if reset_inner_state:
            paths = {part.path for group in checked for part in group.slices()}
            sizes = {group.name: group.size for group in checked}
            inner_state_lib.check(inner, inner_state, params, paths, sizes)
        return RedoState(
            key=keys.init_key(jax.random.wrap_key_data(key_data, impl=key_impl), params),
            count=jnp.zeros([], jnp.int32),
            replaced={group.name: jnp.zeros(group.size, bool) for group in checked},
            inner_state=inner_state,
        )

    def update_fn(
        updates: optax.Updates,
        state: RedoState,
        params: optax.Params | None = None,
        *,
        features: units_lib.Features | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, RedoState]:
        if params is None:
            raise ValueError("redo needs the params: tx.update(grads, state, params, features=features)")
        checked = units_lib.check_units(units, params)
        activations = {group.name: group_activations(group, features) for group in checked}
        inner_updates, inner_state = inner.update(updates, state.inner_state, params, features=features, **extra_args)
        inner_updates = _widen(inner_updates, params, {part.path for group in checked for part in group.slices()})
        count = optax.safe_increment(state.count)
        due = count % jnp.asarray(every).astype(jnp.int32) == 0

        def recycle():
            replaced = {name: due & (_score(h) <= threshold) for name, h in activations.items()}
            surgery = surgery_lib.Surgery(units_lib.leaves_by_path(params), units_lib.leaves_by_path(inner_updates))
            numbers = [
                jnp.nonzero(replaced[group.name], size=group.size, fill_value=group.size)[0] for group in checked
            ]
            key = jax.random.wrap_key_data(state.key, impl=key_impl)
            surgery.replace(checked, numbers, initializer, lambda: jax.random.fold_in(key, count))
            new_updates = jax.tree_util.tree_map_with_path(
                lambda path, leaf: surgery.updates.get(units_lib.join_path(path), leaf), inner_updates
            )
            if not reset_inner_state:
                return new_updates, inner_state, replaced
            new_params = optax.apply_updates(params, new_updates)
            new_state = inner_state_lib.reset(inner, inner_state, new_params, surgery.masks, replaced)
            return new_updates, new_state, replaced

        def keep():
            return inner_updates, inner_state, {group.name: jnp.zeros(group.size, bool) for group in checked}

        # Whole kernels may be drawn, so that most updates must not come to it, under vmap neither.
        new_updates, inner_state, replaced = jax.lax.cond(_anywhere(due), recycle, keep)
        return new_updates, RedoState(state.key, count, replaced, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _score(activations: tuple[chex.Array, ...]) -> chex.Array:
    """Mean absolute activation of each unit over the group's, float32 [units]; not a number where one is not finite."""
    scores = []
    for h in activations:
        size = jnp.mean(jnp.abs(h.astype(jnp.float32)), axis=tuple(range(h.ndim - 1)))
        mean = jnp.mean(size)
        scores.append(jnp.where(jnp.isfinite(mean), size / jnp.where(mean == 0, 1.0, mean), jnp.nan))
    return sum(scores) / len(scores)


def _widen(updates: optax.Updates, params: optax.Params, paths: set[str]) -> optax.Updates:
    """Brings updates of weights that may be replaced to the params' precision, in which `-param` is exact."""
    widen = lambda path, update, param: (
        update.astype(jnp.promote_types(update.dtype, param.dtype)) if units_lib.join_path(path) in paths else update
    )
    return jax.tree_util.tree_map_with_path(widen, updates, params)


@jax.custom_batching.custom_vmap
def _anywhere(due: chex.Array) -> chex.Array:
    """Whether an update is due; under vmap, whether it is in any row, so that a `cond` on it stays one."""
    return due


@_anywhere.def_vmap
def _anywhere_in_batch(axis_size, in_batched, due):
    del axis_size, in_batched
    return _anywhere(jnp.any(due)), False  # asks again, for the rows of an outer vmap
