"""Both experiments on texts with the texts that every installation has, in one file, so that they are parsed once."""

import dataclasses

import numpy as np

from cbp_jax.experiments import continual_lora, dominant_tickets

# The presets, with fewer programs to compile and fewer updates.
LESS = {"seeds": 1, "steps": 2, "depth": 1}


def test_dominant_tickets_at_smoke_size(tmp_path):
    changes = {**LESS, "strengths": (0.3,), "densities": (0.1,), "retrained": (), "dimensions": (1,)}
    results = dominant_tickets.run(dataclasses.replace(dominant_tickets.preset("smoke"), **changes), tmp_path)
    assert results.name.values.tolist() == ["docstrings/library", "docstrings/kind"]
    assert np.isfinite(results.accuracy).all() and np.isfinite(results.ticket_accuracy.loc[{"method": "l1=0.3"}]).all()


def test_continual_lora_at_smoke_size(tmp_path):
    changes = {**LESS, "orders": 1, "methods": ("added_l1:l1=1e-3,head=shared",)}
    results = continual_lora.run(dataclasses.replace(continual_lora.preset("smoke"), **changes), tmp_path)
    assert results.sequence.values.tolist() == [["docstrings/library", "docstrings/kind"]]
    assert np.isfinite(results.loss).all() and (results.accuracy.values[np.isfinite(results.accuracy)] > 0).any()
