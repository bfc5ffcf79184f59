import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import cbp_jax
from cbp_jax import curvature
from cbp_jax.experiments import quality, utility_quality
from cbp_jax.experiments.quality import (
    LEVELS,
    SCOPES,
    UTILITIES,
    Settings,
    check,
    feature_utilities,
    plot,
    rank_correlations,
    summary,
    total,
    true_feature_utility,
    true_weight_utility,
    weight_utilities,
)
from cbp_jax.nets import MLP

preset, run = utility_quality.preset, utility_quality.run

NET = MLP((5, 4), 2, "relu")
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)), jnp.float32)
Y = jnp.array([[0.5, -0.2], [0.1, 0.4]])
PARAMS = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape),
                      jax.jit(NET.init)(jax.random.key(0), X))  # fmt: skip
PARAMS["params"]["Dense_0"]["bias"] = PARAMS["params"]["Dense_0"]["bias"].at[2].set(-100.0)  # a dead unit
UNITS = cbp_jax.discover_units(NET.apply, PARAMS, X)


def loss_fn(params):
    return jnp.square(NET.apply(params, X) - Y).sum(-1).mean()


def numpy_loss(layers, gates=None):
    """Compute the same in float64, with each hidden layer's activations multiplied by gates."""
    h = np.asarray(X, np.float64)
    for number, (w, b) in enumerate(layers):
        h = h @ w + b
        if number < len(layers) - 1:
            h = np.maximum(h, 0) * (1 if gates is None else gates[number])
    return np.square(h - np.asarray(Y, np.float64)).sum(-1).mean()


def numpy_layers():
    return [
        [np.asarray(layer["kernel"], np.float64), np.asarray(layer["bias"], np.float64)]
        for layer in PARAMS["params"].values()
    ]


def gated(params_and_gates, x):
    """Return the network with a gate on each activation; gates are parameters."""
    params, gates = params_and_gates
    layers = list(params["params"].values())
    for layer, gate in zip(layers, [*gates, None], strict=True):
        x = x @ layer["kernel"] + layer["bias"]
        x = x if gate is None else jnp.maximum(x, 0) * gate
    return x


def test_the_true_utility_of_weights_is_that_of_a_plain_loop():
    utility = jax.jit(lambda p: true_weight_utility(loss_fn, p))(PARAMS)
    layers = numpy_layers()
    base = numpy_loss(layers)
    for number, name in enumerate(PARAMS["params"]):
        for part, key in enumerate(("kernel", "bias")):
            array = layers[number][part]
            expected = np.empty(array.shape)
            for place in np.ndindex(array.shape):
                kept, array[place] = array[place], 0.0
                expected[place] = numpy_loss(layers) - base
                array[place] = kept
            np.testing.assert_allclose(utility["params"][name][key], expected, rtol=1e-4, atol=2e-6)
    # A weight that only a dead unit reads or writes has utility exactly 0, not only within rounding.
    assert (utility["params"]["Dense_0"]["kernel"][:, 2] == 0).all()
    assert (utility["params"]["Dense_1"]["kernel"][2] == 0).all()


def test_more_weights_than_fit_one_chunk(monkeypatch):
    whole = jax.jit(lambda p: true_weight_utility(loss_fn, p))(PARAMS)
    monkeypatch.setattr(quality, "_CHUNK", 7)
    parts = jax.jit(lambda p: true_weight_utility(loss_fn, p))(PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), parts, whole)


def test_approximate_utilities_of_weights():
    shape = jax.tree.map(jnp.shape, PARAMS, is_leaf=lambda leaf: hasattr(leaf, "shape"))
    w, g, h, exact = 2.0, 3.0, 5.0, 7.0
    fill = lambda value: jax.tree.map(lambda leaf: jnp.full(leaf.shape, value), PARAMS)
    found = jax.jit(weight_utilities)(fill(-w), fill(g), fill(h), fill(exact), jax.random.key(0))
    expected = [w * g + exact * w**2 / 2, w * g + h * w**2 / 2, w * g, g**2, w]
    assert UTILITIES == (
        "second_order_exact", "second_order", "first_order", "squared_gradient", "magnitude", "random"
    )  # fmt: skip
    for tree, value in zip(found, expected, strict=False):
        assert all((leaf == value).all() for leaf in jax.tree.leaves(tree))
    assert jax.tree.map(jnp.shape, found[-1], is_leaf=lambda leaf: hasattr(leaf, "shape")) == shape
    noise = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found[-1])])
    assert len(set(noise.tolist())) > noise.size - 3


