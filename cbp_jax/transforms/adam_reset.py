"""Adam whose step count is reset periodically (Adam-Rel; Ellis et al., 2024), optionally with its moments."""

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
    adam: ScaleByAdamState  # its counts start at the last reset


def scale_by_adam_reset(
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    *,
    every: chex.Numeric = 1000,
    forget: Forget = "time",
) -> optax.GradientTransformation:
    """Rescale gradients like Adam, with periodic resets. See :func:`adam_reset`.

    Args:
      b1: decay rate of the mean of gradients, in [0, 1).
      b2: decay rate of the mean of squared gradients, in [0, 1).
      eps: added to the root of the mean square, >= 0.
      every: number of updates between resets.
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
    r"""Create Adam whose step count is reset periodically.

    With gradient g and n the number of updates since the last reset, this one included,

    .. math::
        m \leftarrow b_1 m + (1 - b_1) g, \quad v \leftarrow b_2 v + (1 - b_2) g^2, \quad
        u = -\eta \frac{m / (1 - b_1^n)}{\sqrt{v / (1 - b_2^n)} + \epsilon}.

    With `forget="time"` this is Adam-Rel: m and v are kept, but corrected as if they had just started. If the new
    objective has much larger gradients than the old one, the first step has the size of the learning rate, instead of
    being :math:`(1 - b_1) / \sqrt{1 - b_2}` (3.16) times as large. If nothing has changed, the first step is 0.32 of
    its usual size, and steps grow back. With `forget="moments"` m and v become 0 too, and Adam starts from scratch.

    The paper resets when the target of reinforcement learning changes: at each rollout of PPO, or each copy of DQN's
    target network. Here resets are periodic, so that no knowledge of tasks is needed. We know of no public program by
    the authors.

    Args:
      learning_rate: a number, a tracer, or an optax schedule, whose own count is not reset.
      b1: decay rate of the mean of gradients, in [0, 1). May be traced, as b2, eps and every.
      b2: decay rate of the mean of squared gradients, in [0, 1).
      eps: added to the root of the mean square, >= 0.
      every: number of updates between resets, a whole number >= 1.
      forget: what to reset: "time" is the step count, "moments" the moments too.

    Returns:
      an optax transformation, the chain of :func:`scale_by_adam_reset` and `optax.scale_by_learning_rate`. There is a
      count for each weight, as in :func:`adam`, so that replaced units can restart separately.

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
