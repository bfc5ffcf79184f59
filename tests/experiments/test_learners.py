import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cbp_jax import cli, load_results, nets
from cbp_jax.experiments.learners import LEARNERS, make_learner, parse_method, with_looks
from cbp_jax.replacement import replaced_units
from cbp_jax.report import looks, plot_tasks
from cbp_jax.training import init_state
from cbp_jax.training.learner import weights_of

# Cases that are similar to others and take seconds to compile; see conftest.py.
SLOW_CASES = {
    "test_the_step_of_upgds_public_code_is_doubled_and_its_decay_is_not": ("adaptive", "cbp"),
    "test_adams_eps_can_be_set": ("redo_adam", "adaptive_upgd"),
    "test_adams_state_is_reset_with_the_weights": (
        *("shrink_and_perturb_adam-head", "shrink_and_perturb_adam-network", "redo_adam-head", "redo_adam-network"),
        "cbp_adam-network",
    ),
    "test_a_learner_learns_and_each_of_its_numbers_matters": (
        "cbp_upgd",
        "redo_adam",
        "shrink_and_perturb_adam",
        "synaptic_intelligence",
        "mas",
        "l1_init",
    ),
}

CLASSES, PIXELS, HIDDEN, TASKS = 4, 6, (7,), 3

# Settings with which each number matters within a few steps, and the factor by which the test then multiplies it.
STRONG = {
    "step_size": 0.1,
    "l2": 0.01,
    "l1": 0.01,
    "noise": 0.01,
    "replacement_rate": 0.05,
    "maturity_threshold": 4,
    "decay_rate": 0.5,
    "weight_decay": 0.01,
    "sigma": 0.1,
    "beta_utility": 0.9,
    "beta_weight": 0.9,
    "beta_importance": 0.9,
    "strength": 0.05,
    "threshold": 0.1,
    "every": 60,
    "bound": 1.0,
    "rejection": 0.05,
    "power": 2.0,
    "scale": 1.0,
    "pull": 0.1,
    "least": 0.3,
    "alpha": 0.1,
    "decay": 0.99,
    "s_init": 1e-3,
}
BETAS = {"beta_utility": 0.5, "beta_weight": 0.5, "beta_importance": 0.5}
FACTOR = {
    **BETAS,
    "every": 2,
    "threshold": 20,
    "bound": 0.5,
    "power": 0.5,
    "decay": 0.9,
    "beta": 0.5,
    "replacement_rate": 2,
    "b1": 0.5,
    "b2": 0.5,
    "decay_rate": 1.98,
    "maturity_threshold": 2,
}


@pytest.fixture(scope="module")
def examples():
    """Make a few noisy examples, [steps, 1, ...]. Every task shows the same ones in another order."""
    rng = np.random.default_rng(0)
    y = np.tile(np.arange(CLASSES), 10)
    x = np.eye(CLASSES, PIXELS)[y] + rng.normal(0, 0.2, (y.size, PIXELS))
    orders = [rng.permutation(y.size) for _ in range(TASKS)]
    return tuple(jnp.stack([part[order][:, None] for order in orders]) for part in (np.float32(x), np.int32(y)))


def train(learner, params, examples, numbers):
    """Train as the loop does, in one program. Return losses [tasks, lanes], weights [lanes, ...], replaced [lanes]."""

    @jax.jit
    @jax.vmap
    def lane(numbers):
        tx = optax.with_extra_args_support(learner.optimizer(numbers, jax.random.key(1)))

        def step(carry, batch):
            (params, opt_state, replaced), (x, y) = carry, batch

            def loss_fn(params):
                logits, features = learner.train(params, x, jax.random.key(2))
                return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), features

            (loss, features), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
            extra = {"reference": examples[0].reshape(-1, PIXELS)[: learner.reference]} if learner.reference else {}
            updates, opt_state = tx.update(grads, opt_state, params, features=features, **extra)
            return (optax.apply_updates(params, updates), opt_state, replaced + replaced_units(opt_state)), loss

        steps = jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), examples)
        (after, _, replaced), losses = jax.lax.scan(step, (params, tx.init(params), 0), steps)
        return losses.reshape(TASKS, -1).mean(1), after, replaced

    losses, after, replaced = lane(numbers)
    return losses.T, after, replaced


