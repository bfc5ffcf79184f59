import numpy as np
import pytest

from cbp_jax.data import Dataset, normalization

LABELS = np.zeros(2, np.int32)


@pytest.mark.parametrize("name", ["mnist", "mnist:3.0.1", "fashion_mnist", "emnist/balanced", "cifar10"])
def test_all_images_are_normalized_alike(name):
    # Not MNIST's own 0.1307 and 0.3081: the public code uses 0.5 and 0.5 for all images.
    assert normalization(Dataset(np.zeros((2, 4, 4, 1), np.uint8), LABELS, 2, name)) == (0.5, 0.5)


def test_features_are_not_normalized():
    assert normalization(Dataset(np.zeros((2, 4), np.float32), LABELS, 2, "mnist")) is None
