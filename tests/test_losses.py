import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbp_jax.losses import LOSSES

TARGETS = {
    "softmax_cross_entropy": jnp.array([2, 0]),
    "squared_error": jnp.array([[0.5, -1.0, 2.0], [0.0, 1.0, -3.0]]),
}
OUTPUTS = jnp.array([[0.3, -1.2, 0.7], [2.0, 0.1, -0.4]])


@pytest.mark.parametrize("name", LOSSES)
def test_derivatives_of_a_loss_are_those_of_its_mean_over_examples(name):
    loss, targets = LOSSES[name], TARGETS[name]
    mean = lambda flat: jnp.mean(loss.of_examples(flat.reshape(OUTPUTS.shape), targets))
    found = jax.jit(loss.derivatives)(OUTPUTS, targets)
    expected = jax.jit(lambda x: (mean(x), jax.grad(mean)(x), jnp.diag(jax.hessian(mean)(x))))(OUTPUTS.ravel())
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(jnp.ravel(one), jnp.ravel(other), rtol=1e-6, atol=1e-7)


def test_accuracy_is_measured_only_for_classes():
    assert float(LOSSES["softmax_cross_entropy"].metrics["accuracy"](OUTPUTS, jnp.array([2, 1]))) == 0.5
    assert not LOSSES["squared_error"].metrics
