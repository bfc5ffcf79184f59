"""Prevents compilers from changing how a sum is rounded."""

import chex
import jax.numpy as jnp


def rounded(product: chex.Array, zero: chex.Array | None = None) -> chex.Array:
    """Return a product that no compiler fuses with the sum it is used in, so that vmapped rows equal solo runs.

    A fused multiply-add rounds once, a product and a sum round twice. In `a * b + c * d` a compiler may fuse either
    product, or none, differently in each program. After adding a zero that is computed at run time, the term is no
    longer a product, so it cannot be fused; the product with this zero may be, which changes nothing. Without such a
    zero the product is clipped to the finite numbers, which takes longer.

    Args:
      product: the product.
      zero: float32 [], from `unforeseen_zero`.

    >>> import jax.numpy as jnp
    >>> rounded(jnp.array([2.0, -jnp.inf])).tolist()
    [2.0, -3.4028234663852886e+38]
    >>> rounded(jnp.array([2.0, -jnp.inf]), unforeseen_zero(jnp.int32(7))).tolist()
    [2.0, -inf]
    """
    if zero is not None:
        return product + zero.astype(product.dtype)
    largest = jnp.finfo(product.dtype).max
    return jnp.clip(product, -largest, largest)


def unforeseen_zero(number: chex.Array) -> chex.Array:
    """Return 0.0 as `x - x`. Compilers leave it in the program, as it would be NaN for a NaN.

    Args:
      number: an integer [] that is known only at run time, such as a count of updates.

    Returns:
      float32 [].
    """
    number = jnp.asarray(number).astype(jnp.float32)
    return number - number