def test_feature_utilities_are_those_of_gates_on_the_activations():
    assert [group.size for group in UNITS] == [5, 4]
    layers, gates = numpy_layers(), [np.ones(5), np.ones(4)]
    base = numpy_loss(layers, gates)
    true = jax.jit(lambda p: true_feature_utility(loss_fn, p, UNITS))(PARAMS)
    for layer, gate in enumerate(gates):
        for unit in range(gate.size):
            gate[unit] = 0.0
            np.testing.assert_allclose(true[layer][unit], numpy_loss(layers, gates) - base, rtol=1e-4, atol=2e-6)
            gate[unit] = 1.0
    assert true[0][2] == 0

    @jax.jit
    def both(params):
        _, grads, diagonal = curvature.hesscale(NET.apply, params, X, Y, "squared_error")
        ours = feature_utilities(loss_fn, params, UNITS, grads, diagonal, jax.random.key(0))
        gates = [jnp.ones(5), jnp.ones(4)]
        loss = lambda gates: jnp.square(gated((params, gates), X) - Y).sum(-1).mean()
        _, (_, slope), (_, bend) = curvature.hesscale(gated, (params, gates), X, Y, "squared_error")
        return ours, slope, bend, curvature.hessian_diagonal(loss, gates)

    found, slope, bend, exact = both(PARAMS)
    for layer, name in ((0, "Dense_1"), (1, "Dense_2")):
        expected = {
            "second_order_exact": -slope[layer] + exact[layer] / 2,
            "second_order": -slope[layer] + bend[layer] / 2,
            "first_order": -slope[layer],
            "squared_gradient": slope[layer] ** 2,
            "magnitude": jnp.abs(PARAMS["params"][name]["kernel"]).sum(1),
        }
        for utility, value in expected.items():
            ours = found[UTILITIES.index(utility)][layer]
            np.testing.assert_allclose(ours, value, rtol=1e-4, atol=1e-6, err_msg=utility)
    # Only the outputs read the last hidden layer, and the loss is quadratic in them.
    np.testing.assert_allclose(found[UTILITIES.index("second_order")][1], true[1], rtol=1e-4, atol=2e-6)


def test_rank_correlations_equal_those_of_scipy():
    rng = np.random.default_rng(0)
    values = np.stack([rng.normal(size=60), rng.integers(0, 5, 60), rng.normal(size=60), np.repeat([0.0, 1.0], 30)])
    values[2] += values[0]
    values[0, :20] = -0.0
    values[0, 20:25] = 0.0
    found = jax.jit(rank_correlations)(jnp.asarray(values, jnp.float32))
    expected = [stats.spearmanr(values[0], row).statistic for row in values[1:]]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    constant = jnp.asarray([np.ones(9), np.arange(9.0)])
    assert rank_correlations(constant).tolist() == rank_correlations(constant[::-1]).tolist() == [0]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out, calls = tmp_path_factory.mktemp("runs") / "smoke", []
    return run(preset("smoke"), out, lambda *args: calls.append(args)), out, calls


def test_a_run_from_end_to_end(smoke):
    results, out, calls = smoke
    assert results.identical(cbp_jax.load_results(out))
    shape = {"method": 1, "level": 2, "scope": 2, "utility": 6, "seed": 2, "task": 4}
    assert dict(results.correlation.sizes) == shape
    assert results.step.values.tolist() == [0, 10, 20, 30]
    assert np.isfinite(results.correlation).all() and (np.abs(results.correlation) <= 1 + 1e-6).all()
    assert np.isfinite(results.loss).all() and results.attrs["experiment"] == "utility_quality"
    assert json.loads(results.attrs["settings"])["measure_every"] == 10
    assert [call[:2] for call in calls] == [("tanh", 2)] * 4
    assert sum(call[1] for call in calls) == total(preset("smoke"))  # so that the progress bar reaches its end
    assert calls[-1][2]["loss"] == pytest.approx(float(results.loss.values[0, :, -1].mean()), rel=1e-5)
    mean = results.correlation.mean(("method", "seed", "task")).sel(level="weight", scope="global")
    by_name = dict(zip(UTILITIES, mean.values.tolist(), strict=True))
    assert by_name["second_order_exact"] > 0.95
    assert min(by_name["second_order"], by_name["first_order"]) > 0.5
    assert max(by_name["magnitude"], by_name["random"]) < 0.3
    # Seeds differ in everything.
    assert len(np.unique(results.loss.values)) == results.loss.size


