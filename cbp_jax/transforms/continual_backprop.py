"""Continual backpropagation (Dohare et al., Nature 2024, Algorithm 1) as an optax transformation."""

import math
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
from cbp_jax.transforms import utility as utility_lib
from cbp_jax.transforms.activations import group_activations
from cbp_jax.transforms.scalars import check_scalar

# Sums of float32 fractions fall short of an integer by a rounding error: a hundred times 0.01 is 0.99999934.
_ROUNDING = 1e-5


class ContinualBackpropState(NamedTuple):
    """State of continual backpropagation; dicts go from group name to that group's arrays."""

    key: chex.Array  # raw uint32 key data, constant
    count: chex.Array  # int32 [], updates so far
    utility: dict[str, chex.Array]  # float32 [units], running mean, not corrected for its start
    age: dict[str, chex.Array]  # int32 [units], updates since the unit was made
    mean_activation: dict[str, tuple[chex.Array, ...]]  # float32 [positions, units], not corrected
    budget: dict[str, chex.Array]  # float32 [], replacements due but not made
    replaced: dict[str, chex.Array]  # bool [units], units replaced in the last update
    inner_state: optax.OptState


def continual_backprop(
    inner: optax.GradientTransformation,
    units: Sequence[units_lib.UnitGroup],
    *,
    replacement_rate: chex.Numeric = 1e-4,
    decay_rate: chex.Numeric = 0.99,
    maturity_threshold: chex.Numeric = 100,
    utility: str | utility_lib.Utility = "contribution",
    initializer: resample.Initializer | None = None,
    reset_inner_state: bool = True,
    compensate_bias: bool = False,
    max_replacements: int | None = None,
    key: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Continually replaces a small fraction of mature units of low utility.

    After each update of the inner optimizer, for every group of units from front to back (Algorithm 1):

    1. ages grow by one, and utilities are averaged, `u <- d u + (1 - d) y` with decay rate d;
    2. units older than the maturity threshold are eligible, and the group's budget grows by the replacement rate
       times their number;
    3. as many eligible units as the budget has whole replacements, those of least `u / (1 - d**age)`, are replaced:
       incoming weights are drawn anew, scales of normalisation become 1, biases and outgoing weights 0, and so do
       utility, age and mean activation. The fraction of the budget stays for later. (Running statistics are no
       parameters: `reset_batch_stats` resets them.)

    A replacement is an update like any other, `fresh - param`, so that the transformation composes with all others.
    Where two adjacent groups replace units in one step, the weight from the one new unit to the other ends drawn anew,
    not 0. With `replacement_rate=0` the updates are bit for bit those of `inner`.

    In a chain, whatever remembers weights (momentum, Adam) belongs inside, as `inner`, so that its memory of replaced
    weights is reset; gradient clipping may stand in front; what edits updates must not stand behind. In
    `optax.inject_hyperparams`, name `max_replacements`, and a callable `utility` or `initializer`, in `static_args`.

    Args:
      inner: the optimizer that trains the network.
      units: groups of `discover_units`, or written by hand.
      replacement_rate: replacements for each eligible unit and update, in [0, 1]. May be traced.
      decay_rate: of the running means of utility and activation, in [0, 1). May be traced.
      maturity_threshold: age in updates above which a unit may be replaced, >= 0. May be traced.
      utility: "contribution", "zero_contribution", "adaptation", "adaptable_contribution", "weight", "random", or a
        function of a `GroupView` that returns an array [units]. Units of non-finite utility are not replaced.
      initializer: `jax.nn.initializers` function for the incoming weights; entries have the distribution that it
        gives to the full kernel. The default is He et al.'s uniform one, whatever the kernel's layout, and for
        embeddings a normal one of variance 1 / units.
      reset_inner_state: set the inner optimizer's moments of all replaced weights to their initial values.
      compensate_bias: add the mean contribution of a replaced unit to the bias of those that read it. Exact for dense
        kernels; for convolutions, away from zero padding.
      max_replacements: bound on how many units of a group one update replaces, static; what is due beyond it waits.
        By default it follows from the replacement rate. A traced rate has no bound but the group's size, and then
        as many weights are drawn, which is slow: pass a bound.
      key: int or jax key for the fresh weights.

    Returns:
      a transformation whose update takes the `features` that `with_features` returned:
      `tx.update(grads, state, params, features=features)`; its state is a `ContinualBackpropState`, in a chain found by
      `optax.tree_utils.tree_get(state, "ContinualBackpropState")`.

    Raises:
      ValueError: an argument is out of range; in `init`, units that do not match the params, an inner state that is
        not understood, or no bias to compensate; in `update`, params or features are missing or of wrong shapes.

    Example:
      >>> import jax, jax.numpy as jnp, optax, cbp_jax
      >>> def apply_fn(params, x):
      ...   return jax.nn.relu(x @ params["w1"]) @ params["w2"]
      >>> params = {"w1": jnp.ones((4, 8)), "w2": jnp.ones((8, 2))}
      >>> x, y = jnp.ones((5, 4)), jnp.zeros((5, 2))
      >>> units = cbp_jax.discover_units(apply_fn, params, x)
      >>> apply = cbp_jax.with_features(apply_fn, units)
      >>> tx = cbp_jax.continual_backprop(optax.sgd(0.01), units, replacement_rate=0.5, maturity_threshold=0)
      >>> state = tx.init(params)
      >>> def loss(params):
      ...   output, features = apply(params, x)
      ...   return jnp.mean((output - y) ** 2), features
      >>> grads, features = jax.grad(loss, has_aux=True)(params)
      >>> updates, state = tx.update(grads, state, params, features=features)
      >>> params = optax.apply_updates(params, updates)
      >>> int(state.replaced["w1"].sum()), int((params["w2"] == 0).all(1).sum())
      (4, 4)

    References:
      Dohare et al., `Loss of plasticity in deep continual learning
      <https://doi.org/10.1038/s41586-024-07711-7>`_, Nature 2024
    """
    check_scalar("replacement_rate", replacement_rate, at_least=0, at_most=1)
    check_scalar("decay_rate", decay_rate, at_least=0, below=1)
    check_scalar("maturity_threshold", maturity_threshold, at_least=0)
    if max_replacements is not None and (type(max_replacements) is not int or max_replacements < 1):
        raise ValueError(f"max_replacements must be a positive int or None, got {max_replacements!r}")
    units = tuple(units)
    utility_fn = utility_lib.get_utility(utility)
    if initializer is not None and not callable(initializer):
        raise TypeError(f"initializer must be a function of (key, shape, dtype) or None, got {initializer!r}")
    key_data, key_impl = keys.as_key_data(key)
    inner = optax.with_extra_args_support(inner)

    def most_replacements(group: units_lib.UnitGroup) -> int:
        most = group.size if max_replacements is None else max_replacements
        if not isinstance(replacement_rate, jax.core.Tracer):
            most = min(most, math.floor(float(replacement_rate) * group.size + _ROUNDING) + 1)
        return min(most, group.size)

    def init_fn(params: optax.Params) -> ContinualBackpropState:
        checked = units_lib.check_units(units, params)
        inner_state = inner.init(params)
        if reset_inner_state:
            paths = {part.path for group in checked for part in group.slices()}
            sizes = {group.name: group.size for group in checked}
            inner_state_lib.check(inner, inner_state, params, paths, sizes)
        for group in checked:
            for consumer in group.outgoing if compensate_bias else ():
                if consumer.bias is None and not consumer.absorbed:
                    raise ValueError(
                        f"compensate_bias=True, but {consumer.kernel.path!r}, which reads group {group.name!r}, "
                        "has no bias"
                    )
        return ContinualBackpropState(
            key=keys.init_key(jax.random.wrap_key_data(key_data, impl=key_impl), params),
            count=jnp.zeros([], jnp.int32),
            utility={group.name: jnp.zeros(group.size, jnp.float32) for group in checked},
            age={group.name: jnp.zeros(group.size, jnp.int32) for group in checked},
            mean_activation={
                group.name: tuple(jnp.zeros(consumer.kernel.index.shape, jnp.float32) for consumer in group.operands())
                for group in checked
            },
            budget={group.name: jnp.zeros([], jnp.float32) for group in checked},
            replaced={group.name: jnp.zeros(group.size, bool) for group in checked},
            inner_state=inner_state,
        )

    def update_fn(
        updates: optax.Updates,
        state: ContinualBackpropState,
        params: optax.Params | None = None,
        *,
        features: units_lib.Features | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ContinualBackpropState]:
        if params is None:
            raise ValueError("continual_backprop needs the params: tx.update(grads, state, params, features=features)")
        checked = units_lib.check_units(units, params)
        activations = {group.name: group_activations(group, features) for group in checked}
        grads = units_lib.leaves_by_path(updates)
        inner_updates, inner_state = inner.update(updates, state.inner_state, params, features=features, **extra_args)
        surgery = surgery_lib.Surgery(units_lib.leaves_by_path(params), units_lib.leaves_by_path(inner_updates))

        def random_key(stream: chex.Numeric) -> chex.PRNGKey:
            key = jax.random.wrap_key_data(state.key, impl=key_impl)
            return jax.random.fold_in(jax.random.fold_in(key, state.count), stream)

        log_decay = jnp.log(jnp.asarray(decay_rate, jnp.float32))
        new: dict[str, dict[str, Any]] = {field: {} for field in state._fields}
        picked = []

        for number, group in enumerate(checked):
            name, h = group.name, activations[group.name]
            age = state.age[name] + 1
            start = -jnp.expm1(age * log_decay)  # 1 - decay_rate**age; powers of scalars are slow on CPU
            means = tuple(
                decay_rate * old + (1 - decay_rate) * utility_lib.batch_mean(values, old.shape[0])
                for old, values in zip(state.mean_activation[name], h, strict=True)
            )
            corrected_means = tuple(mean / start for mean in means)
            view = utility_lib.GroupView(
                group, h, corrected_means, surgery, grads, surgery.magnitude, random_key(number)
            )
            instantaneous = utility_fn(view)
            if jnp.shape(instantaneous) != (group.size,):
                raise ValueError(
                    f"utility must return an array of shape ({group.size},) for group {name!r}, got "
                    f"{jnp.shape(instantaneous)}"
                )
            utility_now = decay_rate * state.utility[name] + (1 - decay_rate) * instantaneous

            eligible = age > maturity_threshold
            # As a product, which is one operation on CPU where a sum is three.
            mature = jnp.dot(eligible.astype(jnp.float32), jnp.ones(group.size, jnp.float32), precision="highest")
            budget = state.budget[name] + replacement_rate * mature
            most = most_replacements(group)
            chosen, budget = _choose(utility_now / start, eligible, budget, most, max_replacements is not None)
            replaced = surgery_lib.as_mask(chosen, group.size)

            if compensate_bias:
                surgery.compensate(group, chosen, corrected_means)
            surgery.drop(group, replaced)

            new["utility"][name] = jnp.where(replaced, 0, utility_now)
            new["age"][name] = jnp.where(replaced, 0, age)
            new["mean_activation"][name] = tuple(jnp.where(replaced, 0, mean) for mean in means)
            new["budget"][name] = budget
            new["replaced"][name] = replaced
            picked.append(chosen)

        surgery.replace(checked, picked, initializer, lambda: random_key(len(checked)))
        new_updates = jax.tree_util.tree_map_with_path(
            lambda path, leaf: surgery.updates.get(units_lib.join_path(path), leaf), inner_updates
        )
        if reset_inner_state:
            new_params = optax.apply_updates(params, new_updates)
            inner_state = inner_state_lib.reset(inner, inner_state, new_params, surgery.masks, new["replaced"])
        new_state = state._replace(
            count=optax.safe_increment(state.count),
            inner_state=inner_state,
            **{field: new[field] for field in ("utility", "age", "mean_activation", "budget", "replaced")},
        )
        return new_updates, new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _choose(
    utility: chex.Array, eligible: chex.Array, budget: chex.Array, most: int, bounded: bool
) -> tuple[chex.Array, chex.Array]:
    """Spends the budget on the eligible units of least utility.

    Args:
      utility: float32 [units].
      eligible: bool [units].
      budget: float32 [].
      most: bound on the number of units.
      bounded: whether more than that may be due.

    Returns:
      int32 [most], the chosen units, with the number of units for those that are not due; the rest of the budget.
    """
    size = utility.shape[0]
    due = jnp.floor(budget + _ROUNDING)
    score = jnp.where(eligible & jnp.isfinite(utility), utility, jnp.inf)
    if most == 1:  # the first of the least; on CPU two minima take half the time of an argmin
        ranked = jnp.min(jnp.where(score == jnp.min(score), jnp.arange(size), size - 1))[None]
    else:
        ranked = jax.lax.top_k(-score, most)[1]
    chosen = jnp.where((jnp.arange(most) < due) & jnp.isfinite(score[ranked]), ranked, size)
    # What `most` holds back stays due. Units of non-finite utility leave no debt.
    rest = jnp.maximum(budget - due, 0) + (jnp.clip(due - most, 0, size) if bounded else 0)
    return chosen, rest