@pytest.fixture(scope="module")
def start():
    """Return the weights from which every method of a seed starts."""
    return nets.MLP(HIDDEN, CLASSES).init(jax.random.key(0), jnp.zeros((1, PIXELS)))


# Similar to others, and each of them takes a second to compile.
SLOW = {
    "adaptive_upgd",
    "injection",
    "snr",
    "cbp_adam",
    "snr_adam",
    "regrama",
    "regrama_adam",
    "parseval",
    "orthogonal",
    "wasserstein",
    "spectral",
    "nap",
    "dash",
    "hare_tortoise",
    "reset_head",
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in LEARNERS])
def test_a_learner_learns_and_each_of_its_numbers_matters(examples, start, name):
    strong = {**STRONG, "step_size": 0.01} if "adam" in name else STRONG
    base = {key: strong.get(key, default) for key, default in LEARNERS[name]().hyperparameters.items()}
    factor = FACTOR
    if name.startswith("reset_"):  # without resets, and with one in the middle
        base["every"], factor = 200, {**FACTOR, "every": 0.4}
    lanes = [base] + [{**base, key: value * factor.get(key, 3)} for key, value in base.items()]
    given = [parse_method(f"{name}:" + ",".join(f"{key}={value}" for key, value in lane.items())) for lane in lanes]
    learner = make_learner(given, HIDDEN, "relu", (PIXELS,), CLASSES)
    params = learner.init(jax.random.key(0))
    if not set(given[0].options) & {"normalization", "activation"}:
        jax.tree.map(np.testing.assert_array_equal, weights_of(params), start)
    numbers = {key: np.array([lane[key] for lane in lanes], np.float32) for key in base}
    loss, after, replaced = train(learner, params, examples, numbers)
    assert loss.shape == (TASKS, len(lanes)) and np.isfinite(loss).all()
    assert loss[-1, 0] < 0.8 * loss[0, 0], loss  # for the base settings only: other numbers may be worse
    weights = np.mean(
        [np.abs(layer["kernel"]).mean((1, 2)) for layer in after["params"].values() if "kernel" in layer], 0
    )
    for number, key in enumerate(base, start=1):
        assert abs(weights[number] - weights[0]) > 1e-5 * weights[0], f"{key} makes no difference"
    assert (replaced > 3).all() if "cbp" in name else replaced.any() == name.startswith(("redo", "regrama", "snr"))


def direction(name, at):
    """Return initial weights, other weights, and the latter after an update of the learner with gradients of 0."""
    method = parse_method(f"{name}:{at}")
    learner = make_learner([method], HIDDEN, "relu", (PIXELS,), CLASSES)

    @jax.jit
    def step(numbers):
        state = init_state(learner, 0, numbers)
        tx = learner.optimizer(numbers, jax.random.key(0))
        before = jax.tree.map(lambda w: w + 0.5, state.params)
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, before), state.opt_state, before)
        return state.params, before, optax.apply_updates(before, updates)

    return step(dict(method.hyperparameters))


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (("l2", "step_size=0.5,l2=0.1"), lambda first, w: w - 0.5 * 0.1 * w),
        (("l1", "step_size=0.5,l1=0.1"), lambda first, w: w - 0.5 * 0.1 * jnp.sign(w)),
        (("l2_init", "step_size=0.5,l2=0.1"), lambda first, w: w - 0.5 * 0.1 * (w - first)),
        (("l1_init", "step_size=0.5,l1=0.1"), lambda first, w: w - 0.5 * 0.1 * jnp.sign(w - first)),
        (("proximal_l1_init", "step_size=0.5,l1=0.1"), lambda first, w: w - 0.5 * 0.1 * jnp.sign(w - first)),
        (("proximal_l1_init", "step_size=0.5,l1=1.1"), lambda first, w: first),
        (("shrink_and_perturb", "step_size=0.5,l2=0.1,noise=0"), lambda first, w: w - 0.5 * 0.1 * w),
        (("adam", "step_size=0.5,weight_decay=0.1"), lambda first, w: w - 0.5 * 0.1 * w),
        (("adam", "step_size=0.5,l2=0.1"), lambda first, w: w - 0.5 * jnp.sign(w)),  # through the moments
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_penalties_on_weights_are_scaled_by_the_step_size(method, expected):
    first, before, after = direction(*method)
    jax.tree.map(
        lambda w0, w, new: np.testing.assert_allclose(new, expected(w0, w), rtol=1e-5, atol=1e-6), first, before, after
    )


