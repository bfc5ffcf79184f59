"""Behaviors that every transformation of the library shares. A new algorithm is a new row of the table.

All runs use the same sequence of random gradients and activations, so that no network is needed, and start from
parameters with one leaf, `tag`, that no unit owns.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from cbp_jax.replacement import Choice, Policy, replace_units
from cbp_jax.tickets import masked, masked_changes
from cbp_jax.transforms import (
    adam,
    adam_reset,
    adaptive_upgd,
    add_churn_reduction,
    add_kernel_penalty,
    add_l1,
    add_l1_init,
    add_l2_init,
    clip_weights,
    continual_backprop,
    dash,
    eligibility_traces,
    ewc,
    fire,
    hare_and_tortoise,
    mas,
    normalize_and_project,
    obgd,
    orthogonal_penalty,
    parseval_penalty,
    periodic_reset,
    perturbed_gradient_descent,
    proximal_l1_init,
    redo,
    regrama,
    rwalk,
    self_normalized_resets,
    shrink_and_perturb,
    spectral_penalty,
    synaptic_intelligence,
    trac,
    upgd,
    wasserstein_penalty,
)
from cbp_jax.units import discover_units

OPTIMIZED = True  # in programs as users compile them, rows of a batch must agree bit for bit

STEPS = 6


def apply_fn(params, x):
    return jax.nn.relu(x @ params["w1"] + params["b1"]) @ params["w2"]


def make_params(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = {"b1": (8,), "tag": (8,), "w1": (4, 8), "w2": (8, 2)}
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def make_stream(dtype=jnp.float32):
    """Make gradients and activations, each [STEPS, ...]."""
    rng = np.random.default_rng(100)
    grads = {name: jnp.asarray(rng.normal(size=(STEPS, *w.shape)), dtype) for name, w in make_params(0).items()}
    return grads, {"w1": jnp.asarray(np.maximum(rng.normal(size=(STEPS, 4, 8)), 0), dtype)}


PARAMS, STREAM = make_params(0), make_stream()
UNITS = discover_units(apply_fn, PARAMS, jnp.ones((1, 4)))
REPLACE = {"replacement_rate": 0.2, "decay_rate": 0.9, "maturity_threshold": 1}  # one or two of 8 units per step


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """One transformation: `wrap(factory(*args, **hyper, **static))`."""

    name: str
    factory: Callable[..., optax.GradientTransformation]
    args: tuple[Any, ...]  # arguments that are not numbers
    hyper: dict[str, float]  # settings that may be traced
    other: dict[str, float]  # other values of these settings
    static: dict[str, Any] = dataclasses.field(default_factory=dict)
    wrap: Callable[[optax.GradientTransformation], optax.GradientTransformation] = lambda tx: tx
    noisy: bool = False  # takes a key
    slow: bool = False  # to compile, and similar to other rows

    def make(self, key=0, factory=None, **hyper):
        keys = {"key": key} if self.noisy else {}
        tx = (factory or self.factory)(*self.args, **{**self.hyper, **hyper}, **self.static, **keys)
        return optax.with_extra_args_support(self.wrap(tx))


CONSOLIDATE = {"learning_rate": 0.1, "strength": 1.0, "beta_weight": 0.9, "beta_importance": 0.8}
CONSOLIDATE_OTHERWISE = {"learning_rate": 0.2, "strength": 2.0, "beta_weight": 0.5, "beta_importance": 0.9}


def before_sgd(tx):
    return optax.chain(tx, optax.sgd(0.1))


def behind_sgd(tx):
    return optax.chain(optax.sgd(0.1), tx)


def with_curvature(tx):
    """Pass squared gradients as the diagonal of the Hessian."""

    def update_fn(grads, state, params, **extra_args):
        return tx.update(grads, state, params, hessian_diag=jax.tree.map(jnp.square, grads), **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def add_spectral_penalty(*, strength, power):
    """Make the penalty's own number a hyperparameter, too."""
    return add_kernel_penalty(strength, spectral_penalty(power))


def add_parseval_penalty(*, strength, scale):
    return add_kernel_penalty(strength, parseval_penalty(scale))


