import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cbp_jax
from cbp_jax.tickets import (
    Trained,
    Training,
    apply_mask,
    constant_magnitudes,
    density,
    full_mask,
    iterative_magnitude_pruning,
    prune,
    random_mask_like,
    reinitialize,
)

X = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(32, 2)).astype(np.float32)
STEPS, KEPT = 30, 10


def init(key):
    a, b = jax.random.split(key)
    return {
        "w1": jax.random.normal(a, (6, 8)) / 2,
        "b1": jnp.zeros(8),
        "w2": jax.random.normal(b, (8, 2)) / 2,
    }


def apply_fn(params, x):
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"]


def loss(params, batch):
    x, y = batch
    return jnp.mean((apply_fn(params, x) - y) ** 2)


def batch(step):
    rows = jnp.arange(8) + 8 * (step % 4)
    return jnp.asarray(X)[rows], jnp.asarray(Y)[rows]


PARAMS = init(jax.random.key(0))
TRAIN = Training(
    loss=loss, optimizer=optax.sgd(0.1, 0.9), batch=batch, steps=STEPS, keep=(KEPT,), measure=lambda p: loss(p, (X, Y))
)
find = functools.partial(iterative_magnitude_pruning, TRAIN, PARAMS)


def numpy_tickets(rounds, fraction, rates, rewind_step):
    """Compute the same in float64, step by step."""
    theta = {name: np.asarray(leaf, np.float64) for name, leaf in PARAMS.items()}
    mask = {name: np.ones(leaf.shape, bool) for name, leaf in theta.items()}
    for number in range(rounds):
        w = {name: leaf * mask[name] for name, leaf in theta.items()}
        trace = {name: np.zeros_like(leaf) for name, leaf in w.items()}
        kept = w
        for step in range(0 if number == 0 else rewind_step, STEPS):
            if number == 0 and step == rewind_step:
                kept = dict(w)
            rows = slice(8 * (step % 4), 8 * (step % 4) + 8)
            x, y = X[rows].astype(np.float64), Y[rows].astype(np.float64)
            h = np.tanh(x @ w["w1"] + w["b1"])
            dout = 2 * (h @ w["w2"] - y) / y.size
            dz = dout @ w["w2"].T * (1 - h**2)
            grads = {"w1": x.T @ dz, "b1": dz.sum(0), "w2": h.T @ dout}
            trace = {name: 0.9 * trace[name] + grads[name] * mask[name] for name in w}
            w = {name: w[name] - 0.1 * trace[name] for name in w}
        theta = kept if number == 0 else theta
        for name in ("w1", "w2"):
            alive = int(mask[name].sum())
            out = round(fraction * rates.get(name, 1) * alive)
            size = np.where(mask[name], np.abs(w[name]), np.inf).ravel()
            mask[name].ravel()[np.argsort(size, kind="stable")[:out]] = False
        yield {name: leaf.copy() for name, leaf in mask.items()}, {n: theta[n] * mask[n] for n in theta}, w


@pytest.mark.parametrize("rewind_step", [0, KEPT])
def test_against_numpy(rewind_step):
    found = list(find(rounds=4, fraction=0.3, rates={"w2": 0.5}, rewind_step=rewind_step))
    expected = list(numpy_tickets(4, 0.3, {"w2": 0.5}, rewind_step))
    assert [each.number for each in found] == [1, 2, 3, 4]
    for each, (mask, rewound, trained) in zip(found, expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, each.mask, mask)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
        jax.tree.map(close, each.params, rewound)
        jax.tree.map(close, each.trained, trained)
        np.testing.assert_allclose(each.measured, loss(each.trained, (X, Y)), rtol=1e-6)


