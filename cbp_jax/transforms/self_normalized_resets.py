"""Self-normalized resets (Farias & Jozefiak, 2025): resets units that are silent improbably long, given their past."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cbp_jax import replacement
from cbp_jax import units as units_lib
from cbp_jax.numerics.by_unit import all_but_units
from cbp_jax.numerics.periods import is_due, when_due
from cbp_jax.numerics.scalars import check_scalar, check_static, check_whole
from cbp_jax.replacement import resample
from cbp_jax.replacement.edits import as_mask


class SelfNormalizedResetsState(NamedTuple):
    """State of :func:`self_normalized_resets`; dicts go from group name to that group's arrays."""

    key: chex.Array  # raw uint32 key data, constant
    count: chex.Array  # int32 [], updates so far
    silence: dict[str, chex.Array]  # int32 [units], updates since the unit last fired or was reset
    threshold: dict[str, chex.Array]  # int32 [units], silence at which the unit is reset
    history: dict[str, chex.Array]  # int32 [units, max_silence], how many silences lasted 1, 2, ... updates
    replaced: dict[str, chex.Array]  # bool [units], units reset in the last update
    inner_state: optax.OptState


def self_normalized_resets(
    inner: optax.GradientTransformation,
    units: Sequence[units_lib.UnitGroup],
    *,
    rejection: chex.Numeric = 0.02,
    every: chex.Numeric = 1000,
    max_silence: int = 1000,
    max_resets: int | None = None,
    initializer: resample.Initializer | None = None,
    reset_inner_state: bool = True,
    key: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Reset a unit once it has been inactive for longer than its own history makes plausible.

    A unit fires in an update if its activation is above 0 for some example and position. With :math:`a_i` the number of
    updates since unit i last fired, and :math:`A_i` the distribution of its past silences' lengths, it is reset
    (Algorithm 1) as soon as

    .. math:: P(A_i \ge a_i) \le \eta.

    Its incoming weights are then resampled, scales of normalization become 1, and biases and outgoing weights become
    0, as in :func:`continual_backprop`, which also explains the position in a chain.

    The paper leaves open how the distribution is estimated. As in the authors' program, a histogram of silences is kept
    for each unit, and the unit's threshold :math:`\tau_i` is periodically computed from it: the shortest silence
    :math:`q` with :math:`P(A_i \ge q) \le \eta` if :math:`q < \tau_i`, else :math:`2 \tau_i`, capped at `max_silence`,
    the initial threshold. Then the histogram is cleared. A silence ended by a reset is recorded too, so that a
    threshold that resets too often grows. The new unit inherits threshold and histogram.

    Our choices that differ from that program:

    - silences are counted in updates, not in examples, so that they do not depend on the batch size;
    - the threshold q obeys the paper's inequality; the program's percentile is smaller by 1, and would reset a unit
      whose silences all last one update as soon as it is silent;
    - only silences of at least one update are counted, as in the program, but a unit with no such silence since the
      last computation keeps its threshold; in the program it falls to the smallest possible.

    Args:
      inner: the optimizer that trains the network.
      units: groups of units, from `discover_units` or written by hand.
      rejection: :math:`\eta`, the probability of a silence at or below which the unit is reset, in [0, 1]. May be
        traced.
      every: number of updates between computations of the thresholds, a whole number >= 1. May be traced.
      max_silence: the longest silence that is recorded and the largest threshold, in updates; a static int >= 1. The
        state has that many numbers for each unit. In `optax.inject_hyperparams`, name it and `max_resets` in
        `static_args`.
      max_resets: the most units of a group that one update may reset, a static int. Others wait while they stay silent;
        the most overdue come first. None means no limit, which is slow if seeds are vmapped, because random weights are
        then drawn for whole groups.
      initializer: `jax.nn.initializers` function for the incoming weights; see :func:`continual_backprop`.
      reset_inner_state: set the inner optimizer's moments of all replaced weights to their initial values.
      key: int or jax key for the fresh weights. `init` mixes the params into it (see :func:`keys.init_key`).

    Returns:
      a transformation whose update takes the `features` that `with_features` returned:
      `tx.update(grads, state, params, features=features)`. Its state is a `SelfNormalizedResetsState`.

    Raises:
      ValueError: an argument is out of range; in `init`, the units do not match the params, or the inner state is not
        understood; in `update`, params or features are missing or of wrong shapes.

    Example:
      >>> import jax, jax.numpy as jnp, optax, cbp_jax
      >>> def apply_fn(params, x):
      ...   return jax.nn.relu(x @ params["w1"]) @ params["w2"]
      >>> params = {"w1": jnp.ones((4, 3)).at[:, 1].set(-1.0), "w2": jnp.ones((3, 2))}
      >>> units = cbp_jax.discover_units(apply_fn, params, jnp.ones((5, 4)))
      >>> _, features = cbp_jax.with_features(apply_fn, units)(params, jnp.ones((5, 4)))
      >>> tx = cbp_jax.self_normalized_resets(optax.sgd(0.0), units, max_silence=3)
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...   updates, state = tx.update(params, state, params, features=features)
      ...   print(state.silence["w1"].tolist(), state.replaced["w1"].tolist())
      [0, 1, 0] [False, False, False]
      [0, 2, 0] [False, False, False]
      [0, 0, 0] [False, True, False]

    References:
      Farias & Jozefiak, `Self-normalized resets for plasticity in continual learning
      <https://arxiv.org/abs/2410.20098>`_, ICLR 2025
    """
    check_scalar("rejection", rejection, at_least=0, at_most=1)
    check_whole("every", every)
    check_static("max_silence", max_silence)
    check_static("max_resets", max_resets, optional=True)

    def init(group: units_lib.UnitGroup, params: optax.Params) -> dict[str, Any]:
        del params
        return {
            "silence": jnp.zeros(group.size, jnp.int32),
            "threshold": jnp.full(group.size, max_silence, jnp.int32),
            "history": jnp.zeros((group.size, max_silence), jnp.int32),
        }

    def choose(view: replacement.GroupView, memory: dict[str, Any]) -> replacement.Choice:
        size, before = view.group.size, memory["silence"]
        fired = _fired(view.features)
        silence = jnp.where(fired, 0, before + 1)
        overdue = silence >= memory["threshold"]
        if max_resets is None:
            chosen = reset = overdue
        else:
            late, first = jax.lax.top_k(jnp.where(overdue, silence - memory["threshold"], -1), min(max_resets, size))
            chosen = jnp.where(late >= 0, first, size)
            reset = as_mask(chosen, size)
        ended = jnp.where(fired, before, jnp.where(reset, silence, 0))  # 0 if no silence ended
        slot = jnp.where(ended > 0, jnp.minimum(ended, max_silence) - 1, max_silence)
        history = memory["history"].at[np.arange(size), slot].add(1, mode="drop")
        threshold, history = when_due(
            is_due(view.count, every), lambda values: _recompute(*values, rejection), (memory["threshold"], history)
        )
        memory = {"silence": jnp.where(reset, 0, silence), "threshold": threshold, "history": history}
        return replacement.Choice(chosen, memory)

    policy = replacement.Policy(choose, init, state=SelfNormalizedResetsState, name="self_normalized_resets")
    return replacement.replace_units(
        inner, units, policy, initializer=initializer, reset_inner_state=reset_inner_state, key=key
    )


def _fired(activations: tuple[chex.Array, ...]) -> chex.Array:
    """Return which units are above 0 anywhere in the batch, in any of the arrays that consumers read, bool [units]."""
    fired = [jnp.any(h > 0, axis=all_but_units(h)) for h in activations]
    return jnp.any(jnp.stack(fired), axis=0)


def _recompute(threshold: chex.Array, history: chex.Array, rejection: chex.Numeric) -> tuple[chex.Array, chex.Array]:
    """Return thresholds from the histogram of silences, and an empty histogram."""
    total = jnp.sum(history, 1)
    as_long = total[:, None] - jnp.cumsum(history, 1) + history  # silences of at least 1, 2, ... updates
    allowed = jnp.asarray(rejection, jnp.float32) * total
    least = 1 + jnp.sum(as_long > allowed[:, None], 1, dtype=jnp.int32)
    new = jnp.where(least < threshold, least, jnp.minimum(2 * threshold, history.shape[1]))
    return jnp.where(total > 0, new, threshold), jnp.zeros_like(history)
