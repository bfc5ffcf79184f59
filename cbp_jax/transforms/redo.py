"""ReDo (Sokar et al., 2023): periodically recycles all dormant units."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from cbp_jax import replacement
from cbp_jax import units as units_lib
from cbp_jax.numerics import by_unit
from cbp_jax.numerics.periods import is_due
from cbp_jax.numerics.scalars import check_scalar, check_whole
from cbp_jax.replacement import resample


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
    score: Callable[[replacement.GroupView], chex.Array] | None = None,
    initializer: resample.Initializer | None = None,
    reset_inner_state: bool = True,
    key: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Periodically recycle dormant units.

    After every `every`-th update of the inner optimizer, recycle the units whose activations on that batch are small
    relative to their group's. For unit i of a group of H units,

    .. math:: s_i = \frac{E|h_i|}{\frac{1}{H} \sum_k E|h_k|} \le \tau.

    Their incoming weights are resampled, scales of normalization become 1, and biases and outgoing weights become 0.
    (Running statistics are not parameters; call `reset_batch_stats` with the state's `replaced`.) The mean runs over
    examples and positions. If consumers read different arrays, the score is the mean of the scores on each. A group
    that is silent on the whole batch is recycled as a whole, as :func:`metrics.dormant_fraction` counts it. A group
    with non-finite activations is not recycled. The batch must be large enough for meaningful scores: on a single
    example about half of all ReLU units are silent.

    A replacement is an update like any other, `fresh - param`. Groups are processed from input to output. For the
    position in a chain see :func:`continual_backprop`. Other updates are bit for bit those of `inner`.

    Args:
      inner: the optimizer that trains the network.
      units: groups of units, from `discover_units` or written by hand.
      threshold: :math:`\tau`, largest score of a dormant unit, >= 0. May be traced.
      every: number of updates between recyclings, a whole number >= 1. May be traced.
      score: a function of a `GroupView` that returns scores, float [units], to use instead of the above. Units whose
        score is not a number are not recycled. See :func:`regrama`.
      initializer: `jax.nn.initializers` function for the incoming weights. New entries have the distribution that it
        gives to the full kernel. The default is He et al.'s uniform one, adapted to each kernel's layout.
      reset_inner_state: set the inner optimizer's moments of all replaced weights to their initial values.
      key: int or jax key for the fresh weights. `init` mixes the params into it (see :func:`keys.init_key`).

    Returns:
      a transformation whose update takes the `features` that `with_features` returned:
      `tx.update(grads, state, params, features=features)`. Its state is a `RedoState`.

    Raises:
      ValueError: an argument is out of range; in `init`, the units do not match the params, or the inner state is not
        understood; in `update`, params or features are missing or of wrong shapes.

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
    check_whole("every", every)

    score = activation_score if score is None else score

    def choose(view: replacement.GroupView, memory: dict[str, Any]) -> replacement.Choice:
        return replacement.Choice(score(view) <= threshold, memory)

    policy = replacement.Policy(
        choose,
        due=lambda count: is_due(count, every),
        state=RedoState,
        name="redo",
    )
    return replacement.replace_units(
        inner, units, policy, initializer=initializer, reset_inner_state=reset_inner_state, key=key
    )


def activation_score(view: replacement.GroupView) -> chex.Array:
    """Return the mean absolute activation of each unit divided by the group's, float32 [units]; NaN if one is not
    finite."""
    scores = []
    for h in view.features:
        size = by_unit.mean_abs(h)
        scores.append(jnp.where(jnp.isfinite(jnp.mean(size)), by_unit.relative(size), jnp.nan))
    return sum(scores) / len(scores)
