"""Adam that starts its clock anew now and then (Adam-Rel; Ellis et al., 2024), or forgets its moments too."""

from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from cbp_jax.numerics.periods import is_due
from cbp_jax.numerics.scalars import check_scalar, check_whole
from cbp_jax.transforms.adam import ScaleByAdamState, scale_by_adam

Forget = Literal["time", "moments"]


class ScaleByAdamResetState(NamedTuple):
    """State of :func:`scale_by_adam_reset`."""

    count: chex.Array  # int32 [], updates so far
    adam: ScaleByAdamState  # its counts are those since the last reset


def scale_by_adam_reset(
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    *,
    every: chex.Numeric = 1000,
    forget: Forget = "time",
) -> optax.GradientTransformation:
    """Rescales gradients as Adam does, and forgets now and then. See :func:`adam_reset`.

    Args:
      b1: decay rate of the mean of gradients, in [0, 1).
      b2: decay rate of the mean of squared gradients, in [0, 1).
      eps: added to the root of the mean square, >= 0.
      every: updates from one reset to the next.
      forget: "time" or "moments".

    Returns:
      an optax transformation; its updates have the gradients' dtype.

    Raises:
      ValueError: a setting is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = scale_by_adam_reset(every=2)
      >>> state = tx.init(jnp.zeros(1))
      >>> for _ in range(3):
      ...   _, state = tx.update(jnp.ones(1), state)
      >>> int(state.count), state.adam.count.tolist()
      (3, [1])
    """
    check_whole("every", every)
    if forget not in ("time", "moments"):
        raise ValueError(f"forget must be 'time' or 'moments', got {forget!r}")
    adam = scale_by_adam(b1, b2, eps)

    def init_fn(params: optax.Params) -> ScaleByAdamResetState:
        return ScaleByAdamResetState(jnp.zeros([], jnp.int32), adam.init(params))

    def update_fn(
        updates: optax.Updates, state: ScaleByAdamResetState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByAdamResetState]:
        due = is_due(state.count, every)
        cleared = lambda tree: jax.tree.map(lambda leaf: jnp.where(due, jnp.zeros_like(leaf), leaf), tree)
        if forget == "moments":
            start = cleared(state.adam)
        else:
            start = state.adam._replace(count=cleared(state.adam.count))
        updates, start = adam.update(updates, start, params)
        return updates, ScaleByAdamResetState(optax.safe_increment(state.count), start)

    return optax.GradientTransformation(init_fn, update_fn)


def adam_reset(
    learning_rate: optax.ScalarOrSchedule,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    *,
    every: chex.Numeric = 1000,
    forget: Forget = "time",
) -> optax.GradientTransformationExtraArgs:
    r"""Adam whose step count starts anew every so many updates.

    With gradient g and n the number of updates since the last reset, this one included,

    .. math::
        m \leftarrow b_1 m + (1 - b_1) g, \quad v \leftarrow b_2 v + (1 - b_2) g^2, \quad
        u = -\eta \frac{m / (1 - b_1^n)}{\sqrt{v / (1 - b_2^n)} + \epsilon}.

    With `forget="time"` this is Adam-Rel: m and v go on, and are corrected as if they had started anew. Where the new
    objective has much larger gradients than the old, the first step is of the size of the learning rate, not
    :math:`(1 - b_1) / \sqrt{1 - b_2}` (3.16) times as large; where nothing has changed it is 0.32 of it, and grows
    back. With `forget="moments"` m and v become 0 too, and Adam starts from scratch.

    The paper resets where the target of reinforcement learning changes: at each new rollout of PPO, or copy of DQN's
    target network. Here a reset comes after every so many updates, so that nothing need be known of tasks.

    Args:
      learning_rate: a number, a tracer, or an optax schedule, whose own count is not reset.
      b1: decay rate of the mean of gradients, in [0, 1). May be traced, as b2, eps and every.
      b2: decay rate of the mean of squared gradients, in [0, 1).
      eps: added to the root of the mean square, >= 0.
      every: updates from one reset to the next, a whole number >= 1.
      forget: "time" for the step count alone, "moments" for the moments with it.

    Returns:
      an optax transformation, the chain of :func:`scale_by_adam_reset` and `optax.scale_by_learning_rate`. The count is
      one for each weight, as in :func:`adam`, so that replaced units start over by themselves.

    Raises:
      ValueError: a setting is out of range.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = adam_reset(0.5, every=10)
      >>> params = jnp.array([1.0, 2.0])
      >>> updates, state = tx.update(2 * params, tx.init(params), params)
      >>> optax.apply_updates(params, updates).round(4).tolist()
      [0.5, 1.5]

    References:
      Ellis et al., `Adam on local time: addressing nonstationarity in RL with relative Adam timesteps
      <https://arxiv.org/abs/2412.17113>`_, NeurIPS 2024
    """
    if not callable(learning_rate):
        check_scalar("learning_rate", learning_rate)
    scale = scale_by_adam_reset(b1, b2, eps, every=every, forget=forget)
    return optax.chain(scale, optax.scale_by_learning_rate(learning_rate))