@pytest.mark.parametrize(("name", "of_output"), [("parseval", False), ("orthogonal", True)])
def test_parseval_regularization_leaves_the_output_layer_alone(name, of_output):
    _, before, after = direction(name, "step_size=0.5,strength=0.1")
    moved = jax.tree.map(lambda w, new: float(np.abs(w - new).max()), before, after)["params"]
    changed = {layer: leaves["kernel"] > 1e-4 for layer, leaves in moved.items()}
    assert changed == {"Dense_0": True, "Dense_1": of_output}


def test_the_decay_of_shrink_and_perturb_with_adam_goes_through_its_moments():
    _, before, after = direction("shrink_and_perturb_adam", "step_size=0.5,l2=0.1,noise=0")
    _, same, decayed = direction("adam", "step_size=0.5,l2=0.1")
    jax.tree.map(np.testing.assert_array_equal, before, same)
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-5), after, decayed)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), after, before)
    assert max(jax.tree.leaves(moved)) > 0.01  # decoupled decay would change a weight by at most 0.05 of its value


@pytest.mark.parametrize("reset", ["", ",reset=head"])
def test_decoupled_weight_decay_of_adam_is_scaled_by_the_step_size(reset):
    _, before, after = direction("adam", f"step_size=0.5,weight_decay=0.1{reset}")
    expected = jax.tree.map(lambda w: w - 0.5 * 0.1 * w, before)
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-5), after, expected)


def test_the_noise_of_shrink_and_perturb_has_the_given_size():
    _, before, after = direction("shrink_and_perturb", "step_size=0.5,l2=0,noise=0.2")
    noise = np.concatenate([np.ravel(b - a) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True)])
    assert abs(noise.std() / 0.2 - 1) < 0.3 and abs(noise.mean()) < 0.08


@pytest.mark.parametrize(
    ("name", "at", "decay"),
    [("bp", "", 0.0), ("l2", ",l2=0.1", 0.1), ("shrink_and_perturb", ",l2=0.1,noise=0", 0.1), ("cbp", "", 0.0)],
)
def test_momentum_sums_gradients_and_decay_goes_through_it(name, at, decay):
    method = parse_method(f"{name}:step_size=0.5,momentum=0.9{at}")
    learner = make_learner([method], (3,), "relu", (PIXELS,), CLASSES)

    @jax.jit
    def two_steps(numbers):
        params = learner.init(jax.random.key(0))
        tx = optax.with_extra_args_support(learner.optimizer(numbers, jax.random.key(0)))
        features = {group.name: jnp.ones((1, group.size)) for group in learner.units}
        at, state = params, tx.init(params)
        for _ in range(2):
            updates, state = tx.update(jax.tree.map(jnp.ones_like, at), state, at, features=features)
            at = optax.apply_updates(at, updates)
        return params, at

    def expected(w):
        first = 1 + decay * w
        second = 1 + decay * (w - 0.5 * first) + 0.9 * first
        return w - 0.5 * first - 0.5 * second

    before, after = two_steps(dict(method.hyperparameters))
    jax.tree.map(lambda w, new: np.testing.assert_allclose(new, expected(w), rtol=1e-5, atol=1e-6), before, after)


