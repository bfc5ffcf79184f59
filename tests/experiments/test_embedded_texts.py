"""Both experiments on texts with the texts that every installation has, in one file, so that they are parsed once."""

import numpy as np
import pytest

from cbp_jax.experiments import continual_lora, dominant_tickets
from cbp_jax.experiments.adapter_methods import read_methods

pytestmark = pytest.mark.slow

TASKS = ["docstrings/library", "docstrings/kind"]


def test_dominant_tickets_at_smoke_size(tmp_path):
    settings = dominant_tickets.preset("smoke")
    results = dominant_tickets.run(settings, tmp_path)
    assert results.name.values.tolist() == TASKS and results.sizes["seed"] == settings.seeds
    tuned = results.ticket_accuracy.values[1:]  # the first method is the probe
    assert np.isfinite(results.accuracy).all() and np.isfinite(tuned).all()


def test_continual_lora_at_smoke_size(tmp_path):
    settings = continual_lora.preset("smoke")
    results = continual_lora.run(settings, tmp_path)
    assert results.sequence.values.tolist() == [TASKS, TASKS[::-1]]
    assert results.method.values.tolist() == list(read_methods(settings.methods))
    measured = np.broadcast_to(np.tri(2, dtype=bool), results.accuracy.shape)
    np.testing.assert_array_equal(np.isfinite(results.accuracy), measured)
    assert np.isfinite(results.loss).all() and (results.accuracy.values[measured] > 0).any()
