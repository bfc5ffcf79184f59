"""Penalties on the weights, as gradients or as a proximal step. For L2 toward zero use `optax.add_decayed_weights`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from cbp_jax.numerics.scalars import check_scalar


def add_l1(strength: chex.Numeric) -> optax.GradientTransformation:
    r"""Add the gradient of an L1 penalty, :math:`g \leftarrow g + \lambda\,\mathrm{sign}(w)`.

    Args:
      strength: :math:`\lambda`, the penalty's factor in the loss, >= 0. May be traced.

    Returns:
      an optax transformation to chain before an optimizer. Its update needs the params.

    Raises:
      ValueError: the strength is negative; in `update`, params are missing.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = optax.chain(add_l1(0.25), optax.sgd(1.0))
      >>> params = jnp.array([2.0, 0.0, -3.0])
      >>> updates, _ = tx.update(jnp.zeros(3), tx.init(params), params)
      >>> updates.tolist()
      [-0.25, -0.0, 0.25]
    """
    check_scalar("strength", strength, at_least=0)

    def add(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        _check_params("add_l1", params)
        return jax.tree.map(lambda g, w: (g + strength * jnp.sign(w)).astype(g.dtype), updates, params)

    return optax.stateless(add)


class AddL2InitState(NamedTuple):
    """State of :func:`add_l2_init`."""

    initial: optax.Params  # the params at init, same shapes and dtypes


def add_l2_init(strength: chex.Numeric) -> optax.GradientTransformation:
    r"""Add the gradient of an L2 penalty toward the initial weights, :math:`g \leftarrow g + \lambda (w - w_0)`.

    :math:`w_0` are the params given to `init`. If a wrapper such as `continual_backprop` resets this state for a unit,
    the unit's part of :math:`w_0` becomes its new initial weights.

    Args:
      strength: :math:`\lambda`, for a penalty of :math:`\frac{\lambda}{2} \lVert w - w_0 \rVert^2`, >= 0. May be
        traced.

    Returns:
      an optax transformation to chain before an optimizer. Its update needs the params. Its state is an
      `AddL2InitState`.

    Raises:
      ValueError: the strength is negative; in `update`, params are missing.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = optax.chain(add_l2_init(0.5), optax.sgd(1.0))
      >>> state = tx.init(jnp.array([2.0, 1.0]))
      >>> updates, state = tx.update(jnp.zeros(2), state, jnp.array([4.0, 1.0]))
      >>> updates.tolist()
      [-1.0, -0.0]

    References:
      Kumar et al., `Maintaining plasticity in continual learning via regenerative regularization
      <https://arxiv.org/abs/2308.11958>`_, 2023
    """
    check_scalar("strength", strength, at_least=0)
    return _pull("add_l2_init", AddL2InitState, lambda change: strength * change)


class AddL1InitState(NamedTuple):
    """State of :func:`add_l1_init`."""

    initial: optax.Params  # the params at init, same shapes and dtypes


def add_l1_init(strength: chex.Numeric) -> optax.GradientTransformation:
    r"""Add the gradient of an L1 penalty toward the initial weights.

    .. math:: g \leftarrow g + \lambda\,\mathrm{sign}(w - w_0)

    :math:`w_0` are the params given to `init`. If a wrapper such as `continual_backprop` resets this state for a unit,
    the unit's part of :math:`w_0` becomes its new initial weights. Weights without a gradient of the loss oscillate
    around :math:`w_0` instead of coming to rest there. If the change should be sparse, use :func:`proximal_l1_init`.

    Args:
      strength: :math:`\lambda`, for a penalty of :math:`\lambda \lVert w - w_0 \rVert_1`, >= 0. May be traced.

    Returns:
      an optax transformation to chain before an optimizer. Its update needs the params. Its state is an
      `AddL1InitState`.

    Raises:
      ValueError: the strength is negative; in `update`, params are missing.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = optax.chain(add_l1_init(0.5), optax.sgd(1.0))
      >>> state = tx.init(jnp.array([2.0, 1.0]))
      >>> updates, state = tx.update(jnp.zeros(2), state, jnp.array([4.0, 1.0]))
      >>> updates.tolist()
      [-0.5, -0.0]

    References:
      Gong et al., `Finding the dominant winning ticket in pre-trained language models
      <https://aclanthology.org/2022.findings-acl.115/>`_, Findings of ACL 2022
    """
    check_scalar("strength", strength, at_least=0)
    return _pull("add_l1_init", AddL1InitState, lambda change: strength * jnp.sign(change))


class ProximalL1InitState(NamedTuple):
    """State of :func:`proximal_l1_init`."""

    count: chex.Array  # int32 [], updates so far
    initial: optax.Params  # the params at init, same shapes and dtypes


def proximal_l1_init(
    strength: chex.Numeric, learning_rate: optax.ScalarOrSchedule = 1.0
) -> optax.GradientTransformation:
    r"""Soft-threshold the weights' change since initialization, so that weights that hardly move return to :math:`w_0`.

    With :math:`w' = w + u` the weights after the optimizer's step, the weights become

    .. math:: w_0 + S_{\alpha\lambda}(w' - w_0), \qquad S_t(x) = \mathrm{sign}(x) \max(|x| - t, 0)

    the proximal step of a penalty :math:`\lambda \lVert w - w_0 \rVert_1` (iterative soft thresholding). After adaptive
    optimizers the threshold is the same for all weights, no matter how gradients were scaled.

    A weight that returns becomes exactly :math:`w_0` if the difference is representable in its type, which holds if the
    weight is between half and twice :math:`w_0`. Otherwise it becomes exact in the following steps.

    Args:
      strength: :math:`\lambda`, >= 0. May be traced.
      learning_rate: :math:`\alpha`, the learning rate of the optimizer before it: a number, which may be traced, or a
        schedule. With 1, the strength itself is the threshold.

    Returns:
      an optax transformation to chain after an optimizer. :math:`w_0` is as in :func:`add_l2_init`.

    Raises:
      ValueError: the strength or the learning rate is negative; in `update`, params are missing.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.sgd(0.5), proximal_l1_init(1.0, learning_rate=0.5))
      >>> params = jnp.array([1.0, 1.0])
      >>> updates, state = tx.update(jnp.array([4.0, 0.5]), tx.init(params), params)
      >>> optax.apply_updates(params, updates).tolist()
      [-0.5, 1.0]

    References:
      Beck and Teboulle, `A fast iterative shrinkage-thresholding algorithm for linear inverse problems
      <https://doi.org/10.1137/080716542>`_, SIAM Journal on Imaging Sciences 2009
    """
    check_scalar("strength", strength, at_least=0)
    if not callable(learning_rate):
        check_scalar("learning_rate", learning_rate, at_least=0)

    def init_fn(params: optax.Params) -> ProximalL1InitState:
        return ProximalL1InitState(jnp.zeros([], jnp.int32), _copied(params))

    def update_fn(
        updates: optax.Updates, state: ProximalL1InitState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ProximalL1InitState]:
        _check_params("proximal_l1_init", params)
        step_size = learning_rate(state.count) if callable(learning_rate) else learning_rate
        threshold = strength * step_size

        def shrunk(u, w, w0):
            change = w + u - w0
            # Not `w0 + S(change) - w`, which would round the updates of large weights.
            moved = jnp.where(jnp.abs(change) <= threshold, w0 - w, u - threshold * jnp.sign(change))
            return moved.astype(u.dtype)

        count = optax.safe_increment(state.count)
        return jax.tree.map(shrunk, updates, params, state.initial), ProximalL1InitState(count, state.initial)

    return optax.GradientTransformation(init_fn, update_fn)


def _pull(name: str, state_type: Any, force: Callable[[chex.Array], chex.Array]) -> optax.GradientTransformation:
    """Add to the gradients a function of the weights' change since initialization."""

    def init_fn(params: optax.Params) -> Any:
        return state_type(initial=_copied(params))

    def update_fn(updates: optax.Updates, state: Any, params: optax.Params | None = None) -> tuple[optax.Updates, Any]:
        _check_params(name, params)
        return jax.tree.map(lambda g, w, w0: (g + force(w - w0)).astype(g.dtype), updates, params, state.initial), state

    return optax.GradientTransformation(init_fn, update_fn)


def _copied(params: optax.Params) -> optax.Params:
    # So that params and state can both be donated to a jitted step.
    return jax.tree.map(lambda w: jnp.array(w, copy=True), params)


def _check_params(name: str, params: optax.Params | None) -> None:
    if params is None:
        raise ValueError(f"{name} needs the params: tx.update(grads, state, params), got params=None")
