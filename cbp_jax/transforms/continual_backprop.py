"""Continual backpropagation (Dohare et al., Nature 2024, Algorithm 1) as an optax transformation."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from cbp_jax import replacement
from cbp_jax import units as units_lib
from cbp_jax.numerics.scalars import check_scalar, check_static
from cbp_jax.replacement import resample
from cbp_jax.replacement.edits import as_mask
from cbp_jax.replacement.views import batch_mean

# Sums of float32 fractions can be slightly less than an integer: a hundred times 0.01 is 0.99999934.
_ROUNDING = 1e-5


class ContinualBackpropState(NamedTuple):
    """State of continual backpropagation; dicts go from group name to that group's arrays."""

    key: chex.Array  # raw uint32 key data, constant
    count: chex.Array  # int32 [], updates so far
    utility: dict[str, chex.Array]  # float32 [units], running mean, not bias-corrected
    age: dict[str, chex.Array]  # int32 [units], updates since the unit was made
    mean_activation: dict[str, tuple[chex.Array, ...]]  # float32 [positions, units], not bias-corrected
    budget: dict[str, chex.Array]  # float32 [], replacements that are due but not made yet
    replaced: dict[str, chex.Array]  # bool [units], units replaced in the last update
    inner_state: optax.OptState
    initial: Mapping[str, chex.Array] = {}  # by path, for reinitializations that need initial parameters


