"""The recipes of CONTRIBUTING.md, followed literally in a user's package."""

import importlib.util
import pathlib
import re
import shlex
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cbp_jax
from cbp_jax import cli, load_results

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
FILES = dict(re.findall(r"<!-- file: (\S+) -->\n```python\n(.*?)```", TEXT, re.DOTALL))
COMMANDS = dict(re.findall(r"<!-- command: (\w+) -->\n```sh\n(.*?)```", TEXT, re.DOTALL))
SMALL = "--seeds 1 --tasks 1 --examples-per-task 40 --measured-examples 10 --quiet --out".split()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write the files of the recipes into the working folder."""
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


def test_every_recipe_has_a_command():
    assert len(FILES) == len(COMMANDS) == TEXT.count("## Recipe: ")


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=[] if name == "algorithm" else [pytest.mark.slow]) for name in COMMANDS]
)
def test_command(recipe, package):
    program, *words = shlex.split(COMMANDS[recipe])
    assert program == "cbp-jax"
    hidden = [] if recipe == "network" else ["--hidden", "5"]
    assert cli.main([*words, *hidden, *SMALL, str(package / "run")]) == 0
    results = load_results(package / "run")
    assert np.isfinite(results.loss).all()
    if recipe in ("algorithm", "utility"):
        assert any("my_package" in method for method in results.method.values)


def test_the_row_of_the_recipe(package):
    """The algorithm passes the tests of the common table."""
    from my_package.sign_momentum import sign_momentum

    spec = importlib.util.spec_from_file_location("test_common", ROOT / "tests" / "transforms" / "test_common.py")
    common = importlib.util.module_from_spec(spec)
    sys.modules["test_common"] = common  # dataclasses look up their module by name
    spec.loader.exec_module(common)
    (text,) = re.findall(r"<!-- row -->\n```python\n(.*?)```", TEXT, re.DOTALL)
    row = eval(text, {"Row": common.Row, "sign_momentum": sign_momentum})
    common.test_every_hyperparameter_matters(row)
    common.test_in_a_chain(row)
    common.test_types_are_stable(row, jnp.bfloat16)
    common.test_second_call_does_not_retrace(row)
    common.test_checkpoint(row, "flax", package)


def test_utility_is_of_gradients(package):
    from my_package.gradient_utility import cbp_by_gradient

    params = {"w1": jnp.ones((4, 8)), "w2": jnp.ones((8, 2))}
    units = cbp_jax.discover_units(lambda p, x: jax.nn.relu(x @ p["w1"]) @ p["w2"], params, jnp.ones((1, 4)))
    tx = cbp_by_gradient(replacement_rate=1.0, units=units, key=0)
    state = tx.init(params)._replace(age={"w1": jnp.full(8, 200)})
    grads = {"w1": jnp.ones((4, 8)).at[:, 6].set(0.0), "w2": jnp.ones((8, 2))}
    _, state = jax.jit(tx.update)(grads, state, params, features={"w1": jnp.ones((5, 8))})
    assert state.replaced["w1"].tolist() == [unit == 6 for unit in range(8)]


def test_units_of_the_network(package):
    from my_package.gated import Gated

    net = Gated(3, width=8)
    params = jax.eval_shape(net.init, jax.random.key(0), jnp.ones((1, 5)))
    units = cbp_jax.discover_units(net.apply, params, jnp.ones((1, 5)))
    assert [(group.size, len(group.incoming), len(group.outgoing)) for group in units] == [(8, 2, 2), (8, 2, 1)]
