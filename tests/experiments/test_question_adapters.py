import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from same_runs import same

import cbp_jax
from cbp_jax import lora
from cbp_jax.experiments import learners, question_adapters
from cbp_jax.experiments.questions import adapter_learners, adapter_reports, adapters
from cbp_jax.units import leaves_by_path

preset, run = question_adapters.preset, question_adapters.run
# One program besides that of the trained network; the slow tests cover all methods.
SMOKE = dataclasses.replace(
    preset("smoke"), methods=("adapter:reset=network", "adapter:step_size=0.01,reset=network"), hidden=(12,)
)
CBP = "adapter_cbp:replacement_rate=0.1,maturity_threshold=5"
ALL = ("adapter:reset=network", "adapter:l1=1e-3", CBP, "full", "full:reset=network", "full:l1=0.1", "full_cbp")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, compiled_once):
    out = tmp_path_factory.mktemp("runs") / "smoke"
    return run(SMOKE, out), out


def test_a_run_from_end_to_end(smoke):
    results, out = smoke
    assert results.identical(cbp_jax.load_results(out))
    assert dict(results.sizes) == {"method": 2, "seed": 2, "task": 4}
    for name in adapters.MEASURES:
        assert np.isfinite(results[name]).all(), name
    # Before the first task, adapters change nothing: the representation is that of the trained network.
    for name in ("effective_rank", "dead_units"):
        first = results[name].values[..., 0]
        np.testing.assert_allclose(first[0], first[1], rtol=1e-6)
    assert (results.change_rank.values > 0.99).all() and (results.change_rank.values < 2.01).all()
    methods, found = adapter_reports.measured(results)
    assert adapter_reports.fresh_of(results) == methods[0] and not found["less_fresh"][methods[0]].any()
    np.testing.assert_allclose(
        found["less_fresh"][methods[1]], results.accuracy[1].values.astype(float) - results.accuracy[0], atol=1e-7
    )


def test_the_table_compares_with_the_fresh_adapter(smoke):
    results, _ = smoke
    table = question_adapters.summary(results)
    last = 100 * (results.accuracy.values[1, :, 3].astype(float) - results.accuracy.values[0, :, 3]).mean()
    assert f"{last:.1f} [" in table and "compared with adapter(reset=network)" in table


@pytest.mark.slow
def test_the_picture(smoke, tmp_path):
    results, _ = smoke
    assert [path.name for path in question_adapters.plot(results, tmp_path)] == ["adapters.png"]
    with pytest.raises(ValueError, match="nothing to draw"):
        question_adapters.plot(results * np.nan, tmp_path)


def test_measures_of_changes_against_numpy():
    rng = np.random.default_rng(0)
    shapes = {"a": (6, 5), "b": (5, 4)}
    base = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    adapter = lora.init(base, 0, rank=3, alpha=6)
    adapter = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), adapter)
    adapter.factors["a"]["lora_B"] = adapter.factors["a"]["lora_B"].at[1].mul(1e-3)
    found = adapters.change_measures(adapter, base)
    ranks, dormant = [], []
    for factors in adapter.factors.values():
        a, b = (np.asarray(factors[name], np.float64) for name in ("lora_A", "lora_B"))
        singular = np.linalg.svd(a @ b)[1][:3]
        share = singular / singular.sum()
        ranks.append(np.exp(-(share * np.log(share)).sum()))
        norms = [np.linalg.norm(np.outer(a[:, k], b[k])) for k in range(3)]
        dormant += [norm <= 0.1 * np.mean(norms) for norm in norms]
    np.testing.assert_allclose(found["change_rank"], np.mean(ranks), rtol=1e-4)
    assert sum(dormant) == 1
    np.testing.assert_allclose(found["dormant_components"], 1 / 6, rtol=1e-6)
    # The same change of all weights has the same rank, and no components.
    found = adapters.change_measures(lora.merge(base, adapter), base)
    np.testing.assert_allclose(found["change_rank"], np.mean(ranks), rtol=1e-3)
    assert np.isnan(found["dormant_components"])


def test_l1_pulls_on_the_change():
    base = {"w": jnp.ones((4, 3))}
    adapter = jax.tree.map(jnp.ones_like, lora.init(base, 0, rank=2, alpha=2))
    tx = adapter_learners.add_adapter_l1(0.5)
    zeros = jax.tree.map(jnp.zeros_like, adapter)
    updates, _ = tx.update(zeros, tx.init(adapter), adapter)
    # d/dA of 0.5 sum |A B|, where all entries are positive, is 0.5 times the sums of B's rows.
    np.testing.assert_allclose(updates.factors["w"]["lora_A"], np.full((4, 2), 0.5 * 3))
    np.testing.assert_allclose(updates.factors["w"]["lora_B"], np.full((2, 3), 0.5 * 4))