def continual_backprop(
    inner: optax.GradientTransformation,
    units: Sequence[units_lib.UnitGroup],
    *,
    replacement_rate: chex.Numeric = 1e-4,
    decay_rate: chex.Numeric = 0.99,
    maturity_threshold: chex.Numeric = 100,
    utility: str | replacement.Utility = "contribution",
    initializer: resample.Initializer | None = None,
    reinitialization: str | replacement.Reinitialization = "resample",
    reset_inner_state: bool = True,
    compensate_bias: bool = False,
    max_replacements: int | None = None,
    key: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Continually replace a small fraction of mature units of low utility.

    After each update of the inner optimizer, for every group of units from input to output (Algorithm 1):

    1. ages grow by one, and utilities are averaged, `u <- d u + (1 - d) y` with decay rate d;
    2. units older than the maturity threshold are eligible, and the group's budget grows by the replacement rate
       times their number;
    3. the integer part of the budget is the number of units to replace, those of smallest `u / (1 - d**age)`: their
       incoming weights are resampled, scales of normalization become 1, and biases, outgoing weights, utility, age and
       mean activation become 0. The fractional part of the budget is kept. (Running statistics are not parameters;
       `reset_batch_stats` resets them.)

    A replacement is an update like any other, `fresh - param`, so the transformation composes with all others. If two
    adjacent groups replace units in one step, the weight between two new units is drawn, not 0. With
    `replacement_rate=0` the updates are bit for bit those of `inner`.

    In a chain, every transformation with state for each weight (momentum, Adam) belongs inside, as `inner`, so that its
    state is reset for replaced weights. Gradient clipping may come before. No transformation that changes updates may
    follow. In `optax.inject_hyperparams`, name `max_replacements`, and a callable `utility`, `initializer` or
    `reinitialization`, in `static_args`.

    Args:
      inner: the optimizer that trains the network.
      units: groups of units, from `discover_units` or written by hand.
      replacement_rate: number of replacements per eligible unit and update, in [0, 1]. May be traced.
      decay_rate: decay rate of the running means of utility and activation, in [0, 1). May be traced.
      maturity_threshold: age in updates above which a unit may be replaced, >= 0. May be traced.
      utility: "contribution", "zero_contribution", "adaptation", "adaptable_contribution", "weight", "random"; from
        gradients "taylor", "fisher", "snip", "gradient", "upgd"; with the diagonal of the Hessian
        "taylor_second_order", "upgd_second_order" (see :mod:`cbp_jax.replacement.utility`); or a function of a
        `GroupView` that returns an array [units]. Units of non-finite utility are not replaced.
      initializer: `jax.nn.initializers` function for the incoming weights. New entries have the distribution that it
        gives to the full kernel. The default is He et al.'s uniform one, adapted to each kernel's layout, and for
        embeddings a normal distribution of variance 1 / units.
      reinitialization: what replaced units start from: "resample", as above; "rewind", the unit's own incoming weights
        and biases at the start of training; "resample_both", where outgoing weights are drawn too; "orthogonal",
        orthogonal to the incoming weights of living units; "split", half of the most useful unit; "regrow", along the
        negative gradient (see :mod:`cbp_jax.replacement.reinitialization`); or a function of a `NewUnits` that returns
        a `Fresh`.
      reset_inner_state: set the inner optimizer's moments of all replaced weights to their initial values.
      compensate_bias: add the mean contribution of a replaced unit to the biases of its consumers. Exact for dense
        kernels, and for convolutions away from zero padding.
      max_replacements: the most units of a group that one update may replace, a static int; further replacements are
        postponed. By default it follows from the replacement rate. Set it if the rate is traced: the default is then
        the group's size, so that weights are drawn for the whole group at every update, which is slow.
      key: int or jax key for the fresh weights.

    Returns:
      a transformation whose update takes the `features` that `with_features` returned:
      `tx.update(grads, state, params, features=features)`, and for utilities of second order `hessian_diag`, a tree
      like the params (see :mod:`cbp_jax.curvature`). Its state is a `ContinualBackpropState`; to find it in a chain's
      state, use `optax.tree_utils.tree_get(state, "ContinualBackpropState")`.

    Raises:
      ValueError: an argument is out of range; in `init`, the units do not match the params, the inner state is not
        understood, or a consumer has no bias for the compensation; in `update`, params, features, or a Hessian diagonal
        that the utility needs, are missing or of wrong shapes.

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
    check_static("max_replacements", max_replacements, optional=True)
    policy = _policy(replacement_rate, decay_rate, maturity_threshold, utility, compensate_bias, max_replacements)
    return replacement.replace_units(
        inner,
        units,
        policy,
        initializer=initializer,
        reinitialization=reinitialization,
        reset_inner_state=reset_inner_state,
        key=key,
    )


def _policy(
    replacement_rate: chex.Numeric,
    decay_rate: chex.Numeric,
    maturity_threshold: chex.Numeric,
    utility: str | replacement.Utility,
    compensate_bias: bool,
    max_replacements: int | None,
) -> replacement.Policy:
    """Return the policy of Algorithm 1. Its arguments are those of `continual_backprop`."""
    utility_fn = replacement.get_utility(utility)

    def init(group: units_lib.UnitGroup, params: optax.Params) -> dict[str, Any]:
        del params
        for consumer in group.outgoing if compensate_bias else ():
            if consumer.bias is None and not consumer.absorbed:
                raise ValueError(
                    f"compensate_bias=True, but {consumer.kernel.path!r}, which reads group {group.name!r}, has no bias"
                )
        return {
            "utility": jnp.zeros(group.size, jnp.float32),
            "age": jnp.zeros(group.size, jnp.int32),
            "mean_activation": tuple(
                jnp.zeros(consumer.kernel.index.shape, jnp.float32) for consumer in group.operands()
            ),
            "budget": jnp.zeros([], jnp.float32),
        }

    def most_replacements(size: int) -> int:
        most = size if max_replacements is None else max_replacements
        if not isinstance(replacement_rate, jax.core.Tracer):
            most = min(most, math.floor(float(replacement_rate) * size + _ROUNDING) + 1)
        return min(most, size)

    def choose(view: replacement.GroupView, memory: dict[str, Any]) -> replacement.Choice:
        size = view.group.size
        age = memory["age"] + 1
        # 1 - decay_rate**age; powers of scalars are slow on CPU
        start = -jnp.expm1(age * jnp.log(jnp.asarray(decay_rate, jnp.float32)))
        means = tuple(
            decay_rate * old + (1 - decay_rate) * batch_mean(values, old.shape[0])
            for old, values in zip(memory["mean_activation"], view.features, strict=True)
        )
        view = dataclasses.replace(view, mean_activation=tuple(mean / start for mean in means))
        instantaneous = utility_fn(view)
        if jnp.shape(instantaneous) != (size,):
            raise ValueError(
                f"utility must return an array of shape ({size},) for group {view.group.name!r}, got "
                f"{jnp.shape(instantaneous)}"
            )
        utility_now = decay_rate * memory["utility"] + (1 - decay_rate) * instantaneous

        eligible = age > maturity_threshold
        # As a product, which is one operation on CPU; a sum is three.
        mature = jnp.dot(eligible.astype(jnp.float32), jnp.ones(size, jnp.float32), precision="highest")
        budget = memory["budget"] + replacement_rate * mature
        chosen, budget = _choose(
            utility_now / start, eligible, budget, most_replacements(size), max_replacements is not None
        )
        replaced = as_mask(chosen, size)
        memory = {
            "utility": jnp.where(replaced, 0, utility_now),
            "age": jnp.where(replaced, 0, age),
            "mean_activation": tuple(jnp.where(replaced, 0, mean) for mean in means),
            "budget": budget,
        }
        removed = view.mean_activation if compensate_bias else None
        return replacement.Choice(chosen, memory, removed, utility_now / start)

    return replacement.Policy(choose, init, state=ContinualBackpropState, name="continual_backprop")


def _choose(
    utility: chex.Array, eligible: chex.Array, budget: chex.Array, most: int, bounded: bool
) -> tuple[chex.Array, chex.Array]:
    """Spend the budget on the eligible units of smallest utility.

    Args:
      utility: float32 [units].
      eligible: bool [units].
      budget: float32 [].
      most: the most units to choose.
      bounded: whether more than that may be due.

    Returns:
      the chosen units, int32 [most], where the group's size stands for no unit; and the rest of the budget.
    """
    size = utility.shape[0]
    due = jnp.floor(budget + _ROUNDING)
    score = jnp.where(eligible & jnp.isfinite(utility), utility, jnp.inf)
    if most == 1:  # the first of the smallest; on CPU two minima take half the time of an argmin
        ranked = jnp.min(jnp.where(score == jnp.min(score), jnp.arange(size), size - 1))[None]
    else:
        ranked = jax.lax.top_k(-score, most)[1]
    chosen = jnp.where((jnp.arange(most) < due) & jnp.isfinite(score[ranked]), ranked, size)
    # Units postponed by `most` stay in the budget. Units of non-finite utility do not.
    rest = jnp.maximum(budget - due, 0) + (jnp.clip(due - most, 0, size) if bounded else 0)
    return chosen, rest