def add_penalty(*, strength, make):
    return add_kernel_penalty(strength, make())


def firing_seldom(tx):
    """Return features in which most units are silent on most batches."""

    def update_fn(grads, state, params, *, features, **extra_args):
        features = jax.tree.map(lambda h: h - 1.6, features)
        return tx.update(grads, state, params, features=features, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def by_sums(params, x):
    """Apply a network without matrix products, because vmapped ones may differ in the last bit."""
    times = lambda x, w: jnp.sum(x[:, :, None] * w, 1)
    return times(jax.nn.relu(times(x, params["w1"]) + params["b1"]), params["w2"])


def with_reference(tx):
    """Chain it with SGD, and pass a reference batch with each update."""
    tx = optax.with_extra_args_support(optax.chain(tx, optax.sgd(0.1)))
    reference = np.random.default_rng(3).normal(size=(5, 4))

    def update_fn(grads, state, params, **extra_args):
        return tx.update(grads, state, params, reference=jnp.asarray(reference, params["w1"].dtype), **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def with_td_error(tx):
    """Pass a TD error with each update, and the end of an episode where it is negative."""
    tx = optax.with_extra_args_support(tx)

    def update_fn(grads, state, params, **extra_args):
        error = grads["b1"][0].astype(jnp.float32)
        return tx.update(grads, state, params, td_error=error, reset_traces=error < 0, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)


GATE = {"learning_rate": 0.1, "weight_decay": 0.1, "beta_utility": 0.5, "sigma": 0.5}
GATE_OTHERWISE = {"learning_rate": 0.2, "weight_decay": 0.3, "beta_utility": 0.9, "sigma": 0.9}


TICKET = jax.tree.map(lambda leaf: leaf > 0, PARAMS)


def recycle_least_gradient(units, *, decay, every, key):
    """Make a user's policy: every so many updates, replace the unit with the smallest mean gradient."""

    def init(group, params):
        return {"mean": jnp.zeros(group.size)}

    def choose(view, memory):
        size = sum(part.sum(jnp.abs(view.grads[part.path])).sum(0) for part in view.group.incoming)
        mean = decay * memory["mean"] + (1 - decay) * size
        return Choice(jnp.argmin(mean)[None], {"mean": mean})

    policy = Policy(choose, init, due=lambda count: count % jnp.asarray(every, jnp.int32) == 0)
    return replace_units(optax.sgd(0.1), units, policy, key=key)


MASK = {name: jnp.asarray(np.random.default_rng(7).random(w.shape) < 0.7) | (w.ndim < 2) for name, w in PARAMS.items()}


def masked_sgd(mask, *, learning_rate, momentum, weight_decay):
    """Wrap SGD in a mask. Training under a mask has no hyperparameters of its own."""
    return masked(optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate, momentum)), mask)


def masked_continual_backprop(units, mask, *, learning_rate, replacement_rate, key):
    inner = continual_backprop(
        adam(learning_rate),
        units,
        replacement_rate=replacement_rate,
        maturity_threshold=1,
        max_replacements=2,
        key=key,
    )
    return masked(inner, mask)


