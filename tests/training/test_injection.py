import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cbp_jax.experiments.learners import make_learner, parse_method
from cbp_jax.training import init_state
from cbp_jax.training.learner import begin_task, weights_of

PIXELS, CLASSES = 4, 3
HEAD = ("Dense_1", "Dense_2")


@pytest.fixture(scope="module")
def stream():
    """Return a learner's state before and after the start of task 1, predictions, and an update with gradients of 1."""
    method = parse_method("injection:step_size=0.01,inject_at=1")
    learner = make_learner([method], (6, 5), "relu", (PIXELS,), CLASSES)
    numbers = {name: jnp.float32(value) for name, value in method.hyperparameters.items()}
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, PIXELS)), jnp.float32)

    @jax.jit
    def go(task):
        state = init_state(learner, 0, numbers)._replace(task=task)
        tx = optax.with_extra_args_support(learner.optimizer(numbers, jax.random.key(0)))
        grads = jax.grad(lambda params: jnp.sum(learner.predict(params, x)[0] ** 2))
        updates, opt_state = tx.update(grads(state.params), state.opt_state, state.params)
        before = state._replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)
        params, opt_state = begin_task(learner, tx, before)
        updates, _ = tx.update(grads(params), opt_state, params)
        after = optax.apply_updates(params, updates)
        outputs = [learner.predict(each, x) for each in (before.params, params, after)]
        return before.params, params, opt_state, after, outputs

    return learner, go, x


def test_before_the_task_nothing_is_injected(stream):
    _, go, x = stream
    before, params, _, _, outputs = go(jnp.int32(0))
    jax.tree.map(np.testing.assert_array_equal, before, params)
    layers, h = before["params"], x
    for number in range(3):
        h = h @ layers[f"Dense_{number}"]["kernel"] + layers[f"Dense_{number}"]["bias"]
        h = np.maximum(h, 0) if number < 2 else h
    np.testing.assert_allclose(outputs[0][0], h, rtol=1e-5, atol=1e-5)
    assert outputs[0][1]["params/Dense_1"].shape == (5, 5)
    assert list(weights_of(params)) == ["params"]  # frozen heads are not measured as weights


def test_at_the_task_outputs_are_unchanged_and_a_fresh_head_learns(stream):
    _, go, _ = stream
    before, params, opt_state, after, outputs = go(jnp.int32(1))
    np.testing.assert_allclose(outputs[0][0], outputs[1][0], rtol=1e-4, atol=1e-4)
    assert not np.allclose(outputs[1][0], outputs[2][0], atol=1e-3)
    for layer in ("Dense_0", *HEAD):
        same = np.array_equal(before["params"][layer]["kernel"], params["params"][layer]["kernel"])
        assert same == (layer not in HEAD)
        path = f"params/{layer}/kernel"
        if layer in HEAD:
            frozen = params["injection"][path]
            np.testing.assert_array_equal(frozen[0], before["params"][layer]["kernel"])
            np.testing.assert_array_equal(frozen[1], params["params"][layer]["kernel"])
        mu = np.asarray(opt_state[0].mu["params"][layer]["kernel"])
        assert mu.any() == (layer not in HEAD)  # Adam's moments of the old head do not apply to the new one
        assert not np.array_equal(params["params"][layer]["kernel"], after["params"][layer]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, params["injection"], after["injection"])


def test_networks_that_cannot_take_an_injection_are_refused():
    make = lambda text, **given: make_learner([parse_method(text)], (5,), "relu", (PIXELS,), CLASSES, **given)
    with pytest.raises(ValueError, match="nothing can be injected into a network with a head that is reset"):
        make("injection", reset_head=True)
    with pytest.raises(ValueError, match="nothing can be injected into a network with a head that is reset"):
        make("injection:reset=head")
    with pytest.raises(ValueError, match="the head has 3 layers, and the network has 1 hidden layers"):
        make("injection:head_layers=3")
