import pathlib
import sys

import hypothesis
import jax
import pytest

# pytest imports test files by path (`--import-mode=importlib`), so shared helpers need a place on sys.path.
sys.path.insert(0, str(pathlib.Path(__file__).parent))

hypothesis.settings.register_profile(
    "cbp_jax",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("cbp_jax")


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(request):
    """Halves the time of compiling; what is computed stays the same within rounding.

    A module whose tests are about what the optimised program computes says `OPTIMIZED = True`.
    """
    quick = not getattr(request.module, "OPTIMIZED", False)
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