ROWS = [
    Row("adam", adam, (), {"learning_rate": 0.1, "b1": 0.9, "b2": 0.99}, {"learning_rate": 0.2, "b1": 0.5, "b2": 0.9}),
    Row("add_l1", add_l1, (), {"strength": 0.1}, {"strength": 0.3}, wrap=before_sgd),
    Row("add_l1_init", add_l1_init, (), {"strength": 0.1}, {"strength": 0.3}, wrap=before_sgd),
    Row("add_l2_init", add_l2_init, (), {"strength": 0.1}, {"strength": 0.3}, wrap=before_sgd),
    Row(
        "spectral penalty",
        add_spectral_penalty,
        (),
        {"strength": 0.1, "power": 2.0},
        {"strength": 0.3, "power": 1.0},
        wrap=before_sgd,
        slow=True,
    ),
    Row(
        "parseval penalty",
        add_parseval_penalty,
        (),
        {"strength": 0.01, "scale": 2.0},
        {"strength": 0.03, "scale": 1.0},
        wrap=before_sgd,
        slow=True,
    ),
    Row(
        "orthogonal penalty",
        add_penalty,
        (),
        {"strength": 0.01},
        {"strength": 0.03},
        {"make": orthogonal_penalty},
        wrap=before_sgd,
        slow=True,
    ),
    Row(
        "wasserstein penalty",
        add_penalty,
        (),
        {"strength": 0.1},
        {"strength": 0.3},
        {"make": wasserstein_penalty},
        wrap=before_sgd,
        slow=True,
    ),
    Row(
        "proximal_l1_init",
        proximal_l1_init,
        (),
        {"strength": 0.3, "learning_rate": 0.1},
        {"strength": 0.6, "learning_rate": 0.3},
        wrap=behind_sgd,
    ),
    Row(
        "shrink_and_perturb",
        shrink_and_perturb,
        (optax.sgd(0.1),),
        {"shrink": 0.01, "perturb": 0.1},
        {"shrink": 0.1, "perturb": 0.3},
        noisy=True,
    ),
    Row(
        "shrink_and_perturb of continual_backprop",
        shrink_and_perturb,
        (continual_backprop(optax.sgd(0.1), UNITS, **REPLACE),),
        {"shrink": 0.01, "perturb": 0.1},
        {"shrink": 0.1, "perturb": 0.3},
        noisy=True,
        slow=True,
    ),
    Row(
        "continual_backprop of sgd",
        continual_backprop,
        (optax.sgd(0.1), UNITS),
        REPLACE,
        {"replacement_rate": 0.3, "decay_rate": 0.5, "maturity_threshold": 2},
        {"max_replacements": 2},
        noisy=True,
    ),
    Row(
        "continual_backprop of adam with l2_init",
        continual_backprop,
        (optax.chain(add_l2_init(0.1), adam(0.1)), UNITS),
        REPLACE,
        {"replacement_rate": 0.3, "decay_rate": 0.5, "maturity_threshold": 2},
        {"max_replacements": 2},
        noisy=True,
        slow=True,
    ),
    *(
        Row(
            f"continual_backprop by {utility}, {reinitialization}",
            continual_backprop,
            (optax.sgd(0.1), UNITS),
            REPLACE,
            {"replacement_rate": 0.3, "decay_rate": 0.5, "maturity_threshold": 2},
            {"max_replacements": 2, "utility": utility, "reinitialization": reinitialization},
            wrap=with_curvature if "second" in utility else lambda tx: tx,
            noisy=reinitialization != "rewind",
            slow=True,
        )
        for utility, reinitialization in (
            ("taylor", "split"),
            ("gradient", "orthogonal"),
            ("snip", "rewind"),
            ("upgd", "regrow"),
            ("fisher", "resample_both"),
            ("taylor_second_order", "resample"),
            ("upgd_second_order", "orthogonal"),
        )
    ),
    Row("ewc", ewc, (), CONSOLIDATE, CONSOLIDATE_OTHERWISE, slow=True),
    Row("mas", mas, (), CONSOLIDATE, CONSOLIDATE_OTHERWISE, slow=True),
    Row(
        "synaptic_intelligence",
        synaptic_intelligence,
        (),
        {**CONSOLIDATE, "epsilon": 0.1},
        {**CONSOLIDATE_OTHERWISE, "epsilon": 0.2},
        slow=True,
    ),
    Row("rwalk", rwalk, (), {**CONSOLIDATE, "epsilon": 0.1}, {**CONSOLIDATE_OTHERWISE, "epsilon": 0.2}, slow=True),
    Row("upgd", upgd, (), GATE, GATE_OTHERWISE, noisy=True),
    Row(
        "upgd of order 2, local, unprotected",
        upgd,
        (),
        GATE,
        GATE_OTHERWISE,
        {"order": 2, "scope": "local", "protect": False},
        wrap=with_curvature,
        noisy=True,
        slow=True,
    ),
    Row("upgd of units", upgd, (), GATE, GATE_OTHERWISE, {"units": UNITS}, noisy=True, slow=True),
    Row(
        "adaptive_upgd",
        adaptive_upgd,
        (),
        {**GATE, "b1": 0.9, "b2": 0.99, "eps": 0.1},
        {**GATE_OTHERWISE, "b1": 0.5, "b2": 0.9, "eps": 0.3},
        noisy=True,
        slow=True,
    ),
    Row(
        "continual_backprop of upgd",
        continual_backprop,
        (upgd(0.1, sigma=0.5), UNITS),
        REPLACE,
        {"replacement_rate": 0.3, "decay_rate": 0.5, "maturity_threshold": 2},
        {"max_replacements": 2},
        noisy=True,
        slow=True,
    ),
    Row(
        "perturbed_gradient_descent",
        perturbed_gradient_descent,
        (),
        {"learning_rate": 0.1, "sigma": 0.3, "weight_decay": 0.1},
        {"learning_rate": 0.2, "sigma": 0.1, "weight_decay": 0.2},
        noisy=True,
        slow=True,
    ),
    Row(
        "redo of sgd",
        redo,
        (optax.sgd(0.1), UNITS),
        {"threshold": 0.7, "every": 2},
        {"threshold": 1.0, "every": 3},
        noisy=True,
        slow=True,
    ),
    Row(
        "regrama of sgd",
        regrama,
        (optax.sgd(0.1), UNITS),
        {"threshold": 0.9, "every": 2},
        {"threshold": 1.2, "every": 3},
        noisy=True,
        slow=True,
    ),
    Row(
        "self_normalized_resets of sgd",
        self_normalized_resets,
        (optax.sgd(0.1), UNITS),
        {"rejection": 0.3, "every": 2},
        {"rejection": 0.6, "every": 3},
        {"max_silence": 2, "max_resets": 2},
        wrap=firing_seldom,
        noisy=True,
        slow=True,
    ),
    Row(
        "replace_units by a policy of its own",
        recycle_least_gradient,
        (UNITS,),
        {"decay": 0.5, "every": 2},
        {"decay": 0.01, "every": 3},
        noisy=True,
        slow=True,
    ),
    Row(
        "clip_weights of sgd",
        clip_weights,
        (optax.sgd(0.1),),
        {"bound": 1.0},
        {"bound": 2.0},
        {"scale": lambda path, param: 0.5 if path == "w1" else 0.7},
    ),
    Row(
        "normalize_and_project of sgd",
        normalize_and_project,
        (optax.sgd(0.1),),
        {"every": 2, "pull": 0.1},
        {"every": 3, "pull": 0.3},
        slow=True,
    ),
    Row(
        "fire of adam",
        fire,
        (adam(0.1),),
        {"every": 2},
        {"every": 3},
        {"iterations": 10, "reset_inner_state": True},
        slow=True,
    ),
    Row(
        "dash of sgd",
        dash,
        (optax.sgd(0.1),),
        {"every": 2, "least": 0.3, "alpha": 0.3},
        {"every": 3, "least": 0.6, "alpha": 0.6},
        slow=True,
    ),
    Row(
        "hare_and_tortoise of sgd",
        hare_and_tortoise,
        (optax.sgd(0.1),),
        {"decay": 0.9, "every": 2},
        {"decay": 0.5, "every": 3},
        slow=True,
    ),
    Row(
        "masked of sgd",
        masked_sgd,
        (MASK,),
        {"learning_rate": 0.1, "momentum": 0.5, "weight_decay": 0.1},
        {"learning_rate": 0.2, "momentum": 0.9, "weight_decay": 0.2},
    ),
    Row(
        "masked of continual_backprop",
        masked_continual_backprop,
        (UNITS, MASK),
        {"learning_rate": 0.1, "replacement_rate": 0.2},
        {"learning_rate": 0.2, "replacement_rate": 0.3},
        noisy=True,
        slow=True,
    ),
    Row(
        "periodic_reset of sgd",
        periodic_reset,
        (optax.sgd(0.1, 0.9),),
        {"every": 2},
        {"every": 4},
        {"init": lambda key: {name: jax.random.normal(key, w.shape) for name, w in make_params(0).items()}},
        noisy=True,
        slow=True,
    ),
    Row(
        "add_churn_reduction",
        add_churn_reduction,
        (),
        {"strength": 0.5},
        {"strength": 1.0},
        {"apply_fn": by_sums},
        wrap=with_reference,
        slow=True,
    ),
    Row("trac of sgd", trac, (optax.sgd(0.1),), {"s_init": 0.1, "eps": 0.1}, {"s_init": 0.2, "eps": 1.0}, slow=True),
    Row(
        "adam_reset",
        adam_reset,
        (),
        {"learning_rate": 0.1, "b1": 0.9, "b2": 0.99, "every": 3},
        {"learning_rate": 0.2, "b1": 0.5, "b2": 0.9, "every": 2},
        {"forget": "time"},
        slow=True,
    ),
    Row(
        "obgd",
        obgd,
        (),
        {"learning_rate": 0.1, "discount": 0.9, "trace_decay": 0.9, "kappa": 0.5},
        {"learning_rate": 0.2, "discount": 0.5, "trace_decay": 0.5, "kappa": 2.0},
        wrap=with_td_error,
        slow=True,
    ),
    Row(
        "eligibility_traces before sgd",
        eligibility_traces,
        (),
        {"discount": 0.9, "trace_decay": 0.9},
        {"discount": 0.5, "trace_decay": 0.5},
        wrap=lambda tx: with_td_error(optax.chain(tx, optax.sgd(0.1))),
        slow=True,
    ),
    Row("masked_changes of adam", masked_changes, (adam(0.1), TICKET, PARAMS), {}, {}, slow=True),
]


