import numpy as np
import pytest

from cbp_jax.data import Dataset, normalization

LABELS = np.zeros(2, np.int32)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mnist", (0.1307, 0.3081)),
        ("mnist:3.0.1", (0.1307, 0.3081)),
        ("fashion_mnist", (0.5, 0.5)),
        ("emnist/mnist", (0.5, 0.5)),
        ("cifar10", (0.5, 0.5)),
    ],
)
def test_images(name, expected):
    assert normalization(Dataset(np.zeros((2, 4, 4, 1), np.uint8), LABELS, 2, name)) == expected


def test_features_stay_as_they_are():
    assert normalization(Dataset(np.zeros((2, 4), np.float32), LABELS, 2, "mnist")) is None


def test_mnist_has_these_statistics(real_data):
    import gzip

    content = gzip.decompress((real_data / "mnist" / "train-images-idx3-ubyte.gz").read_bytes())
    pixels = np.frombuffer(content, np.uint8, offset=16) / np.float32(255)
    assert (round(float(pixels.mean()), 4), round(float(pixels.std()), 4)) == (0.1307, 0.3081)
