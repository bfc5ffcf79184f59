"""FIRE (Han et al., 2026): periodically replaces every kernel by the nearest orthogonal matrix."""

import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from cbp_jax.numerics.periods import is_due, when_due
from cbp_jax.numerics.scalars import check_static, check_whole
from cbp_jax.replacement import inner_state as inner_state_lib
from cbp_jax.transforms.kernels import Kernels, chosen_kernels, edit_after


class FireState(NamedTuple):
    """State of :func:`fire`."""

    count: chex.Array  # int32 [], updates so far
    inner_state: optax.OptState


def fire(
    inner: optax.GradientTransformation,
    *,
    every: chex.Numeric,
    iterations: int = 10,
    reset_inner_state: bool = False,
    kernels: Kernels | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Make kernels orthogonal periodically (Frobenius-isometry reinitialization).

    Of all matrices with equal singular values, the polar factor is the nearest to W in the Frobenius norm, so
    plasticity is restored with the smallest change to what was learned. With d outputs and e inputs,

    .. math:: W \leftarrow \sqrt{d / e}\; W (W^\top W)^{-1/2},

    to which :math:`X \leftarrow \tfrac{3}{2} X - \tfrac{1}{2} X X^\top X` converges from :math:`W / \lVert W \rVert_F`.
    A singular value that is small relative to the norm needs many of these Newton-Schulz iterations, each of which
    makes it 1.5 times as large. As in the authors' program, a convolution's kernel is a matrix for each spatial
    position, divided by the number of positions, and all layers take part, including the output layer. Other parameters
    are not changed.

    Args:
      inner: the optimizer that trains the network.
      every: number of updates between reinitializations, a whole number >= 1. May be traced. FIRE is meant to run
        before new data arrive: use the length of a task.
      iterations: number of Newton-Schulz iterations, an int >= 1. In `optax.inject_hyperparams`, name it in
        `static_args`.
      reset_inner_state: set the inner optimizer's moments of the kernels to their initial values. They are kept by
        default; the paper does not say.
      kernels: which arrays are reinitialized, a function of path (keys joined by "/") and array. By default all of two
        or more axes. Kernels of zeros are not changed.

    Returns:
      an optax transformation that passes extra arguments on to `inner`. Its state is a `FireState`.

    Raises:
      ValueError: a setting is out of range; in `init`, there is no kernel, or the inner state is not understood; in
        `update`, params are missing.

    Example:
      >>> import jax.numpy as jnp, optax, cbp_jax
      >>> tx = cbp_jax.fire(optax.sgd(0.0), every=1)
      >>> params = {"kernel": jnp.diag(jnp.array([2.0, -0.5]))}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["kernel"].round(3).tolist()
      [[1.0, 0.0], [0.0, -1.0]]

    References:
      Han et al., `FIRE: Frobenius-isometry reinitialization for balancing the stability-plasticity tradeoff
      <https://arxiv.org/abs/2602.08040>`_, ICLR 2026
    """
    check_whole("every", every)
    check_static("iterations", iterations)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> FireState:
        state = inner.init(params)
        chosen = chosen_kernels(params, kernels)
        if reset_inner_state:
            inner_state_lib.check(inner, state, params, chosen)
        return FireState(jnp.zeros([], jnp.int32), state)

    def update_fn(
        updates: optax.Updates, state: FireState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, FireState]:
        if params is None:
            raise ValueError("fire needs the params: tx.update(grads, state, params), got params=None")
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        count = optax.safe_increment(state.count)
        due, paths = is_due(count, every), list(chosen_kernels(params, kernels))
        isometric = lambda after: {path: _isometric(w, iterations) for path, w in after.items()}
        updates = edit_after(due, isometric, params, updates, paths)
        if reset_inner_state:
            after, masks = optax.apply_updates(params, updates), dict.fromkeys(paths, jnp.array(True))
            inner_state = when_due(due, lambda s: inner_state_lib.reset(inner, s, after, masks), inner_state)
        return updates, FireState(count, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _isometric(kernel: chex.Array, iterations: int) -> chex.Array:
    """Return the kernel [positions..., inputs, outputs] with all its singular values equal."""
    *places, inputs, outputs = kernel.shape
    number = math.prod(places)
    factors = jax.vmap(lambda w: _polar(w, iterations))(kernel.reshape(number, inputs, outputs))
    return (math.sqrt(outputs / inputs) / number) * factors.reshape(kernel.shape)


def _polar(matrix: chex.Array, iterations: int) -> chex.Array:
    """Return the orthogonal polar factor of a matrix; 0 for a matrix of zeros."""
    flat = matrix.shape[1] > matrix.shape[0]
    norm = jnp.sqrt(jnp.sum(jnp.square(matrix)))
    x = (matrix.T if flat else matrix) / jnp.where(norm > 0, norm, 1.0)

    def iterate(_, x):
        gram = jnp.matmul(x.T, x, precision="highest")
        return 1.5 * x - 0.5 * jnp.matmul(x, gram, precision="highest")

    x = jax.lax.fori_loop(0, iterations, iterate, x)
    return x.T if flat else x
