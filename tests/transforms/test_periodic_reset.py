import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cbp_jax
from cbp_jax.experiments.learners import make_learner, parse_method
from cbp_jax.training import init_state

EVERY, STEPS, RATE, MOMENTUM = 3, 8, 0.1, 0.9
PARAMS = {"hidden": {"kernel": jnp.ones((2, 3))}, "head": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}


def fresh(key):
    return jax.tree.map(lambda leaf: jax.random.uniform(key, leaf.shape, minval=5, maxval=6), PARAMS)


def run(tx, grads):
    """Return the parameters after each update."""

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.jit(lambda grads: jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), grads)[1])(grads)


@pytest.mark.parametrize("layers", [None, ["head"], ["head/bias"]], ids=["network", "head", "bias"])
def test_agrees_with_numpy(layers):
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda leaf: jnp.float32(rng.normal(size=(STEPS, *leaf.shape))), PARAMS)
    params = run(cbp_jax.periodic_reset(optax.sgd(RATE, MOMENTUM), fresh, every=EVERY, layers=layers), grads)
    for layer, leaves in PARAMS.items():
        for name in leaves:
            path, got, g = f"{layer}/{name}", params[layer][name], grads[layer][name]
            reset = layers is None or any(path.startswith(each) for each in layers)
            w, trace, draws = np.ones(leaves[name].shape), 0.0, []
            for step in range(STEPS):
                trace = g[step] + MOMENTUM * trace
                w = w - RATE * trace
                if reset and (step + 1) % EVERY == 0:
                    w, trace = np.asarray(got[step]), 0.0  # resets are checked below
                    draws.append(w)
                np.testing.assert_allclose(got[step], w, rtol=1e-4, atol=1e-5)
            for draw in draws:
                assert ((draw >= 5) & (draw <= 6)).all() and len(np.unique(draw)) == draw.size
            assert len(draws) == (STEPS // EVERY if reset else 0)
            assert not reset or not np.array_equal(draws[0], draws[1])


@pytest.mark.parametrize("text", ["adam:reset={},reset_every=4", "reset_{}:every=4"])
@pytest.mark.parametrize("reset", ["head", "network"])
def test_learners_reset_after_so_many_updates(reset, text):
    method = parse_method(text.format(reset)).with_settings({"step_size": 0.01})
    learner = make_learner([method], (3,), "relu", (5,), 2)
    assert learner.begin_task is None  # nothing is reset before tasks
    numbers = {name: jnp.float32(value) for name, value in method.hyperparameters.items()}

    @jax.jit
    def go():
        start = init_state(learner, 0, numbers)
        tx = optax.with_extra_args_support(learner.optimizer(numbers, jax.random.key(2)))
        grads = jax.tree.map(jnp.ones_like, start.params)

        def step(carry, _):
            updates, state = tx.update(grads, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), carry[0]

        (params, _), before = jax.lax.scan(step, (start.params, start.opt_state), length=4)
        return start.params, jax.tree.map(lambda leaf: leaf[-1], before), params

    first, before, after = (jax.tree.map(np.asarray, params["params"]) for params in go())
    for layer in first:
        moved = np.abs(after[layer]["kernel"] - (before[layer]["kernel"] - 0.01))
        anew = reset == "network" or layer == "Dense_1"
        assert (moved > 1e-3).any() == anew
        assert not np.allclose(after[layer]["kernel"], first[layer]["kernel"])
        np.testing.assert_allclose(after[layer]["bias"], 0 if anew else -0.04, atol=1e-6)


def test_bad_arguments_are_refused():
    make = lambda **given: cbp_jax.periodic_reset(optax.sgd(0.1), fresh, **{"every": 2, **given})
    with pytest.raises(ValueError, match=r"every must be a whole number, got 2\.5"):
        make(every=2.5)
    with pytest.raises(ValueError, match="the parameters have no layer 'heads'"):
        make(layers=["heads"]).init(PARAMS)
    with pytest.raises(ValueError, match=r"init must give 'head/bias' in the shape \(7,\), got \(2,\)"):
        make().init({**PARAMS, "head": {**PARAMS["head"], "bias": jnp.ones(7)}})
    with pytest.raises(ValueError, match="periodic_reset needs the params"):
        make().update(PARAMS, make().init(PARAMS))
    with pytest.raises(ValueError, match="reset_every says when"):
        parse_method("bp:reset_every=5")


def test_an_inner_state_that_cannot_be_reset_for_some_layers_is_refused():
    params = {"hidden": jnp.ones((256, 256)), "head": jnp.ones((256, 256))}
    make = lambda layers: cbp_jax.periodic_reset(optax.adafactor(0.1), lambda key: params, every=2, layers=layers)
    jax.eval_shape(make(None).init, params)  # the whole state is reset
    with pytest.raises(ValueError, match="v_row"):
        make(["head"]).init(params)
