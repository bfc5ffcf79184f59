"""Complete example programs, one for each framework: they run, learn, and replace units."""

import pathlib
import runpy

import jax
import numpy as np
import pytest

# Cases that are similar to others and take seconds to compile; see conftest.py.
SLOW_CASES = {
    "test_example": ("equinox_model", "haiku_transform", "nnx_optimizer"),
}

EXAMPLES = sorted((pathlib.Path(__file__).parent / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path):
    assert len(path.read_text().splitlines()) <= 40
    ran = runpy.run_path(str(path))
    units, losses, state = ran["units"], ran["losses"], ran["state"]
    state = getattr(state, "opt_state", state)
    assert [group.size for group in units] == [32, 32]
    assert np.isfinite(losses).all() and losses[-1] < 0.7 * losses[0]
    # At a rate of 1/100, for 80 steps after the first units are mature.
    for age in jax.tree.leaves(state.age):
        assert 3 <= np.sum(np.asarray(age) < 100) <= 26
