"""Prevents compilers from changing how a sum is rounded."""

import chex
import jax.numpy as jnp


def rounded(product: chex.Array) -> chex.Array:
    """Return a product that no compiler fuses with the sum it is used in, so that vmapped rows equal solo runs.

    A fused multiply-add rounds once, a product and a sum round twice. In `a * b + c * d` a compiler may fuse either
    product, or none, differently in each program. After clipping to the finite numbers, the term is no longer a
    product, so it cannot be fused.

    >>> import jax.numpy as jnp
    >>> rounded(jnp.array([2.0, -jnp.inf])).tolist()
    [2.0, -3.4028234663852886e+38]
    """
    largest = jnp.finfo(product.dtype).max
    return jnp.clip(product, -largest, largest)