EVERYWHERE = (
    shrink_and_perturb,
    perturbed_gradient_descent,
    periodic_reset,
)  # add noise to all weights; replacements draw only w1


@pytest.fixture(params=[pytest.param(row, id=row.name, marks=[pytest.mark.slow] if row.slow else []) for row in ROWS])
def row(request):
    return request.param


@pytest.fixture(params=[pytest.param(row, id=row.name) for row in ROWS])
def any_row(request):
    """Parametrize a test over all rows without marking slow ones, because it compiles nothing."""
    return request.param


def advance(tx, params, state, stream=STREAM):
    """Run the stream and return the last params and state."""

    def step(carry, inputs):
        params, state = carry
        grads, features = inputs
        updates, state = tx.update(grads, state, params, features=features)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), stream)[0]


def run(tx, params=PARAMS, stream=STREAM):
    return advance(tx, params, tx.init(params), stream)


# When LLVM optimizes, it may fuse multiplications and additions, and two programs with the same arithmetic,
# such as a vmapped run and a solo run, may differ in the last bit. Without it they are equal, and compile faster.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
# For comparisons within rounding, XLA's older emitters compile two to three times as fast (see conftest.py).
older = {"xla_cpu_use_fusion_emitters": False}
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0, **older})


@functools.cache
def solo(row):
    """Run as users do, for comparison with other runs; return the last params and state."""
    tx = row.make()
    return jax.jit(lambda params: run(tx, params))(PARAMS)