@pytest.mark.slow
def test_every_method_starts_from_the_trained_network_of_its_seed(smoke, tmp_path):
    results = run(dataclasses.replace(SMOKE, methods=ALL), tmp_path)
    first = results.effective_rank.values[..., 0]
    np.testing.assert_allclose(first, np.broadcast_to(first[0], first.shape), rtol=1e-5)
    np.testing.assert_allclose(first[0], smoke[0].effective_rank.values[0, :, 0], rtol=1e-5)
    assert len(np.unique(first[0])) == 2
    at = lambda label, name: results[name].loc[{"method": label}].values
    assert (at("full", "change_rank") > at("adapter(reset=network)", "change_rank")).all()
    cbp = "adapter_cbp(replacement_rate=0.1, maturity_threshold=5)"
    assert (at(cbp, "replaced_units").sum(1) > 0).all() and not at("full", "replaced_units").any()
    assert np.isfinite(at(cbp, "dormant_components")).all() and np.isnan(at("full", "dormant_components")).all()
    assert adapter_reports.measured(results)[0] == results.method.values.tolist()
    assert question_adapters.plot(results, tmp_path / "pictures")[0].is_file()


def test_each_task_but_the_first_starts_with_a_fresh_adapter_that_changes_nothing():
    base = {"w": jnp.ones((4, 3))}
    network = types.SimpleNamespace(
        predict=lambda params, x: (x @ params["w"], {}), _replace=lambda **fields: Network(**fields)
    )
    adapter_of = lambda params, key: lora.init(params, key, rank=2)
    (method,) = learners.read_methods(["adapter:reset=network"], known=adapter_learners.LEARNERS)
    learner = adapters.on_base([method], network, (), adapter_of, base)
    tx = learner.optimizer(method.hyperparameters, jax.random.key(0))
    tuned = jax.tree.map(jnp.ones_like, adapter_of(base, jax.random.key(1)))
    state = tx.update(tuned, tx.init(tuned), tuned)[1]
    for task in (0, 1):
        adapter, moments = learner.begin_task(tx, jax.random.key(2), jnp.int32(task), tuned, state)
        changed, remembered = jnp.any(lora.delta(adapter)["w"] != 0), jnp.any(jax.tree.leaves(moments)[1] != 0)
        assert bool(changed) == bool(remembered) == (task == 0)


class Network(types.SimpleNamespace):
    """The fields of a learner that `on_base` replaces."""

    def _replace(self, **fields):
        return Network(**{**vars(self), **fields})


@pytest.mark.slow
def test_the_trained_network_knows_its_task():
    settings = dataclasses.replace(SMOKE, base_epochs=15, seeds=1, stream="pixels", examples_per_task=1000)
    problem = adapters._problem(settings)
    base_problem = adapters.base_problem(settings, problem)
    methods = learners.read_methods([settings.base_learner])
    network = learners.make_learner(methods, (12,), "relu", problem.input_shape, 10)
    params = adapters.train_base(settings, network, base_problem, methods[0])
    w = {path: np.asarray(leaf[0]) for path, leaf in leaves_by_path(params).items()}
    x, y = np.asarray(problem.data["images"]) / 16, np.asarray(problem.data["labels"])
    h = np.maximum(x @ w["params/Dense_0/kernel"] + w["params/Dense_0/bias"], 0)
    outputs = h @ w["params/Dense_1/kernel"] + w["params/Dense_1/bias"]
    assert (outputs.argmax(1) == y).mean() > 0.85


@pytest.mark.slow
def test_an_interrupted_run_resumes_exactly(smoke, tmp_path):
    calls = []

    def stop(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(SMOKE, tmp_path, stop)
    assert same(run(SMOKE, tmp_path), smoke[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("adapter",)}, "methods must have a fresh adapter for each task"),
        ({"methods": ("adapter:reset=network", "bp")}, "the learner must be one of .'adapter', 'adapter_cbp', 'full'"),
        ({"methods": ("adapter:reset=network", "full:reset=head")}, "with reset=network or none"),
        ({"methods": ("adapter:reset=network", "full:hidden=5x5")}, "no settings of the network"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"alpha": 0.0}, "alpha must be positive, got 0"),
        ({"stream": "sounds"}, "stream must be 'labels' or 'pixels', got 'sounds'"),
        ({"base_epochs": 0}, "base_epochs must be at least 1, got 0"),
        ({"base_learner": "adam:reset=network"}, "base_learner must need no curvature"),
        ({"target_modules": ()}, "target_modules must be one pattern or more"),
        ({"target_modules": ("conv",)}, "target_modules: 'conv' matches no kernel"),
        ({"measure_every": 2}, "measure_every cannot be given"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_computed(changes, message):
    with pytest.raises(ValueError, match=message):
        question_adapters.prepare(dataclasses.replace(SMOKE, **changes))
