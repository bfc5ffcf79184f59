"""The wheel and the sdist, built and installed as by users."""

import email
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile

import pytest

import cbp_jax

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# One update of continual backpropagation and one of UPGD, with only the core dependencies.
PROGRAM = """
import importlib.metadata, sys
import jax, jax.numpy as jnp, optax
import cbp_jax

assert "site-packages" in cbp_jax.__file__, cbp_jax.__file__
assert importlib.metadata.version("cbp-jax") == cbp_jax.__version__
def apply_fn(params, x):
    return jax.nn.relu(x @ params["w1"]) @ params["w2"]
params, x = {"w1": jnp.ones((4, 8)), "w2": jnp.ones((8, 2))}, jnp.ones((5, 4))
units = cbp_jax.discover_units(apply_fn, params, x)
tx = cbp_jax.continual_backprop(cbp_jax.upgd(0.1), units, replacement_rate=1.0, maturity_threshold=0)
_, features = cbp_jax.with_features(apply_fn, units)(params, x)
updates, state = tx.update(params, tx.init(params), params, features=features)
assert state.replaced["w1"].all() and not optax.apply_updates(params, updates)["w2"].any()
missing = [name for name in ("xarray", "matplotlib", "tyro", "brax") if name in sys.modules]
assert not missing, missing
print("updated")
"""


# Commands in the new environment do not see this one.
CLEAN = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}


def run(*command, **kwargs):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=280, **kwargs)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build a wheel and an sdist of the files of this checkout that git tracks."""
    pytest.importorskip("build", reason="distributions are built where the release extra is installed")
    pytest.importorskip("hatchling", reason="distributions are built where the release extra is installed")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    code, files = run("git", "ls-files", "-z", cwd=ROOT)
    if code:
        pytest.skip("not a git checkout")
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    # The installed build backend is used, so nothing is downloaded. The wheel is built from the sdist.
    code, printed = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source)
    assert code == 0, printed
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def tracked(folder):
    _, files = run("git", "ls-files", "-z", folder, cwd=ROOT)
    return {name for name in files.split("\0") if name and (ROOT / name).is_file()}


def test_the_version_comes_from_one_place():
    assert "version" in PROJECT["project"]["dynamic"] and "version" not in PROJECT["project"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "cbp_jax/__init__.py"
    assert re.search(rf"^version: {re.escape(cbp_jax.__version__)}$", (ROOT / "CITATION.cff").read_text(), re.M)


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    of_package = {name for name in names if ".dist-info/" not in name}
    assert of_package == tracked("cbp_jax")
    assert "cbp_jax/py.typed" in of_package
    assert {name.partition("/")[2] for name in names - of_package} >= {"METADATA", "licenses/LICENSE"}


@pytest.mark.slow
def test_the_sdist_holds_what_a_packager_needs(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "cbp_jax/py.typed", "PKG-INFO"}
    assert names >= tracked("cbp_jax") | tracked("tests")


@pytest.mark.slow
def test_metadata_names_version_and_extras(built):
    found = metadata(built[0])
    assert found["Version"] == cbp_jax.__version__
    assert set(found.get_all("Provides-Extra")) == set(PROJECT["project"]["optional-dependencies"])
    assert found["Requires-Python"] == PROJECT["project"]["requires-python"]
    core = [line for line in found.get_all("Requires-Dist") if "extra ==" not in line]
    assert {re.match(r"[\w-]+", line)[0] for line in core} == {"jax", "flax", "optax", "chex"}


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """Return the Python of a new environment with the wheel and the core dependencies."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    code, printed = run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", built[0], env=CLEAN)
    if code:
        pytest.skip(f"the core's dependencies cannot be installed here: {printed[-300:]}")
    return python


@pytest.mark.slow
def test_the_core_dependencies_suffice_for_an_update(installed, tmp_path):
    code, printed = run(installed, "-c", PROGRAM, cwd=tmp_path, env=CLEAN)
    assert code == 0 and printed.endswith("updated\n"), printed


@pytest.mark.slow
def test_the_extras_are_compatible(built, installed):
    """The requirements of the extras exist and are compatible with the core. They are not installed.

    `text`, `prepare` and `pytorch` are left out, because pip would download PyTorch and TensorFlow for their metadata.
    """
    extras = sorted(set(PROJECT["project"]["optional-dependencies"]) - {"text", "prepare", "pytorch"})
    wanted = f"{built[0]}[{','.join(extras)}]"
    code, printed = run(
        *(installed, "-m", "pip", "install", "--dry-run", "-q", "-c", ROOT / "constraints.txt", wanted), env=CLEAN
    )
    if re.search("NewConnectionError|ReadTimeoutError|getaddrinfo|name resolution", printed):
        pytest.skip(f"no package index can be reached: {printed[-300:]}")
    assert code == 0, printed
