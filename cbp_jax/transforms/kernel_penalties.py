"""Penalties on kernels as matrices, added to gradients: spectral, Parseval, orthogonal, Wasserstein."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from cbp_jax import units as units_lib
from cbp_jax.numerics.scalars import check_scalar
from cbp_jax.transforms.kernels import Kernels, as_matrix, chosen_kernels, wide

# Power iterations at the start, when the singular vectors are unknown.
_FIRST_ITERATIONS = 20


class Penalty(NamedTuple):
    """A penalty on one kernel.

    Attributes:
      init: `init(kernel)` returns what is kept for it, a tree of arrays.
      gradient: `gradient(kernel, kept)` takes a kernel, in float32 at least, and returns the penalty's gradient and the
        new `kept`.
    """

    init: Callable[[chex.Array], Any]
    gradient: Callable[[chex.Array, Any], tuple[chex.Array, Any]]


class AddKernelPenaltyState(NamedTuple):
    """State of :func:`add_kernel_penalty`."""

    kept: dict[str, Any]  # by path of a kernel, what the penalty keeps for it


def add_kernel_penalty(
    strength: chex.Numeric, penalty: Penalty, *, kernels: Kernels | None = None
) -> optax.GradientTransformation:
    r"""Add the gradient of a penalty on kernels, :math:`g \leftarrow g + \lambda \nabla R(W)`.

    A kernel of more than two axes is treated as a matrix W of its last axis, the outputs, by all others: row i holds
    the weights that compute output i. Chain it before transformations that replace units, as in
    `optax.chain(add_kernel_penalty(...), continual_backprop(...))`, because its state cannot be reset for single units.

    Args:
      strength: :math:`\lambda`, >= 0. May be traced.
      penalty: R, as :func:`spectral_penalty`, :func:`parseval_penalty`, :func:`orthogonal_penalty` or
        :func:`wasserstein_penalty` make it, or one of your own.
      kernels: which arrays are penalized, a function of path (keys joined by "/") and array. By default all of two or
        more axes. (For Parseval regularization as published, exclude the output layer.)

    Returns:
      an optax transformation to chain before an optimizer. Its update needs the params.

    Raises:
      ValueError: the strength is negative; in `init`, there is no kernel; in `update`, params are missing.

    Example:
      >>> import jax.numpy as jnp, optax, cbp_jax
      >>> penalty = cbp_jax.parseval_penalty(scale=2.0)
      >>> tx = optax.chain(cbp_jax.add_kernel_penalty(0.5, penalty), optax.sgd(1.0))
      >>> params = {"kernel": jnp.array([[2.0]]), "bias": jnp.ones(1)}
      >>> updates, _ = tx.update({"kernel": jnp.zeros((1, 1)), "bias": jnp.zeros(1)}, tx.init(params), params)
      >>> updates["kernel"].tolist()  # of 4 (2**2 - 2) 2
      [[-8.0]]
    """
    check_scalar("strength", strength, at_least=0)

    def init_fn(params: optax.Params) -> AddKernelPenaltyState:
        return AddKernelPenaltyState({path: penalty.init(w) for path, w in chosen_kernels(params, kernels).items()})

    def update_fn(
        updates: optax.Updates, state: AddKernelPenaltyState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, AddKernelPenaltyState]:
        if params is None:
            raise ValueError("add_kernel_penalty needs the params: tx.update(grads, state, params), got params=None")
        found = {
            path: penalty.gradient(wide(w), state.kept[path])
            for path, w in units_lib.leaves_by_path(params).items()
            if path in state.kept
        }

        def add(key_path, g):
            path = units_lib.join_path(key_path)
            return (g + strength * found[path][0]).astype(g.dtype) if path in found else g

        updates = jax.tree_util.tree_map_with_path(add, updates)
        return updates, AddKernelPenaltyState({path: kept for path, (_, kept) in found.items()})

    return optax.GradientTransformation(init_fn, update_fn)


def spectral_penalty(power: chex.Numeric = 2.0) -> Penalty:
    r"""Create spectral regularization, :math:`R(W) = (\sigma_{\max}(W)^k - 1)^2`.

    The largest singular value is estimated by one power iteration for each update, whose vector is kept in the state,
    and by twenty at the start, beginning with W's longest row. Singular vectors are constants in the gradient. The
    paper also keeps biases near 0 and scales of normalization near 1; here only kernels are penalized. We know of no
    public program by the authors.

    Args:
      power: k, > 0. May be traced.

    Returns:
      the penalty for :func:`add_kernel_penalty`.

    Example:
      >>> import jax.numpy as jnp
      >>> penalty, w = spectral_penalty(power=1), jnp.diag(jnp.array([3.0, 1.0]))
      >>> penalty.gradient(w, penalty.init(w))[0].round(3).tolist()
      [[4.0, 0.0], [0.0, 0.0]]

    References:
      Lewandowski et al., `Learning continually by spectral regularization <https://arxiv.org/abs/2406.06811>`_, ICLR
      2025
    """
    check_scalar("power", power, at_least=0)
    if not isinstance(power, jax.core.Tracer) and float(power) == 0:
        raise ValueError(f"power must be above 0, got {power}")

    def iterate(matrix, right):
        # Sums of products round alike whether seeds are vmapped or not. Matrix products do not.
        left = _unit(jnp.sum(matrix * right, 1))
        image = jnp.sum(matrix * left[:, None], 0)
        return left, _unit(image), jnp.linalg.norm(image)

    def init(kernel):
        matrix = as_matrix(wide(kernel))
        right = _unit(matrix[jnp.argmax(jnp.sum(jnp.square(matrix), 1))])
        return jax.lax.fori_loop(0, _FIRST_ITERATIONS, lambda _, right: iterate(matrix, right)[1], right)

    def gradient(kernel, right):
        left, right, largest = iterate(as_matrix(kernel), right)
        k = jnp.asarray(power, jnp.float32)
        slope = 2 * (largest**k - 1) * k * largest ** (k - 1)
        slope = jnp.where(largest > 0, slope, 0.0)  # for k < 1 it would be infinite there
        return slope * _as_kernel(jnp.outer(left, right), kernel), right

    return Penalty(init, gradient)


def parseval_penalty(scale: chex.Numeric = 2.0) -> Penalty:
    r"""Create Parseval regularization, :math:`R(W) = \lVert W W^\top - s I \rVert_F^2`.

    Its gradient is :math:`4 (W W^\top - s I) W`. Rows, one for each output, are pulled to be orthogonal and of length
    :math:`\sqrt s`. If there are more outputs than inputs, that is impossible, and the penalty cannot become 0.

    Args:
      scale: s, >= 0. The authors' program uses the squared gain of the initialization, 2. May be traced.

    Returns:
      the penalty for :func:`add_kernel_penalty`.

    Example:
      >>> import jax.numpy as jnp
      >>> parseval_penalty(scale=1).gradient(jnp.array([[1.0], [1.0]]), ())[0].tolist()
      [[4.0], [4.0]]

    References:
      Chung et al., `Parseval regularization for continual reinforcement learning
      <https://arxiv.org/abs/2412.07224>`_, NeurIPS 2024
    """
    check_scalar("scale", scale, at_least=0)
    return Penalty(lambda kernel: (), lambda kernel, kept: (_gram_gradient(as_matrix(kernel), scale, kernel), kept))


def orthogonal_penalty() -> Penalty:
    r"""Create the soft orthogonality penalty, :math:`R(W) = \lVert W W^\top - I \rVert_F^2`.

    If :math:`W^\top W` is the smaller matrix, the penalty is :math:`\lVert W^\top W - I \rVert_F^2` instead. All
    singular values are pulled to 1. The paper uses the products of outputs for all shapes. These cannot be the identity
    if there are more outputs than inputs, so the products of inputs are used then.

    Returns:
      the penalty for :func:`add_kernel_penalty`.

    Example:
      >>> import jax.numpy as jnp
      >>> orthogonal_penalty().gradient(jnp.array([[1.0], [1.0]]), ())[0].tolist()
      [[4.0], [4.0]]

    References:
      Bansal et al., `Can we gain more from orthogonality regularizations in training deep CNNs?
      <https://arxiv.org/abs/1810.09102>`_, NeurIPS 2018
    """

    def gradient(kernel, kept):
        matrix = as_matrix(kernel)
        if matrix.shape[0] > matrix.shape[1]:
            return _gram_gradient(matrix.T, 1.0, kernel, transposed=True), kept
        return _gram_gradient(matrix, 1.0, kernel), kept

    return Penalty(lambda kernel: (), gradient)


def wasserstein_penalty() -> Penalty:
    r"""Create a penalty on the Wasserstein distance between a kernel's current and initial weight distributions.

    .. math:: R(W) = \lVert \mathrm{sort}(W) - \mathrm{sort}(W_0) \rVert^2

    The sorted weights of a kernel are pulled to its sorted initial ones: the distribution of the weights is kept, but
    no weight has to stay where it was. It is the sum of squares, not their mean, so that strengths are comparable with
    those of :func:`add_l2_init` (whose gradient is half of this one if the order of the weights has not changed). We
    know of no public program by the authors.

    Returns:
      the penalty for :func:`add_kernel_penalty`.

    Example:
      >>> import jax.numpy as jnp
      >>> penalty = wasserstein_penalty()
      >>> kept = penalty.init(jnp.array([[1.0, 2.0, 3.0]]))
      >>> penalty.gradient(jnp.array([[3.0, 1.0, 4.0]]), kept)[0].tolist()
      [[2.0, 0.0, 2.0]]

    References:
      Lewandowski et al., `Directions of curvature as an explanation for loss of plasticity
      <https://arxiv.org/abs/2312.00246>`_, 2024
    """

    def gradient(kernel, initial):
        return 2 * (kernel - initial[_ranks(kernel)]), initial

    def init(kernel):
        return jnp.sort(wide(kernel).ravel())

    return Penalty(init, gradient)


def _ranks(values: chex.Array) -> chex.Array:
    """Return the place of each value if all were sorted, as `argsort(argsort(...))` would. Equal values share out their
    places in turn; a few may get the same one if values that are equal are not neighbors.

    XLA sorts single integers on a CPU several times faster than pairs or floats, and float32 numbers are ordered as
    these integers are.
    """
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32)
    keys = jnp.where(bits < 0, bits ^ jnp.iinfo(jnp.int32).max, bits).ravel()
    ordered = jnp.sort(keys)
    first, end = (jnp.searchsorted(ordered, keys, side=side) for side in ("left", "right"))
    return (first + jnp.arange(keys.size) % (end - first)).reshape(values.shape)


def _unit(vector: chex.Array) -> chex.Array:
    """Return the vector scaled to length 1; for a zero vector, one of equal entries, so that an iteration never gets
    stuck."""
    length = jnp.linalg.norm(vector)
    return jnp.where(length > 0, vector / jnp.where(length > 0, length, 1.0), vector.size**-0.5)


def _gram_gradient(matrix: chex.Array, scale: chex.Numeric, kernel: chex.Array, transposed: bool = False) -> chex.Array:
    """Return the gradient of `|W W^T - s I|^2` of a matrix W, or of its transpose, as an array of the kernel's
    shape."""
    gram = jnp.matmul(matrix, matrix.T, precision="highest")
    gradient = 4 * jnp.matmul(gram - scale * jnp.eye(len(matrix), dtype=gram.dtype), matrix, precision="highest")
    return _as_kernel(gradient.T if transposed else gradient, kernel)


def _as_kernel(matrix: chex.Array, kernel: chex.Array) -> chex.Array:
    return matrix.T.reshape(kernel.shape)