# These tests spend most of their time compiling, so they share the compiled runs of a row.
@functools.cache
def compiled(row):
    """Compile the plain run as a function of the params."""
    tx = row.make()
    return jit(lambda params: run(tx, params))


def traced(row, key, hyper, params):
    return run(row.make(key=key, **hyper), params)


@functools.cache
def compiled_traced(row):
    """Compile a run as a function of (key, hyper, params)."""
    return jit(functools.partial(traced, row))


@functools.cache
def compiled_vmapped(row):
    """Compile the same, vmapped over all three arguments."""
    return jit(jax.vmap(functools.partial(traced, row)))


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), actual, expected)


def differ(a, b):
    return any(bool((x != y).any()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def at(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def repeat(tree, times):
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (times, *jnp.shape(x))), tree)


def all_differ(leaf):
    return len(np.unique(np.asarray(leaf).reshape(len(leaf), -1), axis=0)) == len(leaf)


def test_every_hyperparameter_matters(row):
    """Otherwise the comparisons below would compare nothing."""
    for name, value in row.other.items():
        assert differ(compiled_traced(row)(0, row.hyper | {name: value}, PARAMS), solo(row)), name


def test_in_a_chain(row):
    tx = optax.chain(optax.scale(2.0), row.make())
    halved = (jax.tree.map(lambda g: g / 2, STREAM[0]), STREAM[1])
    params, _ = quick(lambda params: run(tx, params, halved))(PARAMS)
    assert_close(params, solo(row)[0])


def test_masked(row):
    """Masked-out updates pass unchanged, and the others are as if the rest did not exist."""
    tx = row.make()
    masked = optax.masked(tx, {name: name != "tag" for name in PARAMS})
    params, _ = quick(lambda params: run(masked, params))(PARAMS)
    np.testing.assert_allclose(params["tag"], PARAMS["tag"] + STREAM[0]["tag"].sum(0), rtol=1e-5)

    without = lambda tree: {name: leaf for name, leaf in tree.items() if name != "tag"}
    rest = (without(STREAM[0]), STREAM[1])
    expected, _ = quick(lambda params: run(tx, params, rest))(without(PARAMS))
    assert_close(without(params), expected)


def test_multi_steps(row):
    """Two small steps on the same gradients equal one big step."""
    tx = optax.MultiSteps(row.make(), every_k_schedule=2)
    twice = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), STREAM)
    params, state = quick(lambda params: run(tx, params, twice))(PARAMS)
    assert_close(params, solo(row)[0])
    assert_close(state.inner_opt_state, solo(row)[1])


