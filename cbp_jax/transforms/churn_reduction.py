"""C-CHAIN (Tang et al., 2025): penalizes how much an update changes the outputs for other examples."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from cbp_jax.numerics.scalars import check_scalar

Change = Literal["kl", "squared"]


class ChurnReductionState(NamedTuple):
    """State of :func:`add_churn_reduction`."""

    previous: optax.Params  # the params at the previous update; at first, those at init


def add_churn_reduction(
    apply_fn: Callable[[optax.Params, chex.Array], chex.Array],
    strength: chex.Numeric,
    *,
    change: Change = "kl",
) -> optax.GradientTransformationExtraArgs:
    r"""Add the gradient of a penalty on churn: how much the last update changed the outputs on a reference batch.

    C-CHAIN adds a term to the loss,

    .. math::
        L(\theta_t) + \lambda \frac{1}{|B|} \sum_{x \in B} d\big(f_{\theta_{t-1}}(x), f_{\theta_t}(x)\big),

    which is implemented here as a transformation. Its state holds :math:`\theta_{t-1}`, which is treated as a constant.
    Each update takes a reference batch B, drawn independently of the batch of L. d is the divergence of the softmax,
    :math:`\mathrm{KL}(p_{t-1} \,\|\, p_t)`, as in the paper for policies, or the mean squared difference of outputs, as
    for values. (The public program uses the cross-entropy, whose gradient is the same.) At the first update nothing has
    changed yet, and nothing is added.

    The term acts like friction with a delay of one update. If :math:`\lambda` times the step size is too large for the
    curvature of the outputs, the weights oscillate, and churn grows.

    The public programs adapt :math:`\lambda` so that the term is a fixed fraction of the loss. Here it is constant, as
    in the authors' earlier CHAIN.

    Args:
      apply_fn: `(params, x) -> outputs [n, ..., outputs]`.
      strength: :math:`\lambda`, >= 0. May be traced.
      change: "kl" or "squared".

    Returns:
      an optax transformation to chain before an optimizer. Its update needs the params and the extra argument
      `reference`, inputs as `apply_fn` takes them: `tx.update(grads, state, params, reference=x)`.

    Raises:
      ValueError: a setting is out of range; in `update`, params or the reference batch are missing.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = add_churn_reduction(lambda w, x: x @ w, strength=0.5, change="squared")
      >>> before, now = jnp.zeros((1, 1)), jnp.full((1, 1), 3.0)
      >>> updates, _ = tx.update(jnp.ones((1, 1)), tx.init(before), now, reference=jnp.array([[2.0]]))
      >>> updates.tolist()  # 1 and half of the gradient of (2 w - 0)**2 at 3
      [[13.0]]

    References:
      Tang et al., `Mitigating plasticity loss in continual reinforcement learning by reducing churn
      <https://arxiv.org/abs/2506.00592>`_, ICML 2025

      Tang & Berseth, `Improving deep reinforcement learning by reducing the chain effect of value and policy churn
      <https://arxiv.org/abs/2409.04792>`_, NeurIPS 2024
    """
    check_scalar("strength", strength, at_least=0)
    if change not in ("kl", "squared"):
        raise ValueError(f"change must be 'kl' or 'squared', got {change!r}")

    def init_fn(params: optax.Params) -> ChurnReductionState:
        # Copies, so that params and state can both be donated to a jitted step.
        return ChurnReductionState(jax.tree.map(lambda w: jnp.array(w, copy=True), params))

    def churn(params: optax.Params, outputs: chex.Array, reference: chex.Array) -> chex.Array:
        new = apply_fn(params, reference).astype(jnp.float32)
        if change == "squared":
            return jnp.mean(jnp.square(new - outputs))
        return -jnp.mean(jnp.sum(jax.nn.softmax(outputs) * jax.nn.log_softmax(new), -1))

    def update_fn(
        updates: optax.Updates,
        state: ChurnReductionState,
        params: optax.Params | None = None,
        *,
        reference: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ChurnReductionState]:
        del extra_args
        if params is None or reference is None:
            missing = "params" if params is None else "reference"
            raise ValueError(
                "add_churn_reduction needs the params and a reference batch: "
                f"tx.update(grads, state, params, reference=x), got {missing}=None"
            )
        outputs = apply_fn(state.previous, reference).astype(jnp.float32)
        gradients = jax.grad(churn)(params, outputs, reference)
        lam = jnp.asarray(strength, jnp.float32)
        updates = jax.tree.map(lambda g, c: (g + lam * c).astype(g.dtype), updates, gradients)
        return updates, ChurnReductionState(params)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
