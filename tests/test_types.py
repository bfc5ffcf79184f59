"""The public surface as a type checker sees it. The configuration is in pyproject.toml."""

import pathlib
import subprocess
import sys

import pytest

import cbp_jax

ROOT = pathlib.Path(__file__).parents[1]
USE = ROOT / "tests" / "typed" / "use.py"


def check(*files):
    pytest.importorskip("mypy", reason="types are checked where the lint extra is installed")
    command = [sys.executable, "-m", "mypy", "--cache-dir", "/dev/null", *map(str, files)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_package_is_marked_as_typed():
    assert (pathlib.Path(cbp_jax.__file__).parent / "py.typed").read_text() == ""


@pytest.mark.slow
def test_the_package_and_a_users_program_have_consistent_types():
    done = check()
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_wrong_types_are_found(tmp_path):
    """Otherwise the test above could pass because everything is `Any`."""
    program = tmp_path / "wrong.py"
    program.write_text(
        USE.read_text()
        + "\n\ndef wrong(units: cbp_jax.Units) -> None:\n"
        + "    cbp_jax.upgd()\n"
        + '    cbp_jax.upgd(0.1, scope="galactic")\n'
        + "    cbp_jax.continual_backprop(optax.sgd(0.1), units, replacement_rat=0.1)\n"
        + "    units[0].nam\n"
    )
    found = check(program).stdout
    last = len(USE.read_text().splitlines())
    for line, words in enumerate(("learning_rate", "scope", "replacement_rat", "nam"), start=last + 4):
        assert any(f":{line}: error" in each and words in each for each in found.splitlines()), found