def test_inject_hyperparams(row):
    """Settings are in the state, and values written there later are used."""
    inject = optax.inject_hyperparams(row.factory, static_args=tuple(row.static))
    tx = row.make(factory=inject)
    step = quick(lambda params, state: advance(tx, params, state))
    state = tx.init(PARAMS)
    assert_close(step(PARAMS, state)[0], solo(row)[0])

    def rewrite(node):
        if not hasattr(node, "hyperparams"):
            return node
        assert set(row.hyper) <= set(node.hyperparams)
        values = {name: jnp.asarray(value, node.hyperparams[name].dtype) for name, value in row.other.items()}
        return node._replace(hyperparams={**node.hyperparams, **values})

    rewritten = jax.tree.map(rewrite, state, is_leaf=lambda node: hasattr(node, "hyperparams"))
    assert_close(step(PARAMS, rewritten)[0], compiled_traced(row)(0, row.other, PARAMS)[0])


def test_second_call_does_not_retrace(row):
    tx = row.make()
    traces = []

    @quick
    def step(params, state, grads, features):
        traces.append(None)
        updates, state = tx.update(grads, state, params, features=features)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for i in range(2):
        grads, features = jax.tree.map(lambda x, i=i: x[i], STREAM)
        params, state = step(params, state, grads, features)
    assert len(traces) == 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_types_are_stable(any_row, dtype):
    tx = any_row.make()
    params = make_params(0, dtype)
    grads, features = jax.tree.map(lambda x: x[0], make_stream(dtype))
    state = jax.eval_shape(tx.init, params)
    updates, new_state = jax.eval_shape(
        lambda g, s, p, f: tx.update(g, s, p, features=f), grads, state, params, features
    )
    kind = lambda x: (x.shape, x.dtype, x.weak_type)
    assert jax.tree.map(kind, new_state) == jax.tree.map(kind, state)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(updates))


