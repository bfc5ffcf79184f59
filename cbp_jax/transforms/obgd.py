"""Overshooting-bounded gradient descent and eligibility traces (Elsayed et al., 2024), for learning from a stream."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from cbp_jax.numerics.rounding import rounded
from cbp_jax.numerics.scalars import check_scalar


class TracesState(NamedTuple):
    """State of :func:`eligibility_traces` and of :func:`obgd`."""

    traces: optax.Params  # of the params' structure and shapes, float32 (float64 for float64 params)


def eligibility_traces(
    discount: chex.Numeric = 0.99, trace_decay: chex.Numeric = 0.8
) -> optax.GradientTransformationExtraArgs:
    r"""Turn gradients of a value and a TD error into the direction of TD(lambda), for any optimizer.

    With the gradient g of the value (or of the logarithm of the policy) and the TD error :math:`\delta`,

    .. math::
        z \leftarrow \gamma \lambda z + g, \qquad u = -\delta z.

    The optimizer that follows treats u as a gradient: `optax.chain(eligibility_traces(), optax.sgd(alpha))` is
    TD(lambda) with accumulating traces, :math:`w \leftarrow w + \alpha \delta z`.

    Args:
      discount: gamma, the discount for each step, in [0, 1]. May be traced.
      trace_decay: lambda, in [0, 1]. May be traced. 0 is one-step TD.

    Returns:
      an optax transformation, whose update needs the extra argument `td_error`, float []. With `reset_traces`, bool [],
      traces are 0 after the update, as at the end of an episode.

    Raises:
      ValueError: a setting is out of range; in `update`, the TD error is missing.

    Example:
      >>> tx = eligibility_traces(discount=1.0, trace_decay=0.5)
      >>> state = tx.init(jnp.zeros(1))
      >>> for td_error in (1.0, 2.0):
      ...   updates, state = tx.update(jnp.ones(1), state, td_error=td_error)
      >>> updates.item(), state.traces.item()
      (-3.0, 1.5)

    References:
      Sutton & Barto, `Reinforcement learning: an introduction <http://incompleteideas.net/book/the-book-2nd.html>`_,
      2nd edition, 2018, chapter 12
    """
    _check_decays(discount, trace_decay)

    def update_fn(
        updates: optax.Updates,
        state: TracesState,
        params: optax.Params | None = None,
        *,
        td_error: chex.Numeric | None = None,
        reset_traces: chex.Numeric = False,
        **extra_args: Any,
    ) -> tuple[optax.Updates, TracesState]:
        del params, extra_args
        traces = _followed(state.traces, updates, discount, trace_decay)
        error = _checked("eligibility_traces", td_error)
        updates = jax.tree.map(lambda g, z: (-error.astype(z.dtype) * z).astype(g.dtype), updates, traces)
        return updates, TracesState(_kept(traces, reset_traces))

    return optax.GradientTransformationExtraArgs(_init, update_fn)


def obgd(
    learning_rate: chex.Numeric = 1.0,
    *,
    discount: chex.Numeric = 0.99,
    trace_decay: chex.Numeric = 0.8,
    kappa: chex.Numeric = 2.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Create overshooting-bounded gradient descent: TD(lambda) with steps so small that none goes past its target.

    With the gradient g of the value (or of the logarithm of the policy) and the TD error :math:`\delta`,

    .. math::
        z &\leftarrow \gamma \lambda z + g, \qquad
        M = \alpha \kappa \max(|\delta|, 1) \lVert z \rVert_1, \\
        w &\leftarrow w + \min\left(\frac{\alpha}{M}, \alpha\right) \delta z.

    M is an upper estimate of the effective step size: how many times an update would correct its TD error, if no
    gradient is much larger than 1, as with normalized inputs and layers. If M is more than 1, the step is divided by
    it. The norm is taken over all weights: networks that are trained separately, such as a policy and a value, need an
    `obgd` each (`optax.partition`).

    Args:
      learning_rate: alpha, the largest step, >= 0. May be traced, like the others.
      discount: gamma, the discount for each step, in [0, 1].
      trace_decay: lambda, in [0, 1].
      kappa: scale of the bound, >= 0; 0 means no bound. The paper uses 2 for values and 3 for policies.

    Returns:
      an optax transformation, whose update needs the extra argument `td_error`, float []. With `reset_traces`, bool [],
      traces are 0 after the update, as at the end of an episode.

    Raises:
      ValueError: a setting is out of range; in `update`, the TD error is missing.

    Example:
      >>> tx = obgd(1.0, kappa=2.0)
      >>> state = tx.init(jnp.zeros(2))
      >>> updates, state = tx.update(jnp.array([3.0, 1.0]), state, td_error=2.0, reset_traces=True)
      >>> updates.tolist(), state.traces.tolist()  # M is 16
      ([0.375, 0.125], [0.0, 0.0])

    References:
      Elsayed, Vasan & Mahmood, `Streaming deep reinforcement learning finally works
      <https://arxiv.org/abs/2410.14606>`_, 2024
    """
    check_scalar("learning_rate", learning_rate, at_least=0)
    check_scalar("kappa", kappa, at_least=0)
    _check_decays(discount, trace_decay)

    def update_fn(
        updates: optax.Updates,
        state: TracesState,
        params: optax.Params | None = None,
        *,
        td_error: chex.Numeric | None = None,
        reset_traces: chex.Numeric = False,
        **extra_args: Any,
    ) -> tuple[optax.Updates, TracesState]:
        del params, extra_args
        traces = _followed(state.traces, updates, discount, trace_decay)
        error = _checked("obgd", td_error)
        size = jnp.float32(sum((jnp.sum(jnp.abs(z)) for z in jax.tree.leaves(traces)), start=0.0))
        alpha = jnp.asarray(learning_rate, jnp.float32)
        bound = alpha * kappa * jnp.maximum(jnp.abs(error), 1) * size
        step = alpha / jnp.maximum(bound, 1) * error
        updates = jax.tree.map(lambda g, z: (step.astype(z.dtype) * z).astype(g.dtype), updates, traces)
        return updates, TracesState(_kept(traces, reset_traces))

    return optax.GradientTransformationExtraArgs(_init, update_fn)


