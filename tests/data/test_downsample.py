import numpy as np
import pytest

from cbp_jax.data import Dataset, downsample


@pytest.fixture
def images():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 2), dtype=np.uint8)
    return Dataset(pixels, np.array([0, 1, 1], np.int32), 2, "toy")


def test_a_pixel_is_the_rounded_mean_of_its_square(images):
    small = downsample(images, 2)
    assert (small.image_shape, small.num_classes, small.name) == ((2, 3, 2), 2, "toy")
    np.testing.assert_array_equal(small.labels, images.labels)
    for row in range(2):
        for column in range(3):
            square = images.images[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].astype(float)
            np.testing.assert_array_equal(small.images[:, row, column], np.rint(square.mean((1, 2))))


def test_a_factor_of_one_changes_nothing(images):
    assert downsample(images, 1) is images


@pytest.mark.parametrize("factor", [0, -2, 3, 4, 2.0])
def test_other_factors_are_refused(images, factor):
    with pytest.raises(ValueError, match=rf"factor must be an integer that divides 4 and 6; got {factor}"):
        downsample(images, factor)


def test_features_cannot_be_downsampled():
    features = Dataset(np.zeros((2, 4), np.float32), np.zeros(2, np.int32), 1, "vectors")
    with pytest.raises(ValueError, match="dataset 'vectors' must hold images to be made smaller; it holds features"):
        downsample(features, 2)