def test_only_methods_that_set_momentum_have_it():
    given = parse_method("cbp:momentum=0.9")
    assert given.label == "cbp(momentum=0.9)" and given.options["momentum"] == 0.9
    assert "momentum" not in parse_method("cbp").options
    learner = make_learner([parse_method("bp")], (3,), "relu", (PIXELS,), CLASSES)
    state = jax.eval_shape(lambda: init_state(learner, 0, {"step_size": 0.1}))
    assert not jax.tree.leaves(state.opt_state)  # no momentum trace, which would take memory and time


def test_resetting_the_head_resets_the_output_layer():
    plain, reset = (
        make_learner([parse_method("bp")], (3, 4), "relu", (PIXELS,), CLASSES, reset_head=given)
        for given in (False, True)
    )
    assert plain.begin_task is None
    params = jax.jit(reset.init)(jax.random.key(0))
    after, _ = reset.begin_task(optax.sgd(0.1), jax.random.key(1), 0, params, optax.sgd(0.1).init(params))
    assert not after["params"]["Dense_2"]["kernel"].any() and params["params"]["Dense_2"]["kernel"].any()
    jax.tree.map(np.testing.assert_array_equal, after["params"]["Dense_1"], params["params"]["Dense_1"])


def updated(text, gradient):
    """Return a weight of 2 after an update of a method, with one number as the gradient."""
    method = parse_method(text)
    numbers = {name: jnp.float32(value) for name, value in method.hyperparameters.items()}
    learner = make_learner([method], HIDDEN, "relu", (PIXELS,), CLASSES)

    @jax.jit
    def step(numbers):
        tx = learner.optimizer(numbers, jax.random.key(0))
        params = jax.tree.map(lambda leaf: jnp.full_like(leaf, 2), learner.init(jax.random.key(0)))
        grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, gradient), params)
        features = {group.name: jnp.ones((1, group.size)) for group in learner.units}
        tx = optax.with_extra_args_support(tx)
        return optax.apply_updates(params, tx.update(grads, tx.init(params), params, features=features)[0])

    return np.asarray(step(numbers)["params"]["Dense_0"]["kernel"])


@pytest.mark.parametrize("name", ["adam", "cbp_adam", "redo_adam", "adaptive_upgd"])
def test_adams_eps_can_be_set(name):
    text = f"{name}:step_size=0.1" + (",sigma=0" if name == "adaptive_upgd" else "")
    # With a gradient of eps the first step is half of that with a large one; UPGD's gate is the same for both.
    change = 2 - updated(f"{text},eps=0.01", 0.01)
    np.testing.assert_allclose(change, (2 - updated(text, 0.01)) / 2, rtol=1e-3)
    assert (change > 0.01).all()


@pytest.mark.parametrize(
    ("name", "direction"), [("upgd", 0.5), ("adaptive_upgd", 1.0), ("cbp_upgd", 0.5)], ids=["upgd", "adaptive", "cbp"]
)
def test_the_step_of_upgds_public_code_is_doubled_and_its_decay_is_not(name, direction):
    text = f"{name}:step_size=0.1,sigma=0,weight_decay=0.3"
    # All utilities are equal: -1 divided by the absolute value of the largest, 1.
    gate = 1 / (1 + np.exp(-1.0))
    for factor in (1, 2):
        expected = (1 - 0.1 * 0.3) * 2 - factor * 0.1 * direction * gate
        np.testing.assert_allclose(updated(f"{text},factor={factor}", 0.5), expected, rtol=1e-5)
    np.testing.assert_array_equal(updated(text, 0.5), updated(f"{text},factor=1", 0.5))