def _check_decays(discount: chex.Numeric, trace_decay: chex.Numeric) -> None:
    check_scalar("discount", discount, at_least=0, at_most=1)
    check_scalar("trace_decay", trace_decay, at_least=0, at_most=1)


def _init(params: optax.Params) -> TracesState:
    wide = lambda w: jnp.promote_types(jnp.result_type(w), jnp.float32)
    return TracesState(jax.tree.map(lambda w: jnp.zeros(jnp.shape(w), wide(w)), params))


def _followed(
    traces: optax.Params, grads: optax.Updates, discount: chex.Numeric, trace_decay: chex.Numeric
) -> optax.Params:
    decay = jnp.asarray(discount, jnp.float32) * jnp.asarray(trace_decay, jnp.float32)
    return jax.tree.map(lambda z, g: rounded(decay.astype(z.dtype) * z) + g.astype(z.dtype), traces, grads)


def _kept(traces: optax.Params, reset: chex.Numeric) -> optax.Params:
    return jax.tree.map(lambda z: jnp.where(jnp.asarray(reset, bool), jnp.zeros_like(z), z), traces)


def _checked(name: str, td_error: chex.Numeric | None) -> chex.Array:
    if td_error is None:
        raise ValueError(f"{name} needs the TD error: tx.update(grads, state, params, td_error=...), got None")
    if jnp.ndim(td_error):
        raise ValueError(f"td_error must be one number, of shape (), got shape {jnp.shape(td_error)}")
    return jnp.asarray(td_error, jnp.float32)