def test_rewinding_is_to_the_last_bit_and_masks_nest():
    for rewind_step, origin in ((0, PARAMS), (KEPT, TRAIN(PARAMS, full_mask(PARAMS)).kept[KEPT])):
        before = full_mask(PARAMS)
        for each in find(rounds=3, rewind_step=rewind_step):
            jax.tree.map(np.testing.assert_array_equal, each.params, apply_mask(origin, each.mask))
            assert jax.tree.all(jax.tree.map(lambda new, old: bool((new <= old).all()), each.mask, before))
            assert density(each.mask) < density(before)
            dead = jax.tree.map(lambda w, m: bool((w[~m] == 0).all()), each.trained, before)
            assert jax.tree.all(dead)
            before = each.mask


def test_one_round_is_one_shot_pruning():
    (ticket,) = find(rounds=1, fraction=0.8, scope="global")
    expected = prune(TRAIN(PARAMS, full_mask(PARAMS)).params, full_mask(PARAMS), 0.8, scope="global")
    jax.tree.map(np.testing.assert_array_equal, ticket.mask, expected)


def test_rounds_continue_from_a_mask():
    first, second = find(rounds=2)
    (again,) = find(rounds=1, mask=first.mask)
    jax.tree.map(np.testing.assert_array_equal, again.mask, second.mask)
    jax.tree.map(np.testing.assert_array_equal, again.params, second.params)


@pytest.mark.parametrize("rewind_step", [0, KEPT])
def test_lanes_equal_their_solo_runs(rewind_step):
    keys = jax.random.split(jax.random.key(0), 3)
    params = jax.vmap(init)(keys)
    together = list(iterative_magnitude_pruning(TRAIN, params, rounds=3, rewind_step=rewind_step, lanes=True))
    for lane in range(3):
        at = lambda tree, lane=lane: jax.tree.map(lambda leaf: leaf[lane], tree)
        alone = iterative_magnitude_pruning(TRAIN, at(params), rounds=3, rewind_step=rewind_step)
        for one, many in zip(alone, together, strict=True):
            assert many.number == one.number
            jax.tree.map(np.testing.assert_array_equal, at(many.mask), one.mask)
            close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
            jax.tree.map(close, at(many.params), one.params)
            jax.tree.map(close, at((many.trained, many.measured)), (one.trained, one.measured))
    assert (together[0].mask["w1"][0] != together[0].mask["w1"][1]).any()


@pytest.mark.slow
def test_the_whole_search_may_be_traced():
    def last(key):
        *_, ticket = iterative_magnitude_pruning(TRAIN, init(key), rounds=2)
        return ticket.mask, ticket.params

    keys = jax.random.split(jax.random.key(0), 2)
    masks, _ = jax.jit(jax.vmap(last))(keys)
    mask, _ = last(keys[1])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b), masks, mask)


def test_a_users_training_function():
    calls = []

    def train(params, mask, step):
        calls.append((step, float(density(mask))))
        return Trained({name: leaf * 2 for name, leaf in params.items()}, {5: params}, len(calls))

    found = list(iterative_magnitude_pruning(train, PARAMS, rounds=2, fraction=0.5, rewind_step=5))
    assert calls == [(0, 1.0), (5, 0.5)] and [each.measured for each in found] == [1, 2]
    expected = prune(PARAMS, prune(PARAMS, full_mask(PARAMS), 0.5), 0.5)
    jax.tree.map(np.testing.assert_array_equal, found[1].mask, expected)


def test_movement_as_the_score():
    score = lambda path, w: jnp.abs(w - PARAMS[path])
    (ticket,) = find(rounds=1, fraction=0.5, score=score)
    moved = {name: np.abs(np.asarray(ticket.trained[name] - PARAMS[name])) for name in ("w1", "w2")}
    for name, size in moved.items():
        assert size[~ticket.mask[name]].max() <= size[ticket.mask[name]].min()


