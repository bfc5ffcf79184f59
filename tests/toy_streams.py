"""A tiny stream of tasks for quick training."""

import numpy as np

from cbp_jax.data import Dataset
from cbp_jax.problems import label_permuted


def tiny_problem():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 2, 3, 1), dtype=np.uint8)
    labels = rng.integers(0, 3, 30).astype(np.int32)
    return label_permuted(Dataset(images, labels, 3, "toy"), examples_per_task=12, batch_size=2)