def test_bfloat16(row):
    tx = row.make()
    params = quick(lambda params: run(tx, params, make_stream(jnp.bfloat16)))(make_params(0, jnp.bfloat16))[0]
    assert all(leaf.dtype == jnp.bfloat16 and jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    if not row.noisy:  # noise depends on the parameters' bits, so it differs
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
        assert_close(wide, solo(row)[0], rtol=0.05, atol=0.05)


def test_vmap_over_seeds(row):
    """Every seed has the results of its solo run and its own noise, although the transformation has a single key."""
    tx = row.make()
    params = jax.tree.map(lambda *x: jnp.stack(x), *(make_params(seed) for seed in (0, 1, 1, 1)))
    # The last three differ only in parameters without gradients and units, so other differences are due to noise.
    params["tag"] = params["tag"].at[2:].add(jnp.ones((2, 8)).cumsum(0))
    together = jit(jax.vmap(lambda params: run(tx, params)))(params)
    for seed in range(4):
        assert_same(at(together, seed), compiled(row)(at(params, seed)))
    for name in ("w1", "b1", "w2"):
        if row.noisy and (name == "w1" or row.factory in EVERYWHERE):
            assert all_differ(together[0][name][1:])
        elif not row.noisy:
            assert_same(together[0][name][1], together[0][name][2])


def test_vmap_over_keys(row):
    """Every key gives the results of its solo run, and its own noise."""
    if not row.noisy:
        pytest.skip("takes no key")
    keys = jax.random.split(jax.random.key(7), 3)
    together = compiled_vmapped(row)(keys, repeat(row.hyper, 3), repeat(PARAMS, 3))
    for seed in range(3):
        assert_same(at(together, seed), compiled_traced(row)(keys[seed], row.hyper, PARAMS))
    assert all_differ(together[0]["w1"])


def test_vmap_over_hyperparameters(row):
    """A grid equals the runs of its single points, exactly if these are traced, and up to rounding if constant."""
    keys = jax.random.split(jax.random.key(7), 3)
    grid = {name: jnp.asarray([value, row.other[name], value]) for name, value in row.hyper.items()}
    together = compiled_vmapped(row)(keys, grid, repeat(PARAMS, 3))
    for i in range(2):
        assert_same(at(together, i), compiled_traced(row)(keys[i], at(grid, i), PARAMS))
    assert_close(compiled_traced(row)(0, row.hyper, PARAMS)[0], solo(row)[0])


def test_noise_changes_from_step_to_step(row):
    """With the same gradients and activations at every step, updates with noise differ from step to step."""
    if not row.noisy:
        pytest.skip("takes no key")
    tx = row.make()
    same = jax.tree.map(lambda x: x[0], STREAM)

    @quick
    def fresh(state):
        updates, _ = tx.update(same[0], state, PARAMS, features=same[1])
        return updates["w1"]

    state = solo(row)[1]
    counts = lambda node: hasattr(node, "key") and hasattr(node, "count")  # the part of a chain that draws noise
    set_count = lambda node, n: node._replace(count=jnp.asarray(n, jnp.int32)) if counts(node) else node
    count = lambda state, n: jax.tree.map(lambda node: set_count(node, n), state, is_leaf=counts)
    assert differ(fresh(count(state, 20)), fresh(count(state, 21)))
    assert_same(fresh(count(state, 20)), fresh(count(state, 20)))


@pytest.mark.slow  # every operation is compiled separately
def test_without_jit(row):
    tx = row.make()
    params, state = PARAMS, tx.init(PARAMS)
    for i in range(STEPS):
        grads, features = jax.tree.map(lambda x, i=i: x[i], STREAM)
        updates, state = tx.update(grads, state, params, features=features)
        params = optax.apply_updates(params, updates)
    assert_close((params, state), solo(row))


@pytest.mark.parametrize("keeper", ["orbax", "flax"])
def test_checkpoint(row, keeper, tmp_path):
    """A saved and restored state is the same, so a restored run continues where it stopped."""
    tx = row.make()
    _, state = solo(row)
    blank = tx.init(make_params(1))
    assert differ(blank, state) or not jax.tree.leaves(state)
    if keeper == "flax":
        restored = flax.serialization.from_bytes(blank, flax.serialization.to_bytes(state))
    elif jax.tree.leaves(state):  # orbax refuses a tree without leaves
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", state)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / "state", blank)
    else:
        restored = blank
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert_same(restored, state)
    kind = lambda x: (jnp.shape(x), jnp.result_type(x))
    assert jax.tree.map(kind, restored) == jax.tree.map(kind, state)