def test_a_ticket_of_a_network_trained_by_continual_backpropagation():
    units = cbp_jax.discover_units(apply_fn, PARAMS, X)
    with_features = cbp_jax.with_features(apply_fn, units)

    def loss_and_features(params, batch):
        output, features = with_features(params, batch[0])
        return jnp.mean((output - batch[1]) ** 2), features

    tx = cbp_jax.continual_backprop(cbp_jax.adam(0.01), units, replacement_rate=0.05, maturity_threshold=2)
    train = Training(loss=loss_and_features, optimizer=tx, batch=batch, steps=STEPS, features=True)
    before = full_mask(PARAMS)
    for each in iterative_magnitude_pruning(train, PARAMS, rounds=3, fraction=0.3):
        assert jax.tree.all(jax.tree.map(lambda w, m: bool((w[~m] == 0).all()), each.trained, before))
        assert (each.trained["w1"] != PARAMS["w1"]).any()
        before = each.mask


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"fraction": 1.0}, r"fraction must be in \[0, 1\), got 1"),
        ({"fraction": -0.1}, r"fraction must be in \[0, 1\), got -0.1"),
        ({"scope": "all"}, "scope must be 'layer' or 'global', got 'all'"),
        ({"rates": {"w9": 0.5}}, "rates has the pattern 'w9', which matches none of"),
        ({"mask": {"w1": jnp.ones((6, 8), bool)}}, "mask must be of the structure of the params"),
        ({"mask": jax.tree.map(jnp.ones_like, PARAMS)}, "mask must be a tree of bool arrays"),
        ({"mask": jax.tree.map(lambda w: w != w, PARAMS)}, "mask has no living weight left in w1"),
        ({"score": {"w1": jnp.ones((6, 8))}}, "score must be a tree of the structure of the params"),
        ({"rewind_step": 11}, r"rewind_step must be one of the steps that training keeps, \(10,\), got 11"),
        ({"rewind_step": -1}, "rewind_step must be at least 0, got -1"),
    ],
)
def test_bad_input_is_reported_before_training(settings, message):
    def train(params, mask, step):
        raise AssertionError("it has trained")

    train.keep = (KEPT,)
    with pytest.raises(ValueError, match=message):
        iterative_magnitude_pruning(train, PARAMS, **{"rounds": 1, **settings})


def test_steps_that_a_users_training_function_did_not_keep():
    train = lambda params, mask, step: Trained(params, {3: params})
    with pytest.raises(ValueError, match=r"rewind_step must be one of the steps that training keeps, \(3,\), got 2"):
        next(iterative_magnitude_pruning(train, PARAMS, rounds=1, rewind_step=2))
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        Training(loss=loss, optimizer=optax.sgd(0.1), batch=batch, steps=0)
    with pytest.raises(ValueError, match="keep must be steps from 0 to 9, got 10"):
        Training(loss=loss, optimizer=optax.sgd(0.1), batch=batch, steps=10, keep=(10,))


def test_controls():
    (ticket,) = find(rounds=1, fraction=0.4)
    fresh = reinitialize(init, jax.random.key(1), ticket.mask)
    jax.tree.map(np.testing.assert_array_equal, fresh, apply_mask(init(jax.random.key(1)), ticket.mask))
    signs = jax.jit(constant_magnitudes)(PARAMS, ticket.mask)
    for name in ("w1", "w2"):
        mask, start = np.asarray(ticket.mask[name]), np.asarray(PARAMS[name], np.float64)
        assert (signs[name][~mask] == 0).all()
        np.testing.assert_allclose(signs[name][mask], np.sign(start[mask]) * start.std(), rtol=1e-5)
    assert (signs["b1"] == PARAMS["b1"]).all()
    random = random_mask_like(ticket.mask, 0)
    assert density(random) == density(ticket.mask) and (random["w1"] != ticket.mask["w1"]).any()
    for control in (reinitialize, constant_magnitudes):
        with pytest.raises(ValueError, match="mask must be of the structure"):
            mask = {"w1": ticket.mask["w1"]}
            control(init, jax.random.key(0), mask) if control is reinitialize else control(PARAMS, mask)
