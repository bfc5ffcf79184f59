import pathlib
import sys

import hypothesis

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
