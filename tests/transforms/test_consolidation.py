"""Streaming EWC, MAS, synaptic intelligence and RWalk against float64 NumPy, and errors of public versions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import cbp_jax
from cbp_jax.transforms import consolidation

LEARNERS = {
    "ewc": cbp_jax.ewc,
    "mas": cbp_jax.mas,
    "synaptic_intelligence": cbp_jax.synaptic_intelligence,
    "rwalk": cbp_jax.rwalk,
}
PATH = ("synaptic_intelligence", "rwalk")
LAYERS = (reference.Dense(6, "tanh"), reference.Dense(3))
STEPS = 80
RNG = np.random.default_rng(0)
XS = RNG.normal(size=(STEPS, 5, 4)).astype(np.float32)
LABELS = RNG.integers(3, size=(STEPS, 5))
PARAMS = [
    [RNG.normal(size=shape).astype(np.float32) for shape in shapes] for shapes in (((4, 6), (6,)), ((6, 3), (3,)))
]
# Strengths at which the pull is a large part of a step; importances differ by orders of magnitude.
STRENGTH = {"ewc": 30.0, "mas": 5.0, "synaptic_intelligence": 2.0, "rwalk": 2.0}


class Consolidator:
    """SGD with consolidation in float64, from the definitions: sums of discounted terms, then corrected."""

    def __init__(self, kind, rate, strength, beta_weight, beta_importance, epsilon):
        self.kind, self.rate, self.strength, self.epsilon = kind, rate, strength, epsilon
        self.beta_weight, self.beta_importance = beta_weight, beta_importance
        self.weights, self.gradients = [], []

    def mean(self, terms, beta):
        """Average all terms so far, with weight 1 for the last one, beta for the one before it, and so on."""
        counts = beta ** np.arange(len(terms))[::-1]
        return np.tensordot(counts, np.stack(terms), 1) / counts.sum()

    def importance(self):
        g = self.gradients
        mean = functools.partial(self.mean, beta=self.beta_importance)
        if self.kind == "ewc":
            return mean([x**2 for x in g])
        if self.kind == "mas":
            return mean([abs(x) for x in g])
        changes = [np.zeros_like(g[0]), *np.diff(self.weights, axis=0)]
        gains = [np.zeros_like(g[0]), *(-x * d for x, d in zip(g[:-1], changes[1:], strict=True))]
        if self.kind == "synaptic_intelligence":
            return mean(gains) / (mean(changes) ** 2 + self.epsilon)
        scores = [np.zeros_like(g[0])]
        for t in range(1, len(g)):
            fisher = mean([x**2 for x in g[:t]])
            scores.append(np.maximum(gains[t], 0) / (0.5 * fisher * changes[t] ** 2 + self.epsilon))
        return mean([x**2 for x in g]) + mean(scores)

    def step(self, w, g):
        self.weights.append(w)
        self.gradients.append(g)
        pull = self.strength * self.importance() * (w - self.mean(self.weights, self.beta_weight))
        self.pulled = np.abs(self.rate * pull).max()
        return w - self.rate * (g + pull)


def run_reference(kind, **settings):
    params = [[np.asarray(leaf, np.float64) for leaf in pair] for pair in PARAMS]
    learners = [[Consolidator(kind, **settings) for _ in pair] for pair in params]
    history, pulled = [], 0.0
    for x, labels in zip(XS, LABELS, strict=True):
        logits, tape = reference.forward(LAYERS, params, x)
        grads = reference.backward(LAYERS, params, tape, reference.cross_entropy_gradient(logits, labels))
        params = [
            [learner.step(w, g) for learner, w, g in zip(*three, strict=True)]
            for three in zip(learners, params, grads, strict=True)
        ]
        history.append(params)
        pulled = max([pulled, *(learner.pulled for pair in learners for learner in pair)])
    return history, pulled


def loss_fn(params, x, labels):
    (w1, b1), (w2, b2) = params
    logits = jnp.tanh(x @ w1 + b1) @ w2 + b2
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def run_package(tx):
    def step(carry, batch):
        params, state = carry
        updates, state = tx.update(jax.grad(loss_fn)(params, *batch), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    params = jax.tree.map(jnp.asarray, PARAMS)
    return jax.lax.scan(step, (params, tx.init(params)), (XS, LABELS))[1]


@functools.cache
def compiled(kind):
    """Return the history of the params for traced settings."""
    return jax.jit(lambda settings: run_package(LEARNERS[kind](**settings)))


@pytest.mark.parametrize("kind", LEARNERS)
@pytest.mark.parametrize(
    ("beta_weight", "beta_importance"),
    [pytest.param(0.9, 0.9, marks=pytest.mark.slow), (0.999, 0.0), (0.0, 0.9), (0.95, 0.999)],
)
def test_follows_the_numpy_reference(kind, beta_weight, beta_importance):
    settings = {"strength": STRENGTH[kind], "beta_weight": beta_weight, "beta_importance": beta_importance}
    epsilon = {"epsilon": 1e-2} if kind in PATH else {}
    history = jax.device_get(compiled(kind)({"learning_rate": 0.1, **settings, **epsilon}))
    expected, pulled = run_reference(kind, rate=0.1, epsilon=1e-2, **settings)
    assert (pulled > 1e-2) == (beta_weight > 0)
    for t in range(STEPS):
        jax.tree.map(
            lambda actual, wanted, t=t: np.testing.assert_allclose(
                actual[t], wanted, rtol=0, atol=1e-5, err_msg=f"step {t}"
            ),
            history,
            expected[t],
        )


def one_weight(tx, weights, grads, **extra_args):
    """Return updates and states for these weights and gradients; updates are not applied."""
    state, update, updates, states = tx.init(jnp.asarray(weights[0])), jax.jit(tx.update), [], []
    for w, g in zip(weights, grads, strict=True):
        answer, state = update(jnp.asarray(g), state, jnp.asarray(w), **extra_args)
        updates.append(np.asarray(answer))
        states.append(state)
    return updates, states


@pytest.mark.parametrize("kind", LEARNERS)
def test_the_first_step_is_that_of_sgd(kind):
    """At first the mean equals the weights, and the change is 0, not w - 0 as with a memory that starts at 0."""
    w, g = np.float32([5.0, -100.0]), np.float32([1.0, -2.0])
    (update,), (state,) = one_weight(LEARNERS[kind](0.5, strength=1e3), [w], [g])
    np.testing.assert_array_equal(update, -0.5 * g)
    means = [np.asarray(mean) for mean in state[0].importance_means]
    for mean, wanted in zip(
        means, {"ewc": [g**2], "mas": [abs(g)], "rwalk": [g**2, 0 * g]}.get(kind, [0 * g, 0 * g]), strict=True
    ):
        np.testing.assert_array_equal(mean, wanted)


def test_a_change_is_weighted_by_the_gradient_that_caused_it():
    """Weights 0, 1, 1 with gradients -2, 7, 7: the change by 1 reduced the loss by 2, whatever follows."""
    weights, grads = np.float32([[0], [1], [1]]), np.float32([[-2], [7], [7]])
    tx = cbp_jax.synaptic_intelligence(1.0, beta_importance=0.5)
    _, states = one_weight(tx, weights, grads)
    gain, change = states[1][0].importance_means
    np.testing.assert_allclose([gain[0], change[0]], [2 / 1.5, 1 / 1.5], rtol=1e-6)
    tx = cbp_jax.rwalk(1.0, beta_importance=0.5, epsilon=0.5)
    _, states = one_weight(tx, weights, grads)
    fisher, score = states[1][0].importance_means
    np.testing.assert_allclose(fisher[0], (49 + 0.5 * 4) / 1.5, rtol=1e-6)
    np.testing.assert_allclose(score[0], 2 / (0.5 * 4 * 1 + 0.5) / 1.5, rtol=1e-6)  # with the Fisher value 4, not 49


def test_scores_of_rwalk_are_remembered_and_never_negative():
    """The weight has a good change, then none, then a bad one. A public version forgets scores after each step."""
    weights, grads = np.float32([[0], [1], [1], [2], [2]]), np.float32([[-2], [0], [3], [0], [0]])
    _, states = one_weight(cbp_jax.rwalk(1.0, beta_importance=0.5, epsilon=0.5), weights, grads)
    scores = [float(state[0].importance_means[1][0]) for state in states]
    good = 2 / (0.5 * 4 + 0.5)
    counts = [1, 1.5, 1.75, 1.875, 1.9375]
    np.testing.assert_allclose(scores, [0, *(good * 0.5**n / counts[n + 1] for n in range(4))], rtol=1e-6)


def test_synaptic_intelligence_may_be_negative():
    """As in the paper, a weight that moved up its gradient has a negative importance."""
    weights, grads = np.float32([[0], [1]]), np.float32([[2], [0]])
    updates, _ = one_weight(cbp_jax.synaptic_intelligence(1.0, beta_weight=0.5, beta_importance=0.0), weights, grads)
    assert updates[1][0] > 0.5  # the update moves away from the mean 2/3


def test_signs_and_scale_of_the_pull():
    """The pull is the gradient of strength/2 sum Omega (w - mean)**2, with constant Omega and mean."""
    weights, grads = np.float32([[2.0, -1.0], [4.0, -3.0]]), np.float32([[1.0, 0.5], [0.0, 2.0]])
    updates, _ = one_weight(cbp_jax.ewc(0.1, strength=3.0, beta_weight=0.5, beta_importance=0.5), weights, grads)
    fisher = (0.5 * grads[0] ** 2 + grads[1] ** 2) / 1.5
    mean = (0.5 * weights[0] + weights[1]) / 1.5
    penalty = lambda w: 3.0 / 2 * jnp.sum(fisher * (w - mean) ** 2)
    np.testing.assert_allclose(updates[1], -0.1 * (grads[1] + jax.grad(penalty)(weights[1])), rtol=1e-6)


@functools.cache
def sgd_history():
    return jax.jit(lambda: run_package(optax.sgd(0.1)))()


@pytest.mark.parametrize("kind", LEARNERS)
def test_without_strength_it_is_sgd(kind):
    settings = {"learning_rate": 0.1, "strength": 0.0, "beta_weight": 0.9, "beta_importance": 0.9}
    history = compiled(kind)({**settings, **({"epsilon": 1e-2} if kind in PATH else {})})
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6), history, sgd_history())


def test_sensitivity_replaces_the_gradient_only_in_mas():
    w, g, s = np.float32([[1.0], [3.0]]), np.float32([[0.5], [0.5]]), jnp.asarray([-4.0])
    settings = {"strength": 1.0, "beta_weight": 0.5, "beta_importance": 0.9}
    updates, _ = one_weight(cbp_jax.mas(1.0, **settings), w, g, sensitivity=s)
    np.testing.assert_allclose(updates[1], -(0.5 + 4.0 * (3 - 7 / 3)), rtol=1e-6)
    for given in ({}, {"sensitivity": s}):
        updates, _ = one_weight(cbp_jax.ewc(1.0, **settings), w, g, **given)
        np.testing.assert_allclose(updates[1], -(0.5 + 0.25 * (3 - 7 / 3)), rtol=1e-6)


def test_means_of_bfloat16_params_are_float32():
    """In bfloat16, a thousandth of the difference would be lost, and the mean would never change."""
    tx = cbp_jax.synaptic_intelligence(0.1)
    params = jnp.ones(3, jnp.bfloat16)
    state = tx.init(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}
    step = jax.jit(tx.update)
    for _ in range(2):
        _, state = step(params, state, params)
    _, state = step(params, state, params + 0.5)
    np.testing.assert_allclose(state[0].params_mean, 1 + 0.5 / (1 + 0.999 + 0.999**2), rtol=1e-6)


def test_a_constant_weight_is_not_pulled():
    """Even in a long run, rounding does not move the mean away from constant weights."""
    tx = cbp_jax.mas(1.0, strength=1e6)
    w = jnp.float32([0.1, 3.3])

    def step(state, _):
        updates, state = tx.update(jnp.ones(2), state, w)
        return state, updates

    _, updates = jax.jit(lambda state: jax.lax.scan(step, state, None, 5000))(tx.init(w))
    np.testing.assert_array_equal(updates, -1)


def test_a_schedule_of_learning_rates():
    tx = cbp_jax.ewc(lambda count: 1.0 / (1 + count), strength=0.0)
    updates, _ = one_weight(tx, np.zeros((3, 1), np.float32), np.ones((3, 1), np.float32))
    np.testing.assert_allclose(np.ravel(updates), [-1, -1 / 2, -1 / 3], rtol=1e-6)


@pytest.mark.parametrize("kind", ["ewc", *PATH])
def test_replaced_units_start_over(kind):
    """Inside continual backpropagation, nothing pulls to the old weights, and a replacement is not a change."""
    apply_fn = lambda params, x: jax.nn.relu(x @ params["w1"]) @ params["w2"]
    params = {"w1": jnp.ones((4, 8)).at[:, 3].set(-1.0), "w2": jnp.ones((8, 2))}
    x = jnp.ones((5, 4))
    units = cbp_jax.discover_units(apply_fn, params, x)
    apply = cbp_jax.with_features(apply_fn, units)
    inner = LEARNERS[kind](0.0, strength=1.0, beta_weight=0.9, beta_importance=0.9)
    tx = cbp_jax.continual_backprop(inner, units, replacement_rate=0.05, maturity_threshold=2)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(params, state, params, features=apply(params, x)[1])
        return optax.apply_updates(params, updates), state

    while not state.replaced["w1"].any():
        params, state = step(params, state)
        assert state.count < 10
    np.testing.assert_array_equal(np.flatnonzero(state.replaced["w1"]), [3])
    first = state.inner_state[0]
    params, state = step(params, state)
    later = state.inner_state[0]
    np.testing.assert_array_equal(first.params_rate["w1"][:, 3], 0)
    np.testing.assert_array_equal(later.params_rate["w1"][:, 3], 1)
    assert (later.params_rate["w1"][:, :3] < 0.5).all()
    np.testing.assert_array_equal(later.params_mean["w1"][:, 3], params["w1"][:, 3])
    if kind in PATH:
        for mean in (later.importance_means[1]["w1"], later.importance_means[1]["w2"].T):
            np.testing.assert_array_equal(mean[:, 3], 0)  # memory of changes; memory of scores


@pytest.mark.parametrize("kind", LEARNERS)
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"strength": -1.0}, r"strength must be in \[0, inf\), got -1.0"),
        ({"beta_weight": 1.0}, r"beta_weight must be in \[0, 1\), got 1.0"),
        ({"beta_importance": -0.1}, r"beta_importance must be in \[0, 1\), got -0.1"),
        ({"learning_rate": float("nan")}, "learning_rate must be in"),
    ],
)
def test_bad_settings(kind, settings, words):
    with pytest.raises(ValueError, match=words):
        LEARNERS[kind](**{"learning_rate": 0.1, **settings})


@pytest.mark.parametrize("kind", PATH)
def test_epsilon_must_be_positive(kind):
    with pytest.raises(ValueError, match=r"epsilon must be in .* got 0"):
        LEARNERS[kind](0.1, epsilon=0.0)


def test_params_and_a_fitting_sensitivity_are_needed():
    tx = cbp_jax.mas(0.1)
    params = {"w": jnp.ones(3)}
    with pytest.raises(ValueError, match="consolidation needs the params"):
        tx.update(params, tx.init(params))
    for sensitivity in ({"v": jnp.ones(3)}, {"w": jnp.ones(4)}):
        with pytest.raises(ValueError, match=r"sensitivity must be a tree of the gradients' shapes.*\(3,\)"):
            tx.update(params, tx.init(params), params, sensitivity=sensitivity)


def test_a_users_importance():
    """With importance 1 for every weight, it is L2 toward the mean of the weights."""
    importance = consolidation.Importance(lambda step: (jnp.ones_like(step.gradient),), lambda one: one, means=1)
    tx = consolidation.add_consolidation(importance, 2.0, beta_weight=0.5)
    updates, _ = one_weight(tx, np.float32([[0.0], [3.0]]), np.float32([[0.0], [0.0]]))
    np.testing.assert_allclose(updates[1], 2 * (3 - 2), rtol=1e-6)