@pytest.mark.parametrize("reset", ["head", "network"])
@pytest.mark.parametrize("name", ["adam", "adam_reset", "shrink_and_perturb_adam", "cbp_adam", "redo_adam"])
def test_adams_state_is_reset_with_the_weights(name, reset):
    text = f"{name}:step_size=0.01,reset={reset}" + (",noise=0,l2=0" if name.startswith("shrink") else "")
    learner = make_learner([parse_method(text)], (3,), "tanh", (PIXELS,), CLASSES)
    numbers = {name: jnp.float32(value) for name, value in parse_method(text).hyperparameters.items()}
    params = jax.jit(learner.init)(jax.random.key(0))
    grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.1), params)
    features = {"params/Dense_0": jnp.ones((1, 3))}

    @jax.jit
    def go():
        tx = optax.with_extra_args_support(learner.optimizer(numbers, jax.random.key(2)))
        step = lambda state, _: (tx.update(grads, state, params, features=features)[1], None)
        worn = jax.lax.scan(step, tx.init(params), length=100)[0]
        after, state = learner.begin_task(tx, jax.random.key(1), 1, params, worn)
        return after, tx.update(jax.tree.map(lambda leaf: -10 * leaf, grads), state, after, features=features)[0]

    after, first = jax.tree.map(np.asarray, go())
    for layer in ("Dense_0", "Dense_1"):
        anew = reset == "network" or layer == "Dense_1"
        assert (after["params"][layer]["kernel"] != params["params"][layer]["kernel"]).all() == anew
        # Adam's first step has the size of the step size, unless earlier moments or counts are kept.
        if anew:
            np.testing.assert_allclose(first["params"][layer]["kernel"], 0.01, rtol=1e-4)
        else:
            assert (abs(first["params"][layer]["kernel"] - 0.01) > 1e-3).all()


def test_a_restart_of_adaptive_upgd_resets_its_whole_state():
    method = parse_method("adaptive_upgd:step_size=0.01,sigma=0,reset=network")
    learner = make_learner([method], (3,), "tanh", (PIXELS,), CLASSES)
    numbers = {name: jnp.float32(value) for name, value in method.hyperparameters.items()}

    @jax.jit
    def go():
        tx = learner.optimizer(numbers, jax.random.key(2))
        params, fresh = learner.init(jax.random.key(0)), learner.init(jax.random.key(1))
        state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)[1]
        kept, again = (learner.begin_task(tx, jax.random.key(1), task, params, state) for task in (0, 1))
        return (kept, (params, state)), (again, (fresh, tx.init(fresh)))

    before, after = go()
    for got, want in (before, after):
        jax.tree.map(np.testing.assert_array_equal, got, want)
    differ = jax.tree.map(lambda a, b: (np.asarray(a) != np.asarray(b)).any(), before[0][0], after[0][0])
    assert differ["params"]["Dense_0"]["kernel"]


def test_convolutions_of_learners_are_matrix_products_on_a_cpu():
    assert jax.default_backend() == "cpu"
    learner = make_learner([parse_method("bp")], (4,), "relu", (16, 16, 1), CLASSES, network="lenet")
    params = jax.eval_shape(learner.init, jax.random.key(0))
    assert any(leaf.ndim == 4 for leaf in jax.tree.leaves(params))
    for run in (learner.predict, lambda params, x: learner.train(params, x, jax.random.key(1))):
        assert "conv_general_dilated" not in str(jax.make_jaxpr(run)(params, jnp.zeros((2, 16, 16, 1))))


def test_dropout_applies_only_in_training_and_differs_by_key():
    method = parse_method("dropout:dropout_rate=0.5")
    learner = make_learner([method], (40,), "relu", (PIXELS,), CLASSES)
    params, x = jax.jit(learner.init)(jax.random.key(0)), jnp.ones((1, PIXELS))
    plain, features = learner.predict(params, x)
    layers = params["params"]
    h = jax.nn.relu(x @ layers["Dense_0"]["kernel"] + layers["Dense_0"]["bias"])
    np.testing.assert_allclose(plain, h @ layers["Dense_1"]["kernel"], rtol=1e-5)
    dropped = [learner.train(params, x, jax.random.key(number))[1]["params/Dense_0"] for number in (0, 0, 1)]
    active = np.asarray(features["params/Dense_0"]) > 0
    kept = [float((h[active] > 0).mean()) for h in dropped]
    assert all(0.2 < fraction < 0.8 for fraction in kept)
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert not np.array_equal(dropped[0], dropped[2])


