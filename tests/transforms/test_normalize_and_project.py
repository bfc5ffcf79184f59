"""normalize_and_project against float64 NumPy, and the effect of norms on learning rates."""

import following
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import cbp_jax


@pytest.mark.parametrize(("every", "pull"), [pytest.param(1, 0.0, marks=pytest.mark.slow), (3, 0.2)])
def test_follows_the_numpy_reference(every, pull):
    initial = []

    def edit(count, weights, grads):
        if count % every == 0:
            for pair, (norm, bias) in zip(weights, initial, strict=True):
                pair[0] *= norm / np.linalg.norm(pair[0])
                pair[1] += pull * (bias - pair[1])

    class SGD(reference.SGD):
        def init(self, params):
            initial.extend((np.linalg.norm(kernel), bias.copy()) for kernel, bias in params)

    tx = cbp_jax.normalize_and_project(optax.sgd(0.3), every=every, pull=pull)
    following.follow_edits(tx, SGD(0.3), edit)


def test_norms_are_kept_in_bfloat16_and_kernels_of_zeros_are_not_projected():
    rng = np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.normal(size=(3, 3, 2, 4)), jnp.bfloat16), "zero": jnp.zeros((2, 2))}
    grads = {"a": jnp.asarray(rng.normal(size=(3, 3, 2, 4)), jnp.bfloat16), "zero": jnp.ones((2, 2))}
    tx = cbp_jax.normalize_and_project(optax.sgd(0.5))
    updates, _ = tx.update(grads, tx.init(params), params)
    after = optax.apply_updates(params, updates)
    norm = lambda w: np.linalg.norm(np.asarray(w, np.float64))
    np.testing.assert_allclose(norm(after["a"]), norm(params["a"]), rtol=2e-3)
    np.testing.assert_array_equal(after["zero"], -0.5)


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_step_at_the_effective_learning_rate_turns_a_normalized_kernel_as_far(adaptive):
    """The output of the network does not depend on the kernel's norm."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 7, 4))
    loss = lambda w: jnp.sum((x @ (w / jnp.linalg.norm(w)) - y) ** 2)
    w = jnp.asarray(rng.normal(size=(4, 4)) * 3)
    unit = w / jnp.linalg.norm(w)
    rate = 0.01

    def direction(w, rate):
        gradient = jax.grad(loss)(w)
        moved = w - rate * (gradient / jnp.linalg.norm(gradient) if adaptive else gradient)
        return moved / jnp.linalg.norm(moved)

    effective = cbp_jax.effective_learning_rate({"w": w}, rate, adaptive=adaptive)["w"]
    np.testing.assert_allclose(direction(unit, effective), direction(w, rate), rtol=1e-4, atol=1e-6)


def test_bad_settings():
    for settings, words in (
        ({"every": 0}, r"every must be in \[1, inf\), got 0"),
        ({"pull": 1.5}, r"pull must be in \[0, 1\], got 1.5"),
    ):
        with pytest.raises(ValueError, match=words):
            cbp_jax.normalize_and_project(optax.sgd(0.1), **settings)
    tx = cbp_jax.normalize_and_project(optax.sgd(0.1))
    with pytest.raises(ValueError, match="kernels must choose an array"):
        tx.init({"b": jnp.ones(3)})
    params = {"w": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="normalize_and_project needs the params"):
        tx.update(params, tx.init(params))
