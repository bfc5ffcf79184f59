"""Penalties on adapters, for sparse changes and for orthogonal subspaces."""

import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from cbp_jax.lora.adapter import Adapter, adapters_of, changes, sizes_of


def l1(adapter: Adapter, of: Literal["delta", "factors"] = "delta") -> jax.Array:
    r"""Return the L1 norm of an adapter, for a loss :math:`L_{task} + \lambda \lVert \Delta W \rVert_1`.

    Args:
      adapter: the adapter.
      of: "delta", the sum of :math:`|\Delta W|` over the entries of all adapted kernels, with :math:`\Delta W =
        \frac{\alpha}{r} A B`; or "factors", the sum over the entries of all A and B, which is cheaper but makes entries
        of the factors sparse, not of their product.

    Returns:
      a scalar. Its derivative with respect to B is 0 at B = 0, so the penalty does not move a fresh adapter.

    Raises:
      ValueError: `of` is unknown.

    Example:
      >>> from cbp_jax import lora
      >>> adapter = lora.init({"w": jnp.ones((2, 2))}, jax.random.key(0), rank=1)
      >>> ones = jax.tree.map(jnp.ones_like, adapter)
      >>> float(l1(ones)), float(l1(ones, of="factors"))
      (4.0, 4.0)
    """
    if of not in ("delta", "factors"):
        raise ValueError(f"of must be 'delta' or 'factors', got {of!r}")
    arrays = changes(adapter).values() if of == "delta" else jax.tree.leaves(adapter.factors)
    return jnp.asarray(sum((jnp.sum(_magnitude(array)) for array in arrays), 0.0))


def orthogonality(
    adapter: Adapter, previous: Adapter | Sequence[Adapter], *, form: Literal["absolute", "squared"] = "absolute"
) -> jax.Array:
    r"""Return O-LoRA's penalty on a new adapter whose input subspace overlaps those of earlier adapters.

    .. math:: \sum_{i < t} \sum_{j,k} |A_i^\top A_t|_{jk} \quad\text{or}\quad
        \sum_{i < t} \lVert A_i^\top A_t \rVert_F^2

    The published program uses the first form, with a weight of 0.5 in the loss, and its paper the second. They differ
    in more than scale: absolute values pull small products as strongly as large ones, so that columns become orthogonal
    up to the size of a step, while squares pull small products only weakly.

    Args:
      adapter: the new adapter; only it gets derivatives.
      previous: one earlier adapter or several, of any rank.
      form: "absolute" or "squared".

    Returns:
      a scalar, the sum over all kernels that the adapters share.

    Raises:
      ValueError: no kernel is shared, `previous` is empty, or the form is unknown.

    Example:
      >>> from cbp_jax import lora
      >>> params = {"w": jnp.ones((8, 2))}
      >>> adapters = [lora.init(params, jax.random.key(n), rank=2) for n in range(2)]
      >>> A = [adapter.factors["w"]["lora_A"] for adapter in adapters]
      >>> bool(jnp.allclose(orthogonality(adapters[1], adapters[0]), jnp.abs(A[0].T @ A[1]).sum()))
      True

    References:
      Wang et al., `Orthogonal subspace learning for language model continual learning
      <https://arxiv.org/abs/2310.14152>`_, Findings of EMNLP 2023
    """
    if form not in ("absolute", "squared"):
        raise ValueError(f"form must be 'absolute' or 'squared', got {form!r}")
    size = _magnitude if form == "absolute" else jnp.square
    pairs = _shared(adapter, previous)
    return jnp.asarray(sum((jnp.sum(size(_inner(jax.lax.stop_gradient(old), new))) for old, new in pairs), 0.0))


def subspace_overlap(adapter: Adapter, previous: Adapter) -> jax.Array:
    r"""Return the overlap of the input subspaces of two adapters, in [0, 1], averaged over the kernels that they share.

    .. math:: \frac{\lVert Q_1^\top Q_2 \rVert_F^2}{\min(r_1, r_2)}

    where Q are orthonormal bases of the columns of A: the mean squared cosine of the principal angles. For two random
    subspaces it is :math:`\max(r_1, r_2)/in` on average.

    Args:
      adapter: an adapter.
      previous: another.

    Returns:
      a scalar.

    Raises:
      ValueError: no kernel is shared.

    Example:
      >>> from cbp_jax import lora
      >>> adapter = lora.init({"w": jnp.ones((8, 2))}, jax.random.key(0), rank=2)
      >>> round(float(subspace_overlap(adapter, adapter)), 5)
      1.0
    """

    def overlap(old, new):
        bases = [jnp.linalg.qr(a)[0] for a in (old, new)]
        common = jnp.sum(jnp.square(_inner(*bases)), (-2, -1))
        return jnp.mean(common / min(basis.shape[-1] for basis in bases))

    found = [overlap(old, new) for old, new in _shared(adapter, previous)]
    return sum(found) / len(found)


def _magnitude(array: jax.Array) -> jax.Array:
    """Return absolute values with derivative 0 at 0. JAX's derivative is 1 there, which would move fresh adapters."""
    return array * jax.lax.stop_gradient(jnp.sign(array))


def _inner(old: jax.Array, new: jax.Array) -> jax.Array:
    return jnp.matmul(jnp.swapaxes(old, -1, -2), new, precision=jax.lax.Precision.HIGHEST)


def _shared(adapter: Adapter, previous: Adapter | Sequence[Adapter]) -> list[tuple[jax.Array, jax.Array]]:
    """Return the factors A of the earlier and the new adapter, matrices [..., in, rank], for all kernels that they
    share."""
    own = adapter.factors
    pairs = [(old, path) for old in adapters_of(previous) for path in own if path in old.factors]
    if not pairs:
        raise ValueError(f"previous must adapt some of the kernels {list(own)}, as adapter does; it shares none")
    return [(_matrix(old, path), _matrix(adapter, path)) for old, path in pairs]


def _matrix(adapter: Adapter, path: str) -> jax.Array:
    stack, inside, _ = sizes_of(adapter, path)
    return adapter.factors[path]["lora_A"].reshape(*stack, math.prod(inside), adapter.rank)
