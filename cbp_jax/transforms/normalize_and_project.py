"""Normalize-and-project (Lyle et al., 2024): every kernel keeps its initial norm and effective learning rate."""

from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import optax

from cbp_jax import units as units_lib
from cbp_jax.numerics.periods import is_due
from cbp_jax.numerics.scalars import check_scalar, check_whole
from cbp_jax.transforms.kernels import Kernels, chosen_kernels, edit_after, wide


class NormalizeAndProjectState(NamedTuple):
    """State of :func:`normalize_and_project`."""

    count: chex.Array  # int32 [], updates so far
    norms: dict[str, chex.Array]  # by path of a kernel float32 [], its norm at init
    initial: dict[str, chex.Array]  # by path of any other parameter, its value at init, same shape and dtype
    inner_state: optax.OptState


def normalize_and_project(
    inner: optax.GradientTransformation,
    *,
    every: chex.Numeric = 1,
    pull: chex.Numeric = 0.0,
    kernels: Kernels | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescale every kernel to its initial Frobenius norm after each update of an inner optimizer.

    .. math:: W \leftarrow \lVert W_0 \rVert_F \frac{W + u}{\lVert W + u \rVert_F}

    with u the inner optimizer's update. The output of a network with normalization before its nonlinearities does not
    depend on the norm of its kernels, so a growing norm means a falling learning rate: see
    :func:`effective_learning_rate`. The *normalize* part of the method is up to the network, which needs layer
    normalization (the learner `nap` adds it). Kernels that start at 0 are not projected.

    Scales and offsets of normalization, and biases, are not kernels. The paper lets scales and offsets drift or, in
    long runs, keeps them near their initial values, but does not say how. Here, every projection moves them by a
    fraction `pull` of their distance to the initial values, 0 by default. We know of no public program by the authors.

    Wrap it around transformations that replace units, as in `normalize_and_project(continual_backprop(...))`.

    Args:
      inner: the optimizer that trains the network.
      every: number of updates between projections, a whole number >= 1. May be traced.
      pull: fraction by which other parameters return to their initial values, in [0, 1]. May be traced.
      kernels: which arrays are projected, a function of path (keys joined by "/") and array; by default all of two or
        more axes.

    Returns:
      an optax transformation that passes extra arguments on to `inner`. Its state is a `NormalizeAndProjectState`.

    Raises:
      ValueError: a setting is out of range; in `init`, there is no kernel; in `update`, params are missing.

    Example:
      >>> import jax.numpy as jnp, optax, cbp_jax
      >>> tx = cbp_jax.normalize_and_project(optax.sgd(1.0))
      >>> params = {"kernel": jnp.array([[3.0, 4.0]])}
      >>> updates, state = tx.update({"kernel": jnp.array([[-3.0, -4.0]])}, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["kernel"].round(4).tolist()
      [[3.0, 4.0]]

    References:
      Lyle et al., `Normalization and effective learning rates in reinforcement learning
      <https://arxiv.org/abs/2407.01800>`_, NeurIPS 2024
    """
    check_whole("every", every)
    check_scalar("pull", pull, at_least=0, at_most=1)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> NormalizeAndProjectState:
        chosen = chosen_kernels(params, kernels)
        rest = {path: leaf for path, leaf in units_lib.leaves_by_path(params).items() if path not in chosen}
        return NormalizeAndProjectState(
            count=jnp.zeros([], jnp.int32),
            norms={path: _norm(w) for path, w in chosen.items()},
            initial={path: jnp.array(leaf, copy=True) for path, leaf in rest.items()},
            inner_state=inner.init(params),
        )

    def update_fn(
        updates: optax.Updates, state: NormalizeAndProjectState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, NormalizeAndProjectState]:
        if params is None:
            raise ValueError("normalize_and_project needs the params: tx.update(grads, state, params), got params=None")
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        count = optax.safe_increment(state.count)

        def project(after):
            new = {}
            for path, w in after.items():
                if path in state.norms:
                    norm = _norm(w)
                    free = (norm == 0) | (state.norms[path] == 0)
                    new[path] = w * jnp.where(free, 1.0, state.norms[path] / jnp.where(free, 1.0, norm))
                else:
                    new[path] = w + jnp.asarray(pull, jnp.float32) * (wide(state.initial[path]) - w)
            return new

        updates = edit_after(is_due(count, every), project, params, updates, (*state.norms, *state.initial))
        return updates, state._replace(count=count, inner_state=inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def effective_learning_rate(
    params: optax.Params, learning_rate: chex.Numeric, *, adaptive: bool = False, kernels: Kernels | None = None
) -> dict[str, chex.Array]:
    r"""Return how far a step rotates each kernel, if the network's output does not depend on the kernel's norm.

    Gradients of such a kernel shrink as its norm grows, :math:`\nabla L(c W) = \nabla L(W) / c`, so that a step of SGD
    rotates it as much as a step with the learning rate :math:`\eta / \lVert W \rVert_F^2` rotates a kernel of norm 1.
    For optimizers whose steps do not depend on the scale of gradients, such as Adam, the effective learning rate is
    :math:`\eta / \lVert W \rVert_F`.

    Args:
      params: pytree of arrays.
      learning_rate: :math:`\eta`, >= 0.
      adaptive: whether the optimizer's steps are independent of the scale of gradients.
      kernels: as in :func:`normalize_and_project`.

    Returns:
      dict from a kernel's path to a float32 scalar; infinite for kernels of zeros.

    Raises:
      ValueError: the learning rate is negative, or there is no kernel.

    Example:
      >>> import jax.numpy as jnp, cbp_jax
      >>> rates = cbp_jax.effective_learning_rate({"kernel": jnp.array([[3.0, 4.0]])}, 0.1)
      >>> round(float(rates["kernel"]), 6)
      0.004

    References:
      Lyle et al., `Normalization and effective learning rates in reinforcement learning
      <https://arxiv.org/abs/2407.01800>`_, NeurIPS 2024
    """
    check_scalar("learning_rate", learning_rate, at_least=0)
    power = 1 if adaptive else 2
    return {path: learning_rate / _norm(w) ** power for path, w in chosen_kernels(params, kernels).items()}


def _norm(kernel: chex.Array) -> chex.Array:
    return jnp.sqrt(jnp.sum(jnp.square(wide(kernel)))).astype(jnp.float32)
