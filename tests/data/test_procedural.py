import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from cbp_jax.data import procedural

CLASSES, IMAGES = 4, 60


@pytest.fixture(scope="module")
def images():
    return procedural(CLASSES, IMAGES, size=12, channels=2)


def test_every_class_has_its_images(images):
    assert images.images.shape == (CLASSES * IMAGES, 12, 12, 2) and images.name == "procedural"
    np.testing.assert_array_equal(images.labels, np.repeat(np.arange(CLASSES), IMAGES))
    assert len(np.unique(images.images.reshape(len(images), -1), axis=0)) == len(images)
    # Images are gray on average, and neither uniform nor saturated.
    assert abs(images.images.mean() - 128) < 5 and 15 < images.images.std() < 60
    assert np.isin(images.images, (0, 255)).mean() < 0.02


def test_pixels_distinguish_classes_and_mean_colors_do_not(images):
    pixels = images.images.reshape(len(images), -1) / 255
    colors = images.images.mean((1, 2)) / 255
    train = np.arange(len(images)) % 3 > 0

    def correct(x):
        x = (x - x[train].mean(0)) / x[train].std(0)
        classifier = LogisticRegression(C=0.01, max_iter=200).fit(x[train], images.labels[train])
        return classifier.score(x[~train], images.labels[~train])

    # Chance is 0.25.
    assert correct(pixels) > 0.6
    assert correct(colors) < 0.4


def test_images_depend_on_the_key_and_each_class_on_its_number(images):
    again = procedural(CLASSES - 1, IMAGES, size=12, channels=2, key=jax.random.key(0))
    np.testing.assert_array_equal(again.images, images.images[: len(again)])
    other = procedural(1, IMAGES, size=12, channels=2, key=1)
    assert np.abs(other.images.mean(0) - images.images[:IMAGES].mean(0)).max() > 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 0}, "num_classes must be an integer of at least 1; got 0"),
        ({"per_class": 2.5}, r"per_class must be an integer of at least 1; got 2\.5"),
        ({"size": 7}, "size must be an integer of at least 8; got 7"),
        ({"channels": True}, "channels must be an integer of at least 1; got True"),
    ],
)
def test_numbers_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        procedural(**{"num_classes": 2, "per_class": 2, "size": 8, "channels": 1, **change})
