"""DASH (Shin et al., 2024): shrinks weights periodically, and less if they point along the negative gradient."""

from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import optax

from cbp_jax import units as units_lib
from cbp_jax.numerics.periods import is_due
from cbp_jax.numerics.scalars import check_scalar, check_whole
from cbp_jax.transforms.kernels import Kernels, chosen_kernels, edit_after, wide


class DashState(NamedTuple):
    """State of :func:`dash`."""

    count: chex.Array  # int32 [], updates so far
    descent: dict[str, chex.Array]  # by path of a kernel, running mean of its negative gradient, in float32 at least
    inner_state: optax.OptState


def dash(
    inner: optax.GradientTransformation,
    *,
    every: chex.Numeric,
    least: chex.Numeric = 0.3,
    alpha: chex.Numeric = 0.3,
    kernels: Kernels | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Shrink each unit's incoming weights periodically, depending on their direction (direction-aware shrinking).

    With m the running mean of the negative gradient, :math:`m \leftarrow (1 - \alpha) m - \alpha \nabla L`, the weights
    w that lead to a unit are multiplied by their cosine similarity to it, or by a lower bound,

    .. math:: w \leftarrow \max\left(\lambda, \frac{m \cdot w}{\lVert m \rVert \lVert w \rVert}\right) w :

    weights along the current gradients, such as features, are kept. Others, such as memorized noise, are forgotten. As
    in the authors' program, for convolutions w is a filter from one input channel to one output channel.

    The authors shrink before training on new data, with m the mean over one pass through these data at fixed weights.
    Here m is the mean of the training gradients so far, so no extra pass is needed. They also shrink each layer's
    biases, as one vector; here only kernels are shrunk.

    Args:
      inner: the optimizer that trains the network.
      every: number of updates between shrinkings, a whole number >= 1. May be traced. With the length of a task,
        weights shrink just before new data arrive.
      least: :math:`\lambda`, the smallest factor, in [0, 1]. May be traced.
      alpha: :math:`\alpha`, weight of the newest gradient, in [0, 1]. May be traced.
      kernels: which arrays are shrunk, a function of path (keys joined by "/") and array. By default all of two or more
        axes, whose last axis is the outputs.

    Returns:
      an optax transformation that passes extra arguments on to `inner`. Its state is a `DashState`.

    Raises:
      ValueError: a setting is out of range; in `init`, there is no kernel; in `update`, params are missing.

    Example:
      >>> import jax.numpy as jnp, optax, cbp_jax
      >>> tx = cbp_jax.dash(optax.sgd(0.0), every=1, least=0.5)
      >>> params = {"kernel": jnp.ones((2, 3))}
      >>> grads = {"kernel": jnp.array([[-1.0, 1.0, -7.0], [-1.0, 1.0, 1.0]])}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> [round(float(w), 4) for w in optax.apply_updates(params, updates)["kernel"][0]]
      [1.0, 0.5, 0.6]

    References:
      Shin et al., `DASH: warm-starting neural network training in stationary settings without loss of plasticity
      <https://arxiv.org/abs/2410.23495>`_, NeurIPS 2024
    """
    check_whole("every", every)
    check_scalar("least", least, at_least=0, at_most=1)
    check_scalar("alpha", alpha, at_least=0, at_most=1)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> DashState:
        descent = {path: jnp.zeros_like(wide(w)) for path, w in chosen_kernels(params, kernels).items()}
        return DashState(jnp.zeros([], jnp.int32), descent, inner.init(params))

    def update_fn(
        updates: optax.Updates, state: DashState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, DashState]:
        if params is None:
            raise ValueError("dash needs the params: tx.update(grads, state, params), got params=None")
        grads = units_lib.leaves_by_path(updates)
        a = jnp.asarray(alpha, jnp.float32)
        descent = {path: (m - a * (wide(grads[path]) + m)).astype(m.dtype) for path, m in state.descent.items()}
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        count = optax.safe_increment(state.count)

        def shrink(after):
            return {path: w * jnp.clip(_cosine(descent[path], w), least, 1.0) for path, w in after.items()}

        updates = edit_after(is_due(count, every), shrink, params, updates, descent)
        return updates, DashState(count, descent, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _cosine(a: chex.Array, b: chex.Array) -> chex.Array:
    """Return the cosine of the angle between two kernels, for each output, and for each input of a convolution; 0 if
    one of them is 0."""
    axes = tuple(range(max(1, a.ndim - 2)))
    inner = lambda a, b: jnp.sum(a * b, axes, keepdims=True)
    lengths = jnp.sqrt(inner(a, a) * inner(b, b))
    return jnp.where(lengths > 0, inner(a, b) / jnp.where(lengths > 0, lengths, 1.0), 0.0)
