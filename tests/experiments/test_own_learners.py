"""A user's learners: a class and a row, or a function by its path."""

import dataclasses
import functools
import json
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cbp_jax
from cbp_jax import cli, load_results
from cbp_jax.experiments import learners, online_permuted
from cbp_jax.experiments.learners import LEARNERS, Backprop, ContinualBackprop, custom, parse_method, read_methods
from cbp_jax.replacement import get_utility
from cbp_jax.report import looks, plot_tasks

ROW = """
import dataclasses
import optax
from cbp_jax.experiments.learners import Method, ranged
from cbp_jax.report.looks import BLUE, Look

@dataclasses.dataclass(frozen=True, kw_only=True)
class Sign(Method):
    name, about, look = "sign", "the sign of the gradient", Look("Signs", BLUE)

    step_size: float = ranged(0.001)
    decay: float = ranged(0.5, below=1)

    def build(self, units, key):
        return optax.chain(optax.trace(self.decay), optax.scale_by_sign(), optax.scale(-self.step_size))
"""

FUNCTIONS = '''
import jax, optax

def plain(learning_rate=0.1, nesterov=False, seed=0):
    return optax.sgd(learning_rate, nesterov=nesterov)

def needs_python(learning_rate=0.1, momentum=0.0):
    return optax.sgd(learning_rate, momentum=momentum if momentum > 0 else None)

def scaled_by_activity(learning_rate, *, units, key):
    """Divides the step by the mean activation of the units, and starts it from a random factor."""
    def update(updates, state, params=None, *, features, **_):
        activity = sum(abs(features[group.name]).mean() for group in units)
        return jax.tree.map(lambda u: -learning_rate * state * u / (1 + activity), updates), state
    return optax.GradientTransformationExtraArgs(lambda params: jax.random.uniform(key), update)

def of_second_order(learning_rate=0.1):
    def update(updates, state, params=None, *, hessian_diag, **_):
        return jax.tree.map(lambda u, h: -learning_rate * u / (1 + abs(h)), updates, hessian_diag), state
    return optax.chain(optax.clip(1.0), optax.GradientTransformationExtraArgs(lambda params: (), update))

def of_one_network(learning_rate=0.1):
    return optax.masked(optax.sgd(learning_rate), {"params": {"Dense_0": True, "Dense_7": False}})

def number(learning_rate=0.1):
    return learning_rate

def number_of_units(*, units):
    return len(units)

def fails(learning_rate=0.1):
    raise RuntimeError("the cat is on the table")

three = 3
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Make the user's working folder, which contains a package."""
    package = tmp_path / "my_package"
    package.mkdir()
    for name, text in (("__init__", ""), ("row", ROW), ("functions", FUNCTIONS), ("broken", "import no_such_thing")):
        (package / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


def settings(*methods):
    small = {"tasks": 2, "examples_per_task": 40, "hidden": (5,), "measured_examples": 10}
    return dataclasses.replace(online_permuted.preset("smoke"), methods=methods, **small)


def test_a_new_learner_is_one_class_and_one_row_or_only_a_path(own, monkeypatch, capsys):
    imported = []
    monkeypatch.setattr(cli, "_use_all_cores", lambda: imported.append("my_package.functions" in sys.modules))
    sys.path.append(str(own))
    from my_package.row import Sign

    monkeypatch.setitem(LEARNERS, Sign.name, Sign)  # the row
    path = "my_package.functions:plain"
    words = ["sign:step_size=0.01", path, f"{path}(learning_rate=0.2)"]
    shape = "--preset smoke --seeds 1 --tasks 1 --examples-per-task 40 --hidden 5 --measured-examples 10 --quiet"
    run = ["run", "online_permuted", *shape.split(), "--out", str(own / "run"), "--methods", *words]
    assert cli.main(run) == 0
    assert imported == [False]  # cores are counted before anything can start JAX
    assert f"{path}(learning_rate=0.2)" in capsys.readouterr().out  # the table
    results = load_results(own / "run")
    assert results.method.values.tolist() == ["sign(step_size=0.01)", path, f"{path}(learning_rate=0.2)"]
    assert results.learner.values.tolist() == ["sign", path, path]
    np.testing.assert_array_equal(results.learning_rate, [np.nan, 0.1, 0.2])
    np.testing.assert_array_equal(results.decay, [0.5, np.nan, np.nan])
    loss = results.loss.values.ravel()
    assert np.isfinite(loss).all() and len(set(loss)) == 3

    # Titles and styles are stored with the results, so pictures need neither the file nor the row.
    monkeypatch.delitem(LEARNERS, Sign.name)
    figure = plot_tasks(results)
    names = ["Signs", "Plain (learning rate 0.1)", "Plain (learning rate 0.2)"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names
    colors = [line.get_color().upper() for line in figure.axes[0].lines]
    assert colors[0] == looks.BLUE.color and len(set(colors)) == 3

    assert cli.main(["run", "online_permuted", "--methods", "my_package.functions:fails", "--quiet"]) == 2
    assert "RuntimeError: the cat is on the table" in capsys.readouterr().err


@pytest.mark.slow
def test_methods_given_from_python_are_functions_classes_or_strings(own, monkeypatch):
    sys.path.append(str(own))
    from my_package.functions import plain

    seen = []
    given = ("bp:step_size=0.1", plain, functools.partial(plain, learning_rate=0.2), Backprop(step_size=0.2))
    run = functools.partial(online_permuted.run, settings(*given), own / "run")
    results = run(lambda labels, lanes, measures: seen.append((labels, lanes)))
    path = "my_package.functions:plain"
    labels = ["bp(step_size=0.1)", path, f"{path}(learning_rate=0.2)", "bp(step_size=0.2)"]
    assert results.method.values.tolist() == labels and np.isfinite(results.loss).all()
    # Each kind is one program for two methods and two seeds; the function equals backpropagation.
    assert seen == [(f"{labels[0]}, {labels[3]}", 4)] * 2 + [(f"{labels[1]}, {labels[2]}", 4)] * 2
    np.testing.assert_array_equal(results.loss.values[[0, 3]], results.loss.values[[1, 2]])
    # The stored strings define the same methods again.
    texts = json.loads(load_results(own / "run").attrs["settings"])["methods"]
    assert texts == ["bp:step_size=0.1", f"{path}()", f"{path}(learning_rate=0.2)", "bp:step_size=0.2"]
    assert read_methods(texts) == read_methods(given)
    # A finished run is not computed again.
    seen.clear()
    assert run(lambda labels, lanes, measures: seen.append(measures)).identical(results) and not any(seen)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no_package.module:f", "there is no module 'no_package' to import, and no learner of that name"),
        ("my_package.absent:f(a=1)", "there is no module 'my_package.absent' to import"),
        ("my_package.broken:f", "importing my_package.broken failed: No module named 'no_such_thing'"),
        ("my_package.functions:absent", r"module 'my_package.functions' \(.*functions.py\) has no 'absent'"),
        ("my_package.functions:three", "three must be a function that makes a transformation, got 3"),
        ("my_package.functions:number", "must return an optax transformation, with init and update, got 0.1"),
        ("my_package.functions:number_of_units", "must return an optax transformation, with init and update, got 2"),
        ("my_package.functions:fails", "fails: RuntimeError: the cat is on the table"),
        (
            "my_package.functions:plain(rate=0.1)",
            r"expected settings of \['learning_rate', 'nesterov', .*got 'rate'",
        ),
        ("my_package.functions:plain(0.1)", r"settings are given by name, as in \(learning_rate=0.01\), got \(0.1\)"),
        ("my_package.functions:plain(**{})", "settings are given by name"),
        ("my_package.functions:plain(learning_rate=)", "expected settings as in"),
        ("my_package.functions:plain(learning_rate=1 + x)", r"must be a number, .* got 1 \+ x"),
        ("my_package.functions:plain(learning_rate=inf)", "learning_rate must be a finite number"),
        ("my_package.functions:plain(learning_rate=1e999)", "learning_rate must be a finite number"),
        ("my_package.functions:plain(learning_rate=0.1, learning_rate=0.1)", "learning_rate is given twice"),
        (
            "my_package.functions:scaled_by_activity(learning_rate=[0.1])",
            r"must be a number, text or a tuple, got \[0.1\]",
        ),
        ("my_package.functions:plain(learning_rate=fast)", "learning_rate must be a number, got 'fast'"),
        ("my_package.functions:plain(activation=step)", "activation must be .*, got 'step'"),
        ("my_package.functions:scaled_by_activity", "needs a value of learning_rate"),
        ("my_package.functions:scaled_by_activity(learning_rate=0.1, key=3)", "key is given by the run"),
        ("my_package.row:Sign(step_size=-1.0)", r"step_size must be in \[0, inf\), got -1"),
        ("my_package.row:Sign(rate=1.0)", r"expected settings of \['step_size', 'decay', .* got 'rate'"),
        ("my_package.functions:plain(learning_rate=0.1", "the learner must be one of"),
    ],
)
def test_errors_say_what_is_wrong_with_a_path(own, text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_method(text)
    assert str(error.value).startswith(f"method {text!r}: ")


def test_settings_of_a_path():
    method = parse_method('optax:sgd(learning_rate=0.1, momentum=0.9, nesterov=true, activation="tanh")')
    assert method.label == "optax:sgd(learning_rate=0.1, momentum=0.9, nesterov=True, activation=tanh)"
    assert method.hyperparameters == {"learning_rate": 0.1, "momentum": 0.9} and method.network == {
        "activation": "tanh"
    }
    assert method.scheduled == "learning_rate" and parse_method("bp").scheduled == "step_size"
    assert method.options == {"nesterov": True, "accumulator_dtype": None, "activation": "tanh"}
    assert parse_method(method.text) == method == parse_method(method.text.replace("'tanh'", "tanh"))
    whole = parse_method("optax:adam(learning_rate=1, b1=0)")  # an integer is traced in place of a float
    assert whole.options["learning_rate"] == 1 and whole.hyperparameters["b1"] == 0.0
    assert parse_method("cbp_jax.experiments.learners:Backprop(step_size=0.1)") == parse_method("bp:step_size=0.1")


def test_numbers_are_traced_where_the_function_allows(own):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(parse_method("my_package.functions:plain").hyperparameters) == {"learning_rate"}
        needy = parse_method("my_package.functions:needs_python")
    assert needy.hyperparameters == {"learning_rate": 0.1} and needy.options == {"momentum": 0.0}
    with pytest.warns(UserWarning, match=r"of_one_network fails on a small network \("):
        assert parse_method("my_package.functions:of_one_network").hyperparameters == {}
    with pytest.warns(UserWarning, match=r"needs_python needs momentum as Python numbers \(TracerBool"):
        parse_method("my_package.functions:needs_python(momentum=0.9)")


def test_a_function_gets_units_a_key_activations_and_curvature_if_it_asks_for_them(own):
    method = parse_method("my_package.functions:scaled_by_activity(learning_rate=0.5)")
    assert method.hyperparameters == {"learning_rate": 0.5} and not method.curvature
    learner = learners.make_learner([method], (4, 3), "relu", (2,), 2)
    params = learner.init(jax.random.key(0))
    features = {group.name: jnp.full((1, group.size), 0.25) for group in learner.units}

    @jax.jit
    @jax.vmap
    def factor(seed):
        tx = learner.optimizer({"learning_rate": 0.5}, jax.random.key(seed))
        updates, _ = tx.update(params, tx.init(params), params, features=features)
        return updates["params"]["Dense_0"]["kernel"] / params["params"]["Dense_0"]["kernel"]

    seeds = np.arange(2)
    expected = -0.5 * jax.vmap(lambda seed: jax.random.uniform(jax.random.key(seed)))(seeds) / 1.5
    np.testing.assert_allclose(factor(seeds), np.broadcast_to(expected[:, None, None], (2, 2, 4)), rtol=1e-5)
    second = learners.make_learner([parse_method("my_package.functions:of_second_order")], (4,), "relu", (2,), 2)
    assert second.curvature and not learner.curvature


@pytest.mark.parametrize(
    "pair",
    [
        ("bp", "bp:step_size=0.01"),
        ("bp", "bp:momentum=0"),
        ("bp", "bp:activation=relu"),
        ("bp", Backprop()),
        ("cbp:replacement_rate=1e-3", "cbp:replacement_rate=0.001"),
        ("optax:sgd(learning_rate=0.1)", "optax:sgd(learning_rate=0.1, nesterov=false)"),
        ("optax:sgd(learning_rate=0.1)", "optax:sgd(learning_rate=0.1,)"),
    ],
    ids=str,
)
def test_the_same_settings_in_two_spellings_are_refused(pair):
    with pytest.raises(ValueError, match=r"methods must differ, and .* have the same settings"):
        online_permuted.check(settings("adam", *pair))


def test_different_methods_with_the_same_name_are_refused():
    online_permuted.check(settings("bp", "bp:activation=tanh", "l2", "l2:l2=0"))
    pair = ("bp:step_size=0.12345678", "bp:step_size=0.12345679")
    with pytest.raises(ValueError, match=r"'bp:step_size=0.12345678' and .* have the same name in results"):
        online_permuted.check(settings(*pair))
    with pytest.raises(ValueError, match="have the same name in results"):
        read_methods([lambda: optax.sgd(0.1), lambda: cbp_jax.adam(0.1)])


def test_functions_among_the_settings_have_the_same_name_in_every_process():
    method = custom(functools.partial(optax.sgd, optax.constant_schedule(0.1)))
    assert "constant_schedule" in method.text and "0x" not in method.text
    assert method.options["learning_rate"](0) == 0.1


def test_invalid_methods_are_refused():
    for given in ("bp", (), []):
        with pytest.raises(ValueError, match="methods must name at least one of"):
            read_methods(given)
    with pytest.raises(ValueError, match="a method must be a text, a Method, or a function, got 3"):
        read_methods([3])
    with pytest.raises(ValueError, match=r"decay_rate must be in \[0, 1\), got 1"):
        ContinualBackprop(decay_rate=1.0)
    with pytest.raises(ValueError, match="compensate_bias must be true or false, got 1"):
        ContinualBackprop(compensate_bias=1)
    with pytest.raises(ValueError, match=r"max_replacements must be an integer, got 2\.5"):
        ContinualBackprop(max_replacements=2.5)
    with pytest.raises(TypeError, match=r"step_size must be a scalar, got '0\.1'"):
        Backprop(step_size="0.1")


def test_a_function_among_the_settings_is_written_as_its_path():
    """Another process, in which the function has another address, can then resume the run."""
    method = ContinualBackprop(utility=get_utility("weight"))
    assert method.text == "cbp:utility=cbp_jax.replacement.utility:weight" and method.label == "cbp(utility=weight)"
    assert parse_method(method.text).text == method.text