def test_results_belong_to_their_seed_utility_and_layer(smoke):
    results, _, _ = smoke
    # The first measurement of seed 1 is computed again from its captured inputs.
    settings = dataclasses.replace(preset("smoke"), measure_every=1)
    capture = lambda apply_fn, units, params, x, y, key: (params, x, y)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "correlations", capture)
        _, captured = next(iter(quality._measurements(settings, "tanh")))
    params, x, y = jax.tree.map(lambda leaf: leaf[1], captured)
    net = MLP(settings.hidden, 1, "tanh")
    assert x.shape == (1, 8) and (np.abs(x) <= 0.5).all()
    pairs = [x[0, i] + x[0, j] for i in range(8) for j in range(i)]
    assert np.isclose(pairs, y[0, 0]).sum() == 1
    loss = lambda p: jnp.square(net.apply(p, x) - y).sum()
    truth = jax.jit(lambda p: true_weight_utility(loss, p))(params)
    grads = jax.jit(jax.grad(loss))(params)
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    layer = lambda tree, name: np.concatenate([np.ravel(leaf) for leaf in tree["params"][name].values()])
    for utility, values in (
        ("squared_gradient", jax.tree.map(jnp.square, grads)),
        ("magnitude", jax.tree.map(jnp.abs, params)),
        ("first_order", jax.tree.map(lambda w, g: -w * g, params, grads)),
    ):
        where = {"level": "weight", "utility": utility, "seed": 1, "task": 0}
        found = results.correlation.sel(where)[0]
        expected = {
            "global": stats.spearmanr(flat(values), flat(truth)).statistic,
            "layer": np.mean([stats.spearmanr(layer(values, n), layer(truth, n)).statistic for n in params["params"]]),
        }
        for scope, value in expected.items():
            assert float(found.sel(scope=scope)) == pytest.approx(value, abs=0.01), (utility, scope)


def test_the_papers_networks_have_one_hidden_layer_and_are_initialized_as_in_pytorch(monkeypatch):
    monkeypatch.setattr(quality, "correlations", lambda apply_fn, units, params, x, y, key: (params, x))
    settings = dataclasses.replace(preset("paper"), seeds=20, steps=2)
    _, (params, x) = next(iter(quality._measurements(settings, "relu")))
    layers = params["params"]
    assert {name: layer["kernel"].shape[1:] for name, layer in layers.items()} == {
        "Dense_0": (5, 50),
        "Dense_1": (50, 1),
    }
    assert x.shape == (20, 1, 5)
    for layer in layers.values():  # uniform in ±1/sqrt(fan-in), biases too
        bound = layer["kernel"].shape[1] ** -0.5
        for values in layer.values():
            assert 0.8 * bound < np.abs(values).max() <= bound * (1 + 1e-6)


def test_table_and_picture(smoke, tmp_path):
    results, _, _ = smoke
    table = summary(results)
    lines = table.split("\n")
    assert lines[2].split() == "tanh weights, global weights, by layer features, global features, by layer".split()
    first = next(line for line in lines if line.startswith("First order"))
    values = results.correlation.sel(utility="first_order")[0].mean("task")
    cells = [
        f"{float(values.sel(level=level, scope=scope).mean()):.3f} ± "
        f"{float(values.sel(level=level, scope=scope).std(ddof=1)) / np.sqrt(2):.3f}"
        for level in LEVELS
        for scope in SCOPES
    ]
    assert re.split(r"\s{2,}", first) == ["First order", *cells]
    png, pdf = plot(results, tmp_path / "pictures", ("png", "pdf"))
    assert png.name == "utility_quality.png" and png.read_bytes().startswith(b"\x89PNG")
    assert pdf.name == "utility_quality.pdf" and pdf.read_bytes().startswith(b"%PDF")


