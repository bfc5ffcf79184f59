"""Replaces units while an optimizer trains: Algorithm 1 of Dohare et al. (Nature 2024), with any policy.

The loop is here. A policy decides which units are replaced; `continual_backprop` and `redo` are policies.
"""

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from cbp_jax import units as units_lib
from cbp_jax.numerics import keys
from cbp_jax.numerics.periods import cond_if_due
from cbp_jax.numerics.scalars import check_like
from cbp_jax.numerics.sharding import check_axes, sharded_alike
from cbp_jax.replacement import edits, resample
from cbp_jax.replacement import inner_state as inner_state_lib
from cbp_jax.replacement.reinitialization import Reinitialization, get_reinitialization, keeps_initial
from cbp_jax.replacement.views import GroupView, UpdatedParams

Memory = dict[str, Any]  # what a policy remembers of a group: arrays by name


class Choice(NamedTuple):
    """A policy's choice of units in one group.

    Attributes:
      units: which units are replaced: indices, int [k] with k fixed, padded with the group's size; or a mask, bool
        [units]. A mask is slower unless `due` is rarely true, since fresh weights are drawn for a whole group.
      memory: the group's memory for the next update, with the structure, shapes and dtypes that `init` returned.
      mean_activation: mean activations of the units, for each distinct activation that is read, [positions, units]. If
        given, the mean contribution of replaced units is added to the biases of their consumers.
      utility: utilities of all units, [units], for reinitializations that build on useful units.
    """

    units: chex.Array
    memory: Mapping[str, Any] = types.MappingProxyType({})
    mean_activation: tuple[chex.Array, ...] | None = None
    utility: chex.Array | None = None


class ReplacementState(NamedTuple):
    """State of :func:`replace_units`."""

    key: chex.Array  # raw uint32 key data, constant
    count: chex.Array  # int32 [], updates so far
    memory: dict[str, dict[str, Any]]  # the policy's, by entry and group name
    replaced: dict[str, chex.Array]  # bool [units] by group name, units replaced in the last update
    inner_state: optax.OptState
    initial: Mapping[str, chex.Array] = {}  # by path, for reinitializations that need initial parameters


class Policy(NamedTuple):
    """Which units are replaced, and when. Only `choose` is needed.

    Attributes:
      choose: `choose(view, memory)` takes a `GroupView` and the group's memory and returns a `Choice`. It is called
        group by group, from input to output.
      init: `init(group, params)` returns the group's memory, a dict of arrays.
      due: `due(count)` takes the number of this update (int32 [], from 1) and returns whether units are replaced in it,
        bool []. In other updates `choose` does not run and memories stay as they are. None: in every update.
      state: the NamedTuple of the transformation's state, by default `ReplacementState`. Its fields are `key`, `count`,
        `replaced`, `inner_state`, one for each entry of a memory, and `initial` for reinitializations that need the
        initial parameters.
      name: for error messages.
    """

    choose: Callable[[GroupView, Memory], Choice]
    init: Callable[[units_lib.UnitGroup, optax.Params], Mapping[str, Any]] = lambda group, params: {}
    due: Callable[[chex.Array], chex.Array] | None = None
    state: type = ReplacementState
    name: str = "replace_units"


