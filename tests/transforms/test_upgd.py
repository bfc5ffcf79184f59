"""UPGD against NumPy in float64, and errors of its public implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import cbp_jax
from cbp_jax.numerics import noise
from cbp_jax.transforms.upgd import adaptive_upgd, scale_by_upgd, upgd

# Cases that are similar to others and take seconds to compile; see conftest.py.
SLOW_CASES = {
    "test_zero_and_tiny_gradients": ("None-global",),
}

SIZES, STEPS, ALPHA, DECAY = (5, 4, 3), 60, 0.05, 0.1
LAYERS = [reference.Dense(4, "tanh"), reference.Dense(3)]


def apply_fn(params, x):
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"w1": (5, 4), "b1": (4,), "w2": (4, 3), "b2": (3,)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def make_batches():
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(STEPS, 2, 5)), jnp.float32), jnp.asarray(rng.integers(0, 3, (STEPS, 2)))


PARAMS, (X, Y) = make_params(), make_batches()
UNITS = cbp_jax.discover_units(apply_fn, PARAMS, X[0])


def loss_fn(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(apply_fn(params, x), y).mean()


def exact_curvature(params, x, y):
    hessian = jax.hessian(loss_fn)(params, x, y)
    return {
        name: jnp.diagonal(hessian[name][name].reshape(w.size, w.size)).reshape(w.shape) for name, w in params.items()
    }


def train(tx, order=1):
    """Return the parameters after each step, [STEPS, ...]."""

    def step(carry, batch):
        params, state = carry
        curvature = {"hessian_diag": exact_curvature(params, *batch)} if order == 2 else {}
        updates, state = tx.update(jax.grad(loss_fn)(params, *batch), state, params, **curvature)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), (X, Y))[1]


@functools.cache
def compiled(order, scope, featurewise):
    """Compile a run as a function of the settings that may be traced, so that there are few compilations."""
    static = {"order": order, "scope": scope, "units": UNITS if featurewise else None}
    return jax.jit(lambda **traced: train(upgd(ALPHA, weight_decay=DECAY, **static, **traced), order))


# ------------------------------------------------------------------------------------ the independent implementation


def numpy_gradient(params, x, y):
    pairs = [(params["w1"], params["b1"]), (params["w2"], params["b2"])]
    logits, tape = reference.forward(LAYERS, pairs, x)
    (w1, b1), (w2, b2) = reference.backward(LAYERS, pairs, tape, reference.cross_entropy_gradient(logits, y))
    return {"w1": w1, "b1": b1, "w2": w2, "b2": b2}


def numpy_curvature(params, x, y, step=1e-5):
    """Compute the diagonal of the Hessian by central differences of the gradient."""
    result = {name: np.zeros_like(w) for name, w in params.items()}
    for name, w in params.items():
        for index in np.ndindex(w.shape):
            sides = []
            for sign in (1, -1):
                moved = {**params, name: w.copy()}
                moved[name][index] += sign * step
                sides.append(numpy_gradient(moved, x, y)[name][index])
            result[name][index] = (sides[0] - sides[1]) / (2 * step)
    return result


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def numpy_upgd(beta, order, scope, protect, featurewise, draws, adam=None):
    """Run Algorithm 1 or its feature-wise and adaptive variants step by step; `draws` holds the noise of each step."""
    params = {name: np.asarray(w, np.float64) for name, w in PARAMS.items()}
    mean = {name: 0.0 for name in params} | {"hidden": 0.0}
    mu, nu = ({name: 0.0 for name in params} for _ in range(2))
    history = []
    for t in range(1, STEPS + 1):
        x, y = np.asarray(X[t - 1], np.float64), np.asarray(Y[t - 1])
        g = numpy_gradient(params, x, y)
        h = numpy_curvature(params, x, y) if order == 2 else {name: 0.0 for name in params}
        utility = {name: 0.5 * h[name] * w**2 - g[name] * w for name, w in params.items()}
        if featurewise:
            utility = {"hidden": utility["w2"].sum(1)}
        corrected = {}
        for name, u in utility.items():
            mean[name] = beta * mean[name] + (1 - beta) * u
            corrected[name] = mean[name] / (1 - beta**t)
        if scope == "global":
            largest = max(u.max() for u in corrected.values())
            scaled = {name: u / abs(largest) for name, u in corrected.items()}
        else:  # a column has one output unit; a vector is one column
            scaled = {name: u / np.sqrt((u**2).sum(0)) for name, u in corrected.items()}
        gate = {name: 1 - sigmoid(u) for name, u in scaled.items()}
        owned = {name: 1.0 for name in params}
        if featurewise:
            owned = {"w1": 1.0, "b1": 1.0, "w2": 0.0, "b2": 0.0}
            gate = {"w1": gate["hidden"][None], "b1": gate["hidden"], "w2": 1.0, "b2": 1.0}
        for name, w in params.items():
            direction = g[name]
            if adam:
                b1, b2, eps = adam
                mu[name] = b1 * mu[name] + (1 - b1) * g[name]
                nu[name] = b2 * nu[name] + (1 - b2) * g[name] ** 2
                direction = mu[name] / (1 - b1**t) / (np.sqrt(nu[name] / (1 - b2**t)) + eps)
            xi = owned[name] * draws[name][t - 1]
            step = (direction + xi) * gate[name] if protect else direction + xi * gate[name]
            params[name] = (1 - ALPHA * DECAY) * w - ALPHA * step
        history.append(dict(params))
    return {name: np.stack([params[name] for params in history]) for name in params}


def draws(sigma):
    """Return the noise that a new state draws at each step."""
    key = jax.jit(upgd(ALPHA).init)(PARAMS)[0].key
    tree = jax.jit(jax.vmap(lambda step: noise.normal(key, step, PARAMS, sigma)))(jnp.arange(STEPS))
    return {name: np.asarray(leaf, np.float64) for name, leaf in tree.items()}


VARIANTS = [
    # Curvature by finite differences takes long in NumPy.
    pytest.param(
        *(beta, order, scope, protect, featurewise, sigma),
        marks=[pytest.mark.slow] if order == 2 and beta == 0 and sigma else [],
    )
    for beta in (0.0, 0.9)
    for order in (1, 2)
    for scope in ("global", "local")
    for protect, featurewise, sigma in ((True, False, 0.0), (True, True, 0.3), (False, False, 0.3))
]


@pytest.mark.parametrize(("beta", "order", "scope", "protect", "featurewise", "sigma"), VARIANTS)
def test_against_numpy(beta, order, scope, protect, featurewise, sigma):
    ours = compiled(order, scope, featurewise)(beta_utility=beta, sigma=sigma, protect=jnp.asarray(protect))
    theirs = numpy_upgd(beta, order, scope, protect, featurewise, draws(sigma))
    for name, w in theirs.items():
        np.testing.assert_allclose(ours[name], w, rtol=1e-5, atol=1e-5, err_msg=name)
    assert all(np.abs(w[-1] - w[0]).max() > 0.05 for w in theirs.values())


@pytest.mark.parametrize(("beta", "protect", "sigma"), [(0.0, True, 0.0), (0.9, False, 0.3)])
def test_adaptive_against_numpy(beta, protect, sigma):
    moments = (0.8, 0.95, 1e-3)
    settings = {"beta_utility": beta, "protect": protect, "sigma": sigma, "weight_decay": DECAY}
    tx = adaptive_upgd(ALPHA, b1=moments[0], b2=moments[1], eps=moments[2], **settings)
    theirs = numpy_upgd(beta, 1, "global", protect, False, draws(sigma), moments)
    ours = jax.jit(lambda: train(tx))()
    for name, w in theirs.items():
        np.testing.assert_allclose(ours[name], w, rtol=1e-5, atol=1e-5, err_msg=name)


# ------------------------------------------------------------------------------------- errors of the public code


def gates(grads, params, **settings):
    """Return the ratio of an update without noise to the gradient; grads must not contain zeros."""
    tx = scale_by_upgd(sigma=0.0, **settings)
    updates, _ = jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params))(grads, params)
    return jax.tree.map(lambda u, g: np.asarray(u / g), updates, grads)


def test_mean_and_maximum_are_both_corrected():
    """The public code corrects only the mean, so its first gates, at beta 0.999, are those of 1000 times larger
    utilities."""
    grads = jax.tree.map(lambda w: -w, PARAMS)
    at_once, averaged = (gates(grads, PARAMS, beta_utility=beta) for beta in (0.0, 0.999))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), averaged, at_once)
    top = max(float((w**2).max()) for w in jax.tree.leaves(PARAMS))
    jax.tree.map(
        lambda gate, w: np.testing.assert_allclose(gate, 1 - sigmoid(np.square(w) / top), rtol=1e-5), at_once, PARAMS
    )


def test_global_spans_all_parameters():
    one = gates({"a": jnp.array([-1.0])}, {"a": jnp.array([1.0])})
    np.testing.assert_allclose(one["a"], 1 - sigmoid(1.0), rtol=1e-6)
    two = gates({"a": jnp.array([-1.0]), "b": jnp.array([-4.0])}, {"a": jnp.array([1.0]), "b": jnp.array([1.0])})
    np.testing.assert_allclose(two["a"], 1 - sigmoid(0.25), rtol=1e-6)


@pytest.mark.parametrize("scope", ["global", "local"])
def test_without_positive_utilities_the_order_is_kept(scope):
    """Dividing by a negative maximum would protect the most harmful weight most."""
    params = jnp.array([1.0, 2.0, 4.0, 8.0])
    found = gates(jnp.ones(4), params, scope=scope)  # utilities -1, -2, -4, -8
    assert np.isfinite(found).all() and (np.diff(found) > 0).all() and (found > 0.5).all() and (found <= 1).all()


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("units", [None, UNITS])
def test_zero_and_tiny_gradients(scope, units):
    tx = scale_by_upgd(sigma=0.1, scope=scope, units=units)
    state = tx.init(PARAMS)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, PARAMS), state, PARAMS)
    draw = noise.normal(state.key, 0, PARAMS, 0.1)
    np.testing.assert_allclose(updates["w1"], 0.5 * draw["w1"], rtol=1e-6)

    small = jax.tree.map(lambda w: -1e-25 * w, PARAMS)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4),
        gates(small, PARAMS, scope=scope, units=units),
        gates(jax.tree.map(lambda g: 1e25 * g, small), PARAMS, scope=scope, units=units),
    )


def test_a_maximum_of_zero_opens_the_gates_of_harmful_weights():
    params, grads = jnp.array([0.0, 1.0, 2.0]), jnp.array([3.0, 1.0, 1.0])  # utilities 0, -1, -2
    np.testing.assert_allclose(gates(grads, params), [0.5, 1.0, 1.0], rtol=1e-6)


def test_local_scope_normalizes_over_the_incoming_weights_of_each_unit():
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 2, 5)), jnp.float32)
    grads = jnp.asarray(rng.normal(size=kernel.shape), jnp.float32)
    u = -np.asarray(kernel * grads, np.float64)
    expected = 1 - sigmoid(u / np.sqrt((u**2).sum((0, 1, 2), keepdims=True)))
    np.testing.assert_allclose(gates(grads, kernel, scope="local"), expected, rtol=1e-5)
    expected = 1 - sigmoid(u / np.sqrt((u**2).sum(-1, keepdims=True)))
    found = gates(
        {"k": grads}, {"k": kernel}, scope="local", incoming_axes=lambda path, leaf: (3,) if path == "k" else ()
    )
    np.testing.assert_allclose(found["k"], expected, rtol=1e-5)
    scalar = gates(jnp.float32(-2.0), jnp.float32(1.0), scope="local")
    np.testing.assert_allclose(scalar, 1 - sigmoid(1.0), rtol=1e-6)


def test_unprotected_without_noise_is_decayed_sgd():
    sgd = optax.with_extra_args_support(optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(ALPHA)))
    ours = jax.jit(lambda: train(upgd(ALPHA, weight_decay=DECAY, sigma=0.0, protect=False)))()
    theirs = jax.jit(lambda: train(sgd))()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), ours, theirs)


@pytest.mark.parametrize("protect", [True, False])
def test_noise_is_gated(protect):
    """Useful weights get less noise: it is normal, with the given standard deviation times the gate."""
    params = jnp.concatenate([jnp.full(20_000, 2.0), jnp.full(20_000, -2.0)])
    grads = jnp.full(40_000, -1.0)  # utilities 2 and -2
    tx = scale_by_upgd(sigma=0.5, protect=protect)
    updates, _ = tx.update(grads, tx.init(params), params)
    useful, useless = updates[:20_000], updates[20_000:]
    for part, gate in ((useful, 1 - sigmoid(1.0)), (useless, 1 - sigmoid(-1.0))):
        assert abs(np.std(part) / (0.5 * gate) - 1) < 0.02
        assert abs(np.mean(part) + (gate if protect else 1.0)) < 0.02


def test_decay_is_decoupled_and_scaled_by_the_learning_rate():
    tx = upgd(0.1, weight_decay=0.5, sigma=0.0)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, PARAMS), tx.init(PARAMS), PARAMS)
    jax.tree.map(lambda u, w: np.testing.assert_allclose(u, -0.05 * w, rtol=1e-6), updates, PARAMS)


def test_learning_rate_schedule():
    schedule = optax.piecewise_constant_schedule(0.1, {1: 0.5})
    tx = upgd(schedule, sigma=0.0, beta_utility=0.0)
    state, grads = tx.init(PARAMS), jax.tree.map(jnp.ones_like, PARAMS)
    first, state = tx.update(grads, state, PARAMS)
    second, _ = tx.update(grads, state, PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, 0.5 * a, rtol=1e-6), first, second)


# ---------------------------------------------------------------------------------------------- feature-wise utility


def conv_network(params, x, gates=None):
    """Return a network of convolution, pooling, flattening and two dense heads on one torso; gates multiply units."""
    conv, dense = (jnp.ones(4), jnp.ones(6)) if gates is None else gates
    h = jax.lax.conv_general_dilated(x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    h = jax.lax.reduce_window(jax.nn.relu(h), -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") * conv
    h = jnp.tanh(h.reshape(len(x), -1) @ params["dense"]) * dense
    return h @ params["head1"], h @ params["head2"]


@pytest.mark.slow
def test_a_units_utility_is_minus_the_gradient_of_its_gate():
    """This includes units with several positions in a flattened convolution, and units that several heads read."""
    rng = np.random.default_rng(0)
    shapes = {"conv": (3, 3, 2, 4), "dense": (16, 6), "head1": (6, 3), "head2": (6, 2)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    x = jnp.asarray(rng.normal(size=(3, 4, 4, 2)), jnp.float32)

    def loss(params, gates=None):
        one, two = conv_network(params, x, gates)
        return jnp.mean(jnp.sin(one)) + jnp.sum(two**3)

    units = cbp_jax.discover_units(conv_network, params, x)
    tx = scale_by_upgd(beta_utility=0.0, units=units)
    _, state = tx.update(jax.jit(jax.grad(loss))(params), tx.init(params), params)
    conv, dense = jax.jit(jax.grad(loss, argnums=1))(params, (jnp.ones(4), jnp.ones(6)))
    np.testing.assert_allclose(state.utility["conv"], -conv, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(state.utility["dense"], -dense, rtol=1e-4, atol=1e-4)


def test_units_gate_only_their_incoming_weights():
    tx = scale_by_upgd(sigma=0.3, units=UNITS)
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    updates, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(updates["w2"], grads["w2"])  # has no output unit: neither gate nor noise
    np.testing.assert_array_equal(updates["b2"], grads["b2"])
    u = state.utility["w1"]
    draw = noise.normal(state.key, 0, PARAMS, 0.3)
    gate = 1 - sigmoid(np.asarray(u / jnp.abs(u.max()), np.float64))
    np.testing.assert_allclose(updates["w1"], (1 + draw["w1"]) * gate, rtol=1e-5)
    np.testing.assert_allclose(updates["b1"], (1 + draw["b1"]) * gate, rtol=1e-5)


# ------------------------------------------------------------------------------------ with other transformations


@pytest.mark.parametrize("featurewise", [False, True])
def test_inside_continual_backprop_replaced_weights_lose_their_utility(featurewise):
    inner = upgd(0.1, sigma=0.01, units=UNITS if featurewise else None)
    tx = cbp_jax.continual_backprop(inner, UNITS, replacement_rate=0.3, maturity_threshold=2)
    apply = cbp_jax.with_features(apply_fn, UNITS)

    @jax.jit
    def step(params, state, x, y):
        def loss(params):
            logits, features = apply(params, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), features

        grads, features = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params, features=features)
        return optax.apply_updates(params, updates), state

    params, state, total = PARAMS, tx.init(PARAMS), 0
    for x, y in zip(X[:12], Y[:12], strict=True):
        params, state = step(params, state, x, y)
        (replaced,), (age,), utility = state.replaced.values(), state.age.values(), state.inner_state[0].utility
        old = age > 1  # in its first step a unit has no outgoing weights, so no gradients
        total += int(replaced.sum())
        if featurewise:
            assert not utility["w1"][replaced].any() and utility["w1"][old].all()
        else:
            assert not utility["w1"][:, replaced].any() and not utility["w2"][replaced].any()
            assert utility["w1"][:, old].all() and utility["w2"][old].all()
    assert total >= 8


def test_injected_hyperparameters_need_no_static_arguments():
    tx = optax.inject_hyperparams(upgd)(0.1, sigma=0.0, protect=False)
    state = tx.init(PARAMS)
    state.hyperparams["learning_rate"] = jnp.float32(0.2)
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    updates, _ = jax.jit(tx.update)(grads, state, PARAMS)
    jax.tree.map(lambda u: np.testing.assert_allclose(u, -0.2, rtol=1e-6), updates)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: upgd(float("nan")), "learning_rate must be .* got nan"),
        (lambda: upgd(0.1, weight_decay=-1.0), r"weight_decay must be in \[0, inf\), got -1.0"),
        (lambda: upgd(0.1, beta_utility=1.0), r"beta_utility must be in \[0, 1\), got 1.0"),
        (lambda: upgd(0.1, sigma=-0.1), r"sigma must be in \[0, inf\), got -0.1"),
        (lambda: upgd(0.1, order=3), r"order must be one of \(1, 2\), got 3"),
        (lambda: upgd(0.1, scope="layer"), "scope must be 'global' or 'local', got 'layer'"),
        (lambda: upgd(0.1, protect="yes"), r"protect must be one of \(True, False\), got 'yes'"),
        (lambda: adaptive_upgd(0.1, b1=1.0), r"b1 must be in \[0, 1\), got 1.0"),
        (lambda: upgd(0.1, units=UNITS).init({"w": jnp.ones(3)}), "units do not match the params"),
    ],
)
def test_bad_settings(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_missing_params_and_curvature():
    tx = upgd(0.1, order=2)
    with pytest.raises(ValueError, match=r"UPGD of order 2 needs the diagonal of the Hessian.*hessian_diag"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="UPGD needs the params"):
        tx.update(PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize("of", [lambda w: w.reshape(1, *w.shape), lambda w: w.sum(), lambda w: {"of": w}])
def test_a_curvature_that_only_broadcasts_to_the_gradients_is_refused(of):
    tx = scale_by_upgd(order=2)
    with pytest.raises(ValueError, match="hessian_diag must be a tree of the gradients' shapes"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, hessian_diag=jax.tree.map(of, PARAMS))


@pytest.mark.parametrize("order", [1, jnp.float32(1)])
def test_first_order_upgd_ignores_curvature_even_if_it_is_infinite(order):
    tx, first = (scale_by_upgd(sigma=0.0, order=order) for order in (order, 1))
    infinite = jax.tree.map(lambda w: jnp.full(w.shape, jnp.inf), PARAMS)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, hessian_diag=infinite)
    expected, _ = first.update(PARAMS, first.init(PARAMS), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
