"""Keeps compilers from rounding a sum otherwise than the program says."""

import chex
import jax.numpy as jnp


def rounded(product: chex.Array) -> chex.Array:
    """A product that no compiler contracts with the sum around it, so that vmapped rows give what they give alone.

    A fused multiply-add rounds once where a product and a sum round twice, and of `a * b + c * d` a compiler may fuse
    either product, or none, as it sees fit in each program. Clipped to the finite numbers a product is none any more.

    >>> import jax.numpy as jnp
    >>> rounded(jnp.array([2.0, -jnp.inf])).tolist()
    [2.0, -3.4028234663852886e+38]
    """
    largest = jnp.finfo(product.dtype).max
    return jnp.clip(product, -largest, largest)
