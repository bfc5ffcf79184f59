"""replace_units: a policy is a single function, and its results are checked."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cbp_jax
from cbp_jax.replacement import replaced_units

PARAMS = {"w1": jnp.ones((4, 8)), "w2": jnp.ones((8, 3)), "w3": jnp.ones((3, 2))}
FEATURES = {"w1": jnp.arange(16.0).reshape(2, 8), "w2": jnp.ones((2, 3))}


def apply_fn(params, x):
    return jax.nn.relu(jax.nn.relu(x @ params["w1"]) @ params["w2"]) @ params["w3"]


UNITS = cbp_jax.discover_units(apply_fn, PARAMS, jnp.ones((1, 4)))


def update(policy, steps=1, inner=None, **kwargs):
    tx = cbp_jax.replace_units(inner or optax.sgd(0.1), UNITS, policy)
    step = jax.jit(lambda state: tx.update(PARAMS, state, PARAMS, **kwargs))
    state = tx.init(PARAMS)
    for _ in range(steps):
        updates, state = step(state)
    return updates, state


def first(view, memory):
    return cbp_jax.Choice(jnp.array([0]))


@pytest.mark.parametrize("choose", [first, lambda view, memory: cbp_jax.Choice(jnp.arange(view.group.size) == 0)])
def test_choices_by_count_and_by_mask_agree(choose):
    updates, state = update(cbp_jax.Policy(choose), inner=optax.sgd(0.1, momentum=0.9))
    assert {name: mask.tolist() for name, mask in state.replaced.items()} == {
        "w1": [True] + [False] * 7,
        "w2": [True, False, False],
    }
    new = optax.apply_updates(PARAMS, updates)
    wanted, _ = update(cbp_jax.Policy(first))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), updates, wanted)
    assert not np.asarray(new["w2"])[0, 1:].any() and not np.asarray(new["w3"])[0].any()
    assert np.asarray(new["w2"])[:, 0].all()  # incoming weights are resampled, also from new units
    assert not np.asarray(state.inner_state[0].trace["w3"])[0].any()


def test_no_unit_is_replaced():
    updates, state = update(cbp_jax.Policy(lambda view, memory: cbp_jax.Choice(jnp.array([view.group.size]))))
    jax.tree.map(np.testing.assert_array_equal, updates, jax.tree.map(lambda g: -0.1 * g, PARAMS))
    assert replaced_units(state) == 0


def test_due_and_memory():
    """The policy is called only in due updates, and only then its memory changes."""

    def choose(view, memory):
        return cbp_jax.Choice(jnp.array([0, 2]), {"asked": memory["asked"] + view.count})

    policy = cbp_jax.Policy(choose, lambda group, params: {"asked": jnp.int32(0)}, lambda count: count % 3 == 0)
    tx = cbp_jax.replace_units(optax.sgd(0.1), UNITS, policy)
    step = jax.jit(lambda state: tx.update(PARAMS, state, PARAMS)[1])
    state = tx.init(PARAMS)
    for replaced, asked in [(0, 0), (0, 0), (4, 3), (0, 3), (0, 3), (4, 9)]:
        state = step(state)
        assert replaced_units(state) == replaced
        assert state.memory["asked"] == {"w1": asked, "w2": asked}


def test_groups_see_replacements_in_earlier_groups():
    """From input to output (Algorithm 1): weights from new units of earlier groups count as 0 in later utilities."""
    seen = []

    def choose(view, memory):
        seen.append(view.incoming_magnitude())
        return first(view, memory)

    tx = cbp_jax.replace_units(optax.sgd(0.1), UNITS, cbp_jax.Policy(choose))
    seen = jax.jit(lambda state: tx.update(PARAMS, state, PARAMS) and tuple(seen))(tx.init(PARAMS))
    np.testing.assert_allclose(seen[0], 4 * 0.9, rtol=1e-6)
    np.testing.assert_allclose(seen[1], 7 * 0.9, rtol=1e-6)


def test_mean_activation_goes_to_the_bias():
    def biased(params, x):
        return jax.nn.relu(x @ params["w1"]) @ params["w2"] + params["b"]

    params = {"w1": jnp.ones((4, 8)), "w2": jnp.ones((8, 3)), "b": jnp.zeros(3)}
    units = cbp_jax.discover_units(biased, params, jnp.ones((1, 4)))
    means = lambda view: tuple(h.mean(0)[None] for h in view.features)
    policy = cbp_jax.Policy(lambda view, memory: cbp_jax.Choice(jnp.array([5]), {}, means(view)))
    tx = cbp_jax.replace_units(optax.sgd(0.0), units, policy)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params, features=FEATURES)
    np.testing.assert_allclose(updates["b"], 9.0)  # unit 5 contributed 5 and 13


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (cbp_jax.Policy(lambda view, memory: cbp_jax.Choice(jnp.array(0))), r"choose units of group 'w1'.*int32 \[\]"),
        (cbp_jax.Policy(lambda view, memory: cbp_jax.Choice(jnp.zeros(3, bool))), r"bool \[8\], got bool \[3\]"),
        (cbp_jax.Policy(lambda view, memory: cbp_jax.Choice(jnp.array([0.5]))), "got float32"),
        (
            cbp_jax.Policy(lambda view, memory: cbp_jax.Choice(jnp.array([0]), {"a": 1.0})),
            r"memory of group 'w1' must stay \{\}",
        ),
        (cbp_jax.Policy(lambda view, memory: first(view, view.features)), "features must hold the activations"),
    ],
)
def test_bad_answers(policy, message):
    with pytest.raises(ValueError, match=message):
        update(policy)


def test_params_are_needed():
    tx = cbp_jax.replace_units(optax.sgd(0.1), UNITS, cbp_jax.Policy(first))
    with pytest.raises(ValueError, match="replace_units needs the params"):
        tx.update(PARAMS, tx.init(PARAMS))


def test_a_utility_is_a_single_function():
    """The unit with the lowest value of the user's utility is replaced."""
    utility = lambda view: jnp.abs(jnp.arange(view.group.size) - 2.0)
    tx = cbp_jax.continual_backprop(
        optax.sgd(0.1), UNITS, utility=utility, replacement_rate=0.125, maturity_threshold=0, key=1
    )
    _, state = jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS, features=FEATURES)
    assert state.replaced["w1"].tolist() == [False, False, True] + [False] * 5


def test_a_mean_activation_needs_a_bias_that_takes_it():
    def choose(view, memory):
        return cbp_jax.Choice(jnp.array([0]), mean_activation=(jnp.zeros((1, view.group.size)),))

    with pytest.raises(ValueError, match="'w2', which reads group 'w1', has no bias"):
        update(cbp_jax.Policy(choose), features=FEATURES)