def test_an_interrupted_run_keeps_its_measurements_and_resumes_with_the_missing_ones(tmp_path, monkeypatch):
    asked, stopped = [], [True]

    def measurements(settings, activation):
        asked.append(activation)
        for task in range(4):
            if activation == "relu" and task == 2 and stopped:
                raise KeyboardInterrupt
            yield np.full(2, task, np.float32), np.full((2, 2, 2, 6), task / 10, np.float32)

    monkeypatch.setattr(quality, "_measurements", measurements)
    monkeypatch.setattr(quality, "_SAVE_EVERY", 1e9)
    settings = Settings(seeds=2, steps=8, measure_every=2, activations=("tanh", "relu"))
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path)
    results = cbp_jax.load_results(tmp_path)
    for values, scale in ((results.loss, 1), (results.correlation, 0.1)):
        values = values.mean([dim for dim in values.dims if dim not in ("method", "task")]).values
        np.testing.assert_allclose(values, scale * np.array([[0, 1, 2, 3], [0, 1, np.nan, np.nan]]), rtol=1e-6)
    assert "0.050 ± 0.000" in summary(results)  # relu has two measurements
    with pytest.raises(ValueError, match=r"6 finished tasks of a run with other settings \(seeds is 2 there"):
        run(dataclasses.replace(settings, seeds=3), tmp_path)
    assert cbp_jax.load_results(tmp_path).identical(results)
    assert plot(results, tmp_path / "pictures")[0].is_file()
    asked.clear(), stopped.clear()
    calls = []
    whole = run(settings, tmp_path, lambda *args: calls.append(args))
    assert asked == ["relu"] and sum(call[1] for call in calls) == total(settings)
    assert np.isfinite(whole.correlation).all() and whole.identical(cbp_jax.load_results(tmp_path))


def test_a_diverging_network_is_reported_and_its_seed_is_left_out(tmp_path, monkeypatch):
    def measurements(settings, activation):
        for task in range(4):
            lost = (np.arange(2) == 1) & (activation == "relu") & (task >= 2)
            yield np.where(lost, np.nan, 1.0), np.where(lost, 0.0, 0.5)[:, None, None, None] * np.ones((2, 2, 2, 6))

    monkeypatch.setattr(quality, "_measurements", measurements)
    settings, calls = Settings(seeds=2, steps=8, measure_every=2, activations=("tanh", "relu")), []
    with pytest.warns(RuntimeWarning, match="diverged") as heard:
        results = run(settings, tmp_path, lambda *args: calls.append(args))
    assert [str(warning.message).partition(":")[0] for warning in heard] == ["relu diverged with seed 1 in task 3"]
    assert results.identical(cbp_jax.load_results(tmp_path))
    np.testing.assert_array_equal(results.diverged, [[np.nan, np.nan], [np.nan, 2]])
    assert [call[2] for call in calls] == 8 * [{"loss": 1.0, **dict.fromkeys(UTILITIES, 0.5)}]
    line = "relu: 1 of 2 seeds diverged and are left out for all methods (seed 1 in task 3)"
    assert summary(results) == f"{summary(results.isel(seed=[0]))}\n\n{line}"
    figures = []
    monkeypatch.setattr(quality, "save_figures", lambda drawn, *_: figures.extend(drawn.values()))
    plot(results, tmp_path)
    (figure,) = figures
    assert {tuple(line.get_ydata()) for ax in figure.axes for line in ax.lines} == {(0.5,) * 4}
    assert "of 1 seeds; 1 of 2 seeds left out, because a method diverged" in " ".join(figure.get_supxlabel().split())


def test_presets():
    for name in ("smoke", "laptop", "paper"):
        assert check(preset(name)) == list(preset(name).activations)
    assert (preset("laptop").seeds, preset("laptop").steps, preset("laptop").inputs) == (20, 2000, 16)
    paper = preset("paper")
    assert (paper.hidden, paper.inputs, paper.summed, paper.batch_size) == ((50,), 5, 2, 1)
    assert (paper.seeds, paper.steps, paper.measure_every, paper.step_size) == (30, 2000, 1, 0.01)
    with pytest.raises(ValueError, match=r"preset must be one of \['smoke', 'laptop', 'paper'\], got 'large'"):
        preset("large")
    with pytest.raises(ValueError, match=r"dataset must be left out: .* got 'mnist'"):
        preset("smoke", "mnist")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"measure_every": 30, "steps": 20}, "measure_every must be at most steps = 20, got 30"),
        ({"summed": 17}, "summed must be at most inputs = 16, got 17"),
        ({"step_size": float("nan")}, "step_size must not be negative, got nan"),
        ({"hidden": ()}, r"hidden must be .* got \(\)"),
        ({"activations": ("tanh", "tanh")}, "activations must be at least one and all different"),
        ({"activations": ("tnah",)}, "activation must be .* got 'tnah'"),
        ({"initialization": "he"}, "initialization must be 'kaiming' or 'pytorch', got 'he'"),
        ({"lanes": "turns"}, "lanes must be .* got 'turns'"),
    ],
)
def test_bad_settings(settings, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        run(Settings(**settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()
