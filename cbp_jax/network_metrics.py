"""Measures of a network as a function: its tangent kernel, and how far an update moves outputs and weights.

They are part of :mod:`cbp_jax.metrics`.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

Change = Literal["absolute", "squared", "kl", "argmax"]


def tangent_kernel(apply_fn: Callable[[Any, jax.Array], jax.Array], params: Any, x: jax.Array) -> jax.Array:
    r"""Return the Gram matrix of the empirical neural tangent kernel on a batch.

    .. math:: K_{(i, a), (j, b)} = \Big\langle \frac{\partial f_a(x_i)}{\partial \theta},
        \frac{\partial f_b(x_j)}{\partial \theta} \Big\rangle

    for examples i, j and outputs a, b. A step of gradient descent on example j changes the outputs of example i through
    this entry, to first order. Jacot et al., "Neural tangent kernel: convergence and generalization in neural
    networks", NeurIPS 2018.

    Args:
      apply_fn: `(params, x [n, ...]) -> outputs [n, ...]`; examples must be independent. For a smaller matrix, return
        fewer outputs, as in `lambda params, x: net.apply(params, x).sum(-1)`.
      params: pytree of arrays. Leaves that are not of a float type are ignored. Running statistics of normalization are
        not trained, so `apply_fn` should close over them.
      x: examples [n, ...].

    Returns:
      float32 array [m, m] with m = n * outputs, ordered by example. Needs memory for the Jacobian, m times the number
      of parameters.

    Raises:
      ValueError: there are no examples or no float leaves.

    >>> import jax.numpy as jnp
    >>> tangent_kernel(lambda w, x: x @ w, jnp.ones(2), jnp.array([[1.0, 0.0], [3.0, 4.0]])).tolist()
    [[1.0, 3.0], [3.0, 25.0]]
    """
    if jnp.ndim(x) == 0 or not jnp.shape(x)[0]:
        raise ValueError(f"x must be examples [n, ...] with n >= 1; got shape {jnp.shape(x)}")
    leaves, structure = jax.tree.flatten(params)
    learned = [number for number, leaf in enumerate(leaves) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)]
    if not learned:
        raise ValueError(f"params must hold at least one float array; got {structure}")

    def outputs(weights, example):
        replaced = list(leaves)
        for number, weight in zip(learned, weights, strict=True):
            replaced[number] = weight
        return apply_fn(jax.tree.unflatten(structure, replaced), example[None]).astype(jnp.float32).ravel()

    weights = [jnp.asarray(leaves[number]) for number in learned]
    jacobian = jax.vmap(jax.jacrev(outputs), in_axes=(None, 0))(weights, jnp.asarray(x))
    rows = jax.tree.leaves(jacobian)[0].shape[:2]  # examples, outputs
    kernel = jnp.zeros([])
    for part in jacobian:
        part = part.astype(jnp.float32).reshape(rows[0] * rows[1], -1)
        kernel += jnp.matmul(part, part.T, precision=jax.lax.Precision.HIGHEST)
    return kernel


def churn(
    apply_fn: Callable[[Any, jax.Array], jax.Array],
    params_before: Any,
    params_after: Any,
    x: jax.Array,
    change: Change = "absolute",
) -> jax.Array:
    r"""Return how much the outputs on a reference batch differ between two parameter sets, such as before and after an
    update.

    With outputs :math:`f = f_\theta(x_i)` before and :math:`f' = f_{\theta'}(x_i)` after, the mean over examples i of

    - "absolute": :math:`|f' - f|`, and "squared": :math:`(f' - f)^2`, both averaged over outputs too;
    - "kl": :math:`\mathrm{KL}(p \,\|\, p')` of the softmax of the outputs, as for policies;
    - "argmax": whether another output is the largest, as for greedy actions or predicted classes.

    Schaul et al., "The phenomenon of policy churn", NeurIPS 2022; Tang et al., "Mitigating plasticity loss in continual
    reinforcement learning by reducing churn", ICML 2025. To measure churn, use examples outside the update's batch.

    Args:
      apply_fn: `(params, x) -> outputs [n, ..., outputs]`.
      params_before: parameters before the update.
      params_after: those after it.
      x: the reference batch.
      change: one of the above.

    Returns:
      float32 scalar, at least 0.

    Raises:
      ValueError: `change` is none of the above.

    >>> import jax.numpy as jnp
    >>> apply_fn = lambda w, x: x * w
    >>> before, after, x = jnp.array([1.0, 2.0]), jnp.array([3.0, 2.0]), jnp.ones((5, 2))
    >>> [round(float(churn(apply_fn, before, after, x, change)), 4) for change in ("absolute", "kl", "argmax")]
    [1.0, 0.4621, 1.0]
    """
    if change not in ("absolute", "squared", "kl", "argmax"):
        raise ValueError(f"change must be 'absolute', 'squared', 'kl' or 'argmax'; got {change!r}")
    before, after = (jnp.asarray(apply_fn(params, x), jnp.float32) for params in (params_before, params_after))
    if change == "absolute":
        return jnp.mean(jnp.abs(after - before))
    if change == "squared":
        return jnp.mean(jnp.square(after - before))
    if change == "argmax":
        return jnp.mean(jnp.argmax(after, -1) != jnp.argmax(before, -1), dtype=jnp.float32)
    log_p, log_q = jax.nn.log_softmax(before), jax.nn.log_softmax(after)
    divergence = jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)
    return jnp.maximum(jnp.mean(divergence), 0.0)  # rounding can make it -1e-9


def weight_change(params_before: Any, params_after: Any) -> jax.Array:
    r"""Return how far an update moves the weights, relative to their size.

    .. math:: \frac{\lVert \theta' - \theta \rVert_2}{\lVert \theta \rVert_2}

    over all parameters together. If weights grow and steps do not, this effective step size falls, and with it
    plasticity: Lyle et al., "Normalization and effective learning rates in reinforcement learning", NeurIPS 2024. For
    one layer, pass only its parameters.

    Args:
      params_before: pytree of arrays. Leaves that are not of a float type are ignored.
      params_after: the same after the update.

    Returns:
      float32 scalar; 0 if nothing moves, infinite if weights that are all 0 move.

    Raises:
      ValueError: the trees differ in structure or shapes, or there is no float leaf.

    >>> import jax.numpy as jnp
    >>> round(float(weight_change({"w": jnp.array([3.0, 4.0])}, {"w": jnp.array([3.0, 3.0])})), 4)
    0.2
    """
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (params_before, params_after)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"params_before and params_after must have the same shapes; got {shapes[0]} and {shapes[1]}")
    leaves = zip(jax.tree.leaves(params_before), jax.tree.leaves(params_after), strict=True)
    pairs = [(w, new) for w, new in leaves if jnp.issubdtype(jnp.result_type(w), jnp.floating)]
    if not pairs:
        raise ValueError(f"params must hold at least one float array; got {jax.tree.structure(params_before)}")
    square = lambda array: jnp.sum(jnp.square(array))
    size = jnp.sqrt(sum(square(jnp.asarray(w, jnp.float32)) for w, _ in pairs))
    moved = jnp.sqrt(sum(square(jnp.asarray(new, jnp.float32) - jnp.asarray(w, jnp.float32)) for w, new in pairs))
    return jnp.where(moved == 0, 0.0, moved / size)