def test_the_network_is_that_of_the_paper():
    learner = make_learner([parse_method("bp")], (200, 100), "relu", (50,), 10)
    layers = jax.jit(learner.init)(jax.random.key(0))["params"]
    assert [layers[f"Dense_{i}"]["kernel"].shape for i in range(3)] == [(50, 200), (200, 100), (100, 10)]
    for layer in layers.values():
        bound = (6 / layer["kernel"].shape[0]) ** 0.5  # Kaiming uniform for ReLU
        assert 0.95 * bound < np.abs(layer["kernel"]).max() <= bound
        assert abs(np.std(layer["kernel"]) / (bound / 3**0.5) - 1) < 0.05
        assert not layer["bias"].any()
    assert [group.size for group in learner.units] == [200, 100]


@pytest.mark.parametrize(
    ("text", "label", "numbers", "options"),
    [
        ("bp", "bp", {"step_size": 0.01}, {}),
        ("bp:step_size=3e-3", "bp(step_size=0.003)", {"step_size": 0.003}, {}),
        ("bp:step_size=1", "bp(step_size=1)", {"step_size": 1.0}, {}),
        (
            "cbp:utility=weight,compensate_bias=true,max_replacements=3,replacement_rate=1e-5",
            "cbp(utility=weight, compensate_bias=True, max_replacements=3, replacement_rate=1e-05)",
            {"step_size": 0.01, "replacement_rate": 1e-5, "decay_rate": 0.99, "maturity_threshold": 100.0},
            {"utility": "weight", "compensate_bias": True, "max_replacements": 3},
        ),
        (
            "cbp:utility=taylor,reinitialization=rewind",
            "cbp(utility=taylor, reinitialization=rewind)",
            {"step_size": 0.01, "replacement_rate": 1e-4, "decay_rate": 0.99, "maturity_threshold": 100.0},
            {"utility": "taylor", "reinitialization": "rewind", "compensate_bias": False, "max_replacements": None},
        ),
        ("dropout:dropout_rate=0.2", "dropout(dropout_rate=0.2)", {"step_size": 0.01}, {"dropout_rate": 0.2}),
        ("bp:hidden=30x20", "bp(hidden=30x20)", {"step_size": 0.01}, {"hidden": (30, 20)}),
        ("bp:hidden=none", "bp(hidden=none)", {"step_size": 0.01}, {"hidden": ()}),
        (
            "bp:activation=tanh,normalization=layer,dropout_rate=0.5",
            "bp(activation=tanh, normalization=layer, dropout_rate=0.5)",
            {"step_size": 0.01},
            {"activation": "tanh", "normalization": "layer", "dropout_rate": 0.5},
        ),
        (
            "upgd:order=2,scope=local,protect=false,sigma=0.1",
            "upgd(order=2, scope=local, protect=False, sigma=0.1)",
            {"step_size": 0.01, "weight_decay": 0.0, "beta_utility": 0.999, "sigma": 0.1},
            {"order": 2, "scope": "local", "protect": False, "featurewise": False},
        ),
    ],
)
def test_parse_method(text, label, numbers, options):
    method = parse_method(text)
    assert (method.label, method.learner) == (label, text.partition(":")[0])
    assert method.hyperparameters == numbers and method.options == options


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"method '': the learner must be one of \['bp', 'adam'.*, got ''"),
        ("sgd", r"the learner must be one of \['bp', 'adam'.*, got 'sgd'"),
        ("bp:rate=1", r"method 'bp:rate=1': expected setting=value with one of \['step_size'\], got 'rate=1'"),
        ("bp:step_size", r"expected setting=value with one of \['step_size'\], got 'step_size'"),
        ("bp:step_size=", r"step_size must be a number, got ''"),
        ("bp:step_size=fast", r"step_size must be a number, got 'fast'"),
        ("bp:momentum=1", r"momentum must be in \[0, 1\), got 1"),
        ("adam:momentum=0.9", r"with one of \['step_size', 'b1', 'b2'\], got 'momentum=0\.9'; activation"),
        ("bp:step_size=-1", r"method 'bp:step_size=-1': step_size must be in \[0, inf\), got -1"),
        ("bp:step_size=inf", r"method 'bp:step_size=inf': step_size must be a finite number of float32, got inf"),
        ("bp:step_size=1e39", "step_size must be a finite number of float32, got 1e\\+39"),
        ("cbp:maturity_threshold=inf", "maturity_threshold must be a finite number of float32, got inf"),
        ("adam:l2=inf", "l2 must be a finite number of float32, got inf"),
        ("bp:step_size=nan", r"step_size must be in \[0, inf\), got nan"),
        ("adam:b1=1", r"b1 must be in \[0, 1\), got 1"),
        ("adam:b2=-0.1", r"b2 must be in \[0, 1\), got -0.1"),
        ("dropout:dropout_rate=1", r"dropout_rate must be in \[0, 1\), got 1"),
        ("cbp:replacement_rate=1.5", r"replacement_rate must be in \[0, 1\], got 1.5"),
        ("cbp:decay_rate=1", r"decay_rate must be in \[0, 1\), got 1"),
        ("cbp:maturity_threshold=-1", r"maturity_threshold must be in \[0, inf\), got -1"),
        (
            "cbp:utility=best",
            "utility must be a callable, its path .* got 'best'",
        ),
        ("cbp:reinitialization=best", r"reinitialization must be a callable or one of \['orthogonal'.*, got 'best'"),
        ("cbp:compensate_bias=2", r"compensate_bias must be true or false, got '2'"),
        ("cbp:max_replacements=many", r"max_replacements must be a number, got 'many'"),
        ("cbp:max_replacements=0", "max_replacements must be at least 1, got 0"),
        ("cbp:max_replacements=-1", "max_replacements must be at least 1, got -1"),
        ("bp:step_size=1,step_size=2", "step_size is given twice"),
        ("bp:activation=step", "activation must be .*, got 'step'"),
        ("bp:normalization=batch", r"normalization must be one of \('', .*\), got 'batch'"),
        ("bp:hidden=30x0", r"hidden must be a tuple of sizes of at least 1, got \(30, 0\)"),
        ("bp:hidden=wide", "hidden must be sizes as in 100x100, or none, got 'wide'"),
        ("bp:dropout_rate=1", r"dropout_rate must be in \[0, 1\), got 1"),
        ("upgd:order=3", r"order must be one of \(1, 2\), got 3"),
        ("upgd:scope=layer", r"scope must be one of \('global', 'local'\), got 'layer'"),
        ("upgd:beta_utility=1", r"beta_utility must be in \[0, 1\), got 1"),
        ("upgd:protect=maybe", "protect must be true or false, got 'maybe'"),
        ("shrink_and_perturb:step_size=2,l2=1", "step_size times l2.*must be at most 1"),
    ],
)
def test_parse_method_refuses(text, message):
    with pytest.raises(ValueError, match=message):
        parse_method(text)


