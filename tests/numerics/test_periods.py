import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbp_jax.numerics.periods import is_due, when_due
from cbp_jax.numerics.scalars import check_whole


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_change_is_made_only_when_due_and_remains_a_branch(depth):
    step = lambda count, every, x: when_due(is_due(count, every), lambda x: 10 * x, x)
    every, x, axes = jnp.asarray(2.0), jnp.asarray(1.0), (None, 0, 0)
    for _ in range(depth):
        step = jax.vmap(step, in_axes=axes)
        every, x = jnp.stack([every, every + 1]), jnp.stack([x, x + 1])
    for count in range(1, 7):
        expected = np.where(count % np.asarray(every).astype(int) == 0, 10 * np.asarray(x), x)
        np.testing.assert_array_equal(step(jnp.int32(count), every, x), expected)
    jaxpr = jax.make_jaxpr(step)(jnp.int32(1), every, x).jaxpr
    assert [eqn.invars[0].aval.shape for eqn in jaxpr.eqns if eqn.primitive.name == "cond"] == [()]


def test_periods_are_whole_numbers_of_at_least_1():
    for value in (1, 3.0, np.float32(2)):
        check_whole("every", value)
    for value in (0, 0.5, 1.5, float("nan")):
        with pytest.raises(ValueError, match="every must be"):
            check_whole("every", value)
    with pytest.raises(TypeError, match="every must be a scalar"):
        check_whole("every", "often")
