"""Products that no compiler fuses with the sum they are used in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbp_jax.numerics.rounding import rounded, unforeseen_zero

OPTIMIZED = True


@pytest.mark.parametrize("first", [True, False])
def test_only_the_other_product_is_fused_with_the_sum(first):
    """Of `a * b + c * d` exactly one order of operations is left, whichever product stands first."""
    a, b, c, d = np.random.default_rng(0).normal(size=(4, 10_000)).astype(np.float32)

    @jax.jit
    def added(a, b, c, d, count):
        kept = rounded(c * d, unforeseen_zero(count))
        return kept + a * b if first else a * b + kept

    product = (c * d).astype(np.float64)
    fused = (a.astype(np.float64) * b + product).astype(np.float32)
    apart = a * b + c * d
    found = np.asarray(added(a, b, c, d, jnp.int32(7)))
    assert (fused != apart).mean() > 0.1
    assert (found == fused).all() or (found == apart).all()