@pytest.mark.parametrize(("rates", "most"), [((0.01,), 1), ((0.05, 0.2, 0.01), 3), ((1.0, 0.0), 11), ((0.1,), 2)])
def test_the_largest_rate_of_a_grid_bounds_the_replacements_of_a_step(monkeypatch, rates, most):
    seen = {}
    monkeypatch.setattr("cbp_jax.continual_backprop", lambda *args, **kwargs: seen.update(kwargs))
    methods = [parse_method(f"cbp:replacement_rate={rate}") for rate in rates]
    learner = make_learner(methods, (4, 10, 6), "relu", (PIXELS,), CLASSES)  # the widest layer has 10 units
    learner.optimizer(methods[0].hyperparameters, jax.random.key(0))
    assert seen["max_replacements"] == most  # floor(rate * 10) at a time, and one more for accumulated fractions
    given = parse_method("cbp:max_replacements=4")
    make_learner([given], (10,), "relu", (PIXELS,), CLASSES).optimizer(given.hyperparameters, jax.random.key(0))
    assert seen["max_replacements"] == 4


@pytest.mark.parametrize(
    ("text", "given", "own"),
    [
        ("bp", {}, {"activation": "relu"}),
        ("bp:activation=tanh", {"kernel_init": nets.fan_in_uniform()}, {"activation": "tanh"}),
        ("bp:normalization=layer", {}, {"normalization": "layer"}),
        ("bp:dropout_rate=0.25", {"bias_init": "fan_in"}, {"dropout_rate": 0.25}),
        ("crelu", {}, {"activation": "crelu"}),
    ],
)
def test_a_method_chooses_attributes_of_its_network(text, given, own):
    made = []

    def network(**attributes):
        made.append(attributes)
        return nets.MLP(**attributes)

    learner = make_learner([parse_method(text)], HIDDEN, "relu", (PIXELS,), CLASSES, network=network, **given)
    expected = {"hidden": HIDDEN, "num_outputs": CLASSES, "activation": "relu"}
    assert made == [{**expected, **given, **own}] and not learner.curvature


