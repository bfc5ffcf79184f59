import gc
import os
import pathlib
import signal
import sys

import hypothesis
import jax
import pytest
from jax._src import compiler
from jax._src.interpreters import mlir
from jax._src.lib.mlir import ir
from jax.experimental.compilation_cache import compilation_cache

from cbp_jax import cli_compiled

# pytest imports test files by path (`--import-mode=importlib`), so shared helpers need a place on sys.path.
sys.path.insert(0, str(pathlib.Path(__file__).parent))

# A shell starts programs in the background with Ctrl-C ignored, but tests raise it.
signal.signal(signal.SIGINT, signal.default_int_handler)

collect_ignore = ["examples"]  # programs, run by test_examples.py

hypothesis.settings.register_profile(
    "cbp_jax",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("cbp_jax")


# Tests spend most of their time compiling. With CBP_JAX_TESTS_AS_USERS_RUN=1, programs are compiled as for users.
_AS_USERS = os.environ.get("CBP_JAX_TESTS_AS_USERS_RUN") == "1"
_OLDER = "xla_cpu_use_fusion_emitters"
# XLA's older emitters compile two to three times as fast as its default ones, and small programs compile a quarter
# faster in one part than split into up to 32.
_QUICK = {} if _AS_USERS else {_OLDER: False, "xla_cpu_parallel_codegen_split_count": 1}
jax.config.update("jax_disable_most_optimizations", not _AS_USERS)
_options: dict[str, bool | int] = dict(_QUICK)  # XLA's options for the next compilation, also of docstrings' examples


def _with_options(*args, get=compiler.get_compile_options, env_options_overrides=None, **kwargs):
    # JAX has no public setting for the XLA options of all programs.
    given = {**_options, **(env_options_overrides or {})}
    if jax.config.read("jax_disable_most_optimizations"):
        given.pop("xla_backend_optimization_level", None)  # it is the lowest
    older = jax.__version_info__ >= (0, 11) and not given.pop(_OLDER, True)
    options = get(*args, env_options_overrides=given, **kwargs)
    if not older:
        return options
    # Since jax 0.11 this is an entry of a map, `xla_backend_extra_options`, which only a protocol buffer can set.
    entry = _field(1, b"xla_cpu_disable_new_fusion_emitters") + _field(2, b"true")
    debug_options = _field(3, _field(3, _field(500, entry)))
    return type(options).ParseFromString(options.SerializeAsString() + debug_options)


def _field(number, content):
    """Encode a field of a protocol buffer. If a message has a field of messages twice, they are merged."""
    varint = lambda value: bytes([value]) if value < 128 else bytes([value % 128 + 128]) + varint(value // 128)
    return varint(8 * number + 2) + varint(len(content)) + content


compiler.get_compile_options = _with_options


def _shared_contexts(new, uses=200):
    """Return a function that reuses a context of MLIR, since making one takes as long as compiling a small program.

    A context keeps the constants of all its programs, so there is a new one after some uses, and for a program that is
    lowered while another one is.
    """
    shared, used = None, 0

    def context():
        nonlocal shared, used
        try:
            nested = ir.Context.current is not None
        except ValueError:  # in older versions, if there is none
            nested = False
        if nested:
            return new()
        if used % uses == 0:
            shared = new()
        used += 1
        return shared

    return context


if not _AS_USERS:
    mlir.make_ir_context = _shared_contexts(mlir.make_ir_context)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark the parametrized cases as slow that a module lists: `SLOW_CASES = {"test_name": ("case", ...)}`."""
    left = {}
    for item in items:
        name, _, case = item.name.removesuffix("]").partition("[")
        cases = getattr(item.module, "SLOW_CASES", {}).get(name, ()) if hasattr(item, "module") else ()
        if cases:
            unseen = left.setdefault((item.module.__name__, name), set(cases))
            unseen.discard(case)
            if case in cases:
                item.add_marker(pytest.mark.slow)
    if any(left.values()) and len(items) > 100:  # with fewer items, the command line may have selected cases
        raise pytest.UsageError(f"SLOW_CASES names cases that do not exist: {left}")


def pytest_collection_finish():
    """Let the garbage collector look less often, and not at what stays until the end; it took 8% of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch):
    """Keep the command line from writing compiled programs to the user's cache folder."""
    monkeypatch.setattr(cli_compiled, "keep_compiled", lambda: None)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(request):
    """Compile three times as fast; results stay the same within rounding.

    A module whose tests compare or measure fully optimized programs sets `OPTIMIZED = True`.
    """
    quick = not (_AS_USERS or getattr(request.module, "OPTIMIZED", False))
    jax.config.update("jax_disable_most_optimizations", quick)
    if not quick:
        _options.clear()
    yield
    jax.config.update("jax_disable_most_optimizations", not _AS_USERS)
    _options.update(_QUICK)


@pytest.fixture
def exact():
    """Compile as users do, for a test that compares bits: quickly compiled programs round differently on each CPU."""
    before, quick = dict(_options), jax.config.read("jax_disable_most_optimizations")
    _options.clear()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", quick)
    _options.update(before)


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """Cache compiled programs in a folder, for a module whose tests run the same programs several times.

    Yields the environment variables that make other processes use the same cache.
    """
    values = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield {name.upper(): str(value) for name, value in values.items()}
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