def replace_units(
    inner: optax.GradientTransformation,
    units: Sequence[units_lib.UnitGroup],
    policy: Policy,
    *,
    initializer: resample.Initializer | None = None,
    reinitialization: str | Reinitialization = "resample",
    reset_inner_state: bool = True,
    key: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Replace the units that a policy chooses, after each update of an inner optimizer.

    For each group of units, from input to output, the policy chooses units. Their incoming weights are resampled,
    scales of normalization become 1, and biases and outgoing weights become 0. (Running statistics are not parameters;
    `reset_batch_stats` resets them.) A replacement is an update like any other, `fresh - param`, so the transformation
    composes with all others. If two adjacent groups replace units in one update, the weight between two new units is
    drawn, not 0. While nothing is replaced, the updates are bit for bit those of `inner`.

    In a chain, every transformation with state for each weight (momentum, Adam) belongs inside, as `inner`, so that its
    state is reset for replaced weights. Gradient clipping may come before. No transformation that changes updates may
    follow.

    Args:
      inner: the optimizer that trains the network.
      units: groups of units, from `discover_units` or written by hand.
      policy: which units are replaced, and when.
      initializer: `jax.nn.initializers` function for the incoming weights. New entries have the distribution that it
        gives to the full kernel. The default is He et al.'s uniform one, adapted to each kernel's layout, and for
        embeddings a normal distribution of variance 1 / units.
      reinitialization: what replaced units start from: "resample" (drawn at random), "rewind", "resample_both",
        "orthogonal", "split", "regrow" (see :mod:`cbp_jax.replacement.reinitialization`), or a function of a `NewUnits`
        that returns a `Fresh`.
      reset_inner_state: set the inner optimizer's moments of all replaced weights to their initial values.
      key: int or jax key for the fresh weights. `init` mixes the params into it (see :func:`keys.init_key`).

    Returns:
      a transformation. If the policy uses activations, its update takes the `features` that `with_features` returned,
      `tx.update(grads, state, params, features=features)`. If the policy or the inner optimizer uses curvature, it also
      takes `hessian_diag`, a tree like the params (see `cbp_jax.curvature`).

    Raises:
      TypeError: the initializer is not a function.
      ValueError: the reinitialization is unknown; in `init`, the units do not match the params, or the inner state is
        not understood; in `update`, params or features are missing or of wrong shapes, or the policy or the
        reinitialization returns wrong shapes.

    Example:
      Replace the 2 units of smallest gradient every 1,000 updates:

      >>> import jax, jax.numpy as jnp, optax, cbp_jax
      >>> def least_gradient(view, memory):
      ...   size = sum(part.sum(view.grads[part.path] ** 2).sum(0) for part in view.group.incoming)
      ...   return cbp_jax.Choice(jnp.argsort(size)[:2])
      >>> policy = cbp_jax.Policy(least_gradient, due=lambda count: count % 1000 == 0)

      >>> def apply_fn(params, x):
      ...   return jax.nn.relu(x @ params["w1"]) @ params["w2"]
      >>> params = {"w1": jnp.ones((4, 8)), "w2": jnp.ones((8, 2))}
      >>> units = cbp_jax.discover_units(apply_fn, params, jnp.ones((5, 4)))
      >>> tx = cbp_jax.replace_units(optax.sgd(0.01), units, policy)
      >>> state = tx.init(params)._replace(count=jnp.int32(999))
      >>> grads = {"w1": jnp.ones((4, 8)).at[:, 5:7].set(0.0), "w2": jnp.ones((8, 2))}
      >>> updates, state = tx.update(grads, state, params)
      >>> state.replaced["w1"].tolist(), optax.apply_updates(params, updates)["w2"][5].tolist()
      ([False, False, False, False, False, True, True, False], [0.0, 0.0])

    References:
      Dohare et al., `Loss of plasticity in deep continual learning
      <https://doi.org/10.1038/s41586-024-07711-7>`_, Nature 2024, Algorithm 1
    """
    if initializer is not None and not callable(initializer):
        raise TypeError(f"initializer must be a function of (key, shape, dtype) or None, got {initializer!r}")
    reinitialize = get_reinitialization(reinitialization)
    units = tuple(units)
    key_data, key_impl = keys.as_key_data(key)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> Any:
        check_axes(params)
        real = bool(jax.tree.leaves(params))  # optax.tree.map_params calls `init` with a placeholder that has no leaves
        groups = units_lib.check_units(units, params) if real else units
        inner_state = inner.init(params)
        if reset_inner_state and real:
            paths = {part.path for group in groups for part in group.slices()}
            inner_state_lib.check(inner, inner_state, params, paths, {group.name: group.size for group in groups})
        start = {"initial": _initial(groups, params)} if keeps_initial(reinitialize) else {}
        return policy.state(
            key=keys.init_key(jax.random.wrap_key_data(key_data, impl=key_impl), params),
            count=jnp.zeros([], jnp.int32),
            replaced={group.name: jnp.zeros(group.size, bool) for group in groups},
            inner_state=inner_state,
            **start,
            **_memory_fields(policy, {group.name: dict(policy.init(group, params)) for group in groups}),
        )

    def update_fn(
        updates,
        state,
        params=None,
        *,
        features: units_lib.Features | None = None,
        hessian_diag: optax.Params | None = None,
        **extra_args,
    ):
        if params is None:
            raise ValueError(f"{policy.name} needs the params: tx.update(grads, state, params, features=features)")
        if hessian_diag is not None:
            check_like("hessian_diag", hessian_diag, updates)
            extra_args["hessian_diag"] = hessian_diag
        groups = units_lib.check_units(units, params)
        memories = _memories(policy, groups, state)
        grads = units_lib.leaves_by_path(updates)
        curvature = None if hessian_diag is None else units_lib.leaves_by_path(hessian_diag)
        updates, inner_state = inner.update(updates, state.inner_state, params, features=features, **extra_args)
        count = optax.safe_increment(state.count)
        due = None if policy.due is None else policy.due(count)

        def random_key(stream: int) -> chex.PRNGKey:
            key = jax.random.wrap_key_data(state.key, impl=key_impl)
            return jax.random.fold_in(jax.random.fold_in(key, state.count), stream)

        def replace(updates):
            after = UpdatedParams(units_lib.leaves_by_path(params), units_lib.leaves_by_path(updates))
            chosen, utilities, replaced, new_memories = [], [], {}, {}
            for number, group in enumerate(groups):
                view = GroupView(group, features, after, grads, random_key(number), count, hessian_diag=curvature)
                choice = policy.choose(view, memories[group.name])
                numbers, mask, memory = _check_choice(policy, choice, group, memories[group.name], due)
                if choice.mean_activation is not None:
                    after = after.with_updates(edits.compensate(after, group, numbers, choice.mean_activation))
                after = after.without(group, mask)
                chosen.append(numbers)
                utilities.append(choice.utility)
                replaced[group.name], new_memories[group.name] = mask, memory

            new_leaves, masks = edits.start_anew(
                after.params,
                after.updates,
                groups,
                chosen,
                initializer,
                lambda: random_key(len(groups)),
                reinitialize,
                edits.Seen(grads, getattr(state, "initial", {}), utilities),
            )
            new_updates = jax.tree_util.tree_map_with_path(
                lambda path, leaf: new_leaves.get(units_lib.join_path(path), leaf), updates
            )
            if not reset_inner_state:
                return new_updates, inner_state, replaced, new_memories
            new_params = optax.apply_updates(params, new_updates)
            new_state = inner_state_lib.reset(inner, inner_state, new_params, masks, replaced)
            return new_updates, new_state, replaced, new_memories

        def keep(updates):
            return updates, inner_state, {group.name: jnp.zeros(group.size, bool) for group in groups}, memories

        if due is None:
            new_updates, inner_state, replaced, memories = replace(updates)
        else:
            # Whole groups may be drawn here, so most updates must skip this branch, under vmap too.
            updates = _widen(updates, params, {part.path for group in groups for part in group.slices()})
            new_updates, inner_state, replaced, memories = cond_if_due(due, replace, keep, updates)
        new_state = state._replace(
            count=count, replaced=replaced, inner_state=inner_state, **_memory_fields(policy, memories)
        )
        return sharded_alike(new_updates, params), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def replaced_units(opt_state: optax.OptState) -> chex.Array:
    """Return how many units the last update replaced, float32 []. The state may be nested in other optimizer states."""
    masks = optax.tree_utils.tree_get_all_with_path(opt_state, "replaced")
    return sum(
        (jnp.sum(mask, dtype=jnp.float32) for mask in jax.tree.leaves([found for _, found in masks])),
        jnp.zeros([], jnp.float32),
    )


def _initial(groups: Sequence[units_lib.UnitGroup], params: optax.Params) -> dict[str, chex.Array]:
    """Return incoming weights and biases by path, copied, so that params and state can both be donated to a jitted
    step."""
    paths = {part.path for group in groups for part in (*group.incoming, *group.biases)}
    leaves = units_lib.leaves_by_path(params)
    if not leaves:
        return {path: jnp.zeros([]) for path in paths}  # the entries without their values, for optax.tree.map_params
    return {path: jnp.array(leaf, copy=True) for path, leaf in leaves.items() if path in paths}


def _memory_fields(policy: Policy, memories: dict[str, Memory]) -> dict[str, Any]:
    """Convert memories by group to fields of the policy's state, each a dict by group."""
    names = next(iter(memories.values()), {})
    fields = {name: {group: memory[name] for group, memory in memories.items()} for name in names}
    return {"memory": fields} if policy.state is ReplacementState else fields


def _memories(policy: Policy, groups: Sequence[units_lib.UnitGroup], state: Any) -> dict[str, Memory]:
    """Invert `_memory_fields`: extract the memory of each group from a state."""
    fields = state.memory if policy.state is ReplacementState else state._asdict()
    names = fields.keys() - {"key", "count", "replaced", "inner_state", "initial"}
    return {group.name: {name: fields[name][group.name] for name in names} for group in groups}


def _check_choice(policy, choice, group, memory, due):
    """Return a choice as unit numbers and as a mask, and the new memory; no units and the old memory if no update is
    due."""
    units, size = jnp.asarray(choice.units), group.size
    if units.dtype == bool and units.shape == (size,):
        mask = units if due is None else due & units
        (numbers,) = jnp.nonzero(mask, size=size, fill_value=size)
    elif jnp.issubdtype(units.dtype, jnp.integer) and units.ndim == 1 and units.size:
        numbers = units if due is None else jnp.where(due, units, size)
        mask = edits.as_mask(numbers, size)
    else:
        raise ValueError(
            f"{policy.name}: the policy must choose units of group {group.name!r} by number, int [k], or by a mask, "
            f"bool [{size}], got {units.dtype} {list(units.shape)}"
        )
    new = dict(choice.memory)
    want, got = ({name: jax.tree.map(_kind, entry) for name, entry in tree.items()} for tree in (memory, new))
    if want != got:
        raise ValueError(f"{policy.name}: the policy's memory of group {group.name!r} must stay {want}, got {got}")
    return numbers, mask, new if due is None else jax.tree.map(functools.partial(jnp.where, due), new, memory)


def _kind(leaf: Any) -> str:
    return f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"


def _widen(updates: optax.Updates, params: optax.Params, paths: set[str]) -> optax.Updates:
    """Cast updates of weights that may be replaced to the params' precision, in which `-param` is exact."""
    widen = lambda path, update, param: (
        update.astype(jnp.promote_types(update.dtype, param.dtype)) if units_lib.join_path(path) in paths else update
    )
    return jax.tree_util.tree_map_with_path(widen, updates, params)