def test_replaced_units_are_initialized_like_the_network(monkeypatch):
    seen = []
    for name in ("continual_backprop", "redo"):
        monkeypatch.setattr(f"cbp_jax.{name}", lambda *args, **kwargs: seen.append(kwargs["initializer"]))
    init = nets.fan_in_uniform()
    for text in ("cbp", "redo"):
        method = parse_method(text)
        learner = make_learner([method], HIDDEN, "relu", (PIXELS,), CLASSES, kernel_init=init)
        learner.optimizer(method.hyperparameters, jax.random.key(0))
    of_activation = {"tanh": nets.kaiming_uniform("tanh")}
    method = parse_method("cbp:activation=tanh")
    learner = make_learner([method], HIDDEN, "relu", (PIXELS,), CLASSES, init_of_activation=of_activation.__getitem__)
    learner.optimizer(method.hyperparameters, jax.random.key(0))
    assert seen == [init, init, of_activation["tanh"]]


def test_results_saved_without_looks_are_drawn_as_before():
    path = pathlib.Path(__file__).parents[2] / "benchmarks" / "results" / "online_permuted_mnist_laptop.nc"
    results = load_results(path)
    results.attrs.pop(looks.ATTRIBUTE, None)
    figure = plot_tasks(with_looks(results))
    drawn = {line.get_gid().partition("(")[0]: line for line in figure.axes[0].lines}
    assert drawn.pop("online_norm").get_color() in {
        style.color for style in looks.UNOWNED
    }  # it has no style of its own
    assert {name: line.get_color().upper() for name, line in drawn.items()} == {
        name: LEARNERS[name].look.style.color
        for name in ("bp", "adam", "l2", "l2_init", "shrink_and_perturb", "dropout", "cbp")
    }
    assert [name for name, line in drawn.items() if line.get_linewidth() > 1] == ["cbp"]
    titles = [text.get_text().partition(" (")[0] for text in figure.legends[0].get_texts()]
    assert titles == [
        *("Backprop", "Adam", "L2", "L2 init", "Shrink and perturb", "Dropout", "Online norm", "Continual backprop")
    ]


def test_the_command_draws_old_results_with_names_and_colors(monkeypatch, tmp_path, capsys):
    path = pathlib.Path(__file__).parents[2] / "benchmarks" / "results" / "label_permuted_mnist_laptop.nc"
    seen = []
    monkeypatch.setattr("cbp_jax.report.plot_run", lambda drawn, *args, **kwargs: seen.append(drawn) or [])
    assert cli.main(["plot", str(path), "--out", str(tmp_path)]) == 0
    assert looks.looks_of(seen[0])["upgd"] == LEARNERS["upgd"].look


def test_names_titles_and_styles_of_learners_are_unique():
    found = [learner.look for learner in LEARNERS.values()]
    styles = [look.style for look in found if look.style is not None]
    assert len({look.title for look in found}) == len(found) and len(set(styles)) == len(styles)
    assert [name for name, learner in LEARNERS.items() if learner.name != name or not learner.about] == []


def test_second_order_utilities_get_curvature():
    asks = {text: parse_method(text).curvature for text in ("cbp:utility=taylor_second_order", "cbp:utility=taylor")}
    assert list(asks.values()) == [True, False]
