import sys

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


def test_an_image_is_a_sum_of_gratings_in_gaussian_windows_and_noise():
    size, channels, number = 12, 3, 4
    draws = sys.modules["cbp_jax.data.procedural"]  # `cbp_jax.data.procedural` is the function
    class_key, image_key = jax.random.split(jax.random.fold_in(jax.random.key(7), 1))
    change_key, other_key, noise_key = jax.random.split(jax.random.fold_in(image_key, number), 3)
    of_class, others = (
        jax.tree.map(np.float64, jax.device_get(draws._gratings(key, count, channels)))
        for key, count in ((class_key, 6), (other_key, 2))
    )
    changes = np.float64(jax.random.normal(change_key, (6, 7)))
    pixels = 0.2 * np.float64(jax.random.normal(noise_key, (size, size, channels)))
    y, x = np.meshgrid((np.arange(size) + 0.5) / size, (np.arange(size) + 0.5) / size, indexing="ij")
    for gratings, changed in ((of_class, True), (others, False)):
        for i in range(6 if changed else 2):
            grating = {name: values[i] for name, values in gratings.items()}
            if changed:
                grating["row"] += 0.08 * changes[0, 6] + 0.04 * changes[0, i]
                grating["column"] += 0.08 * changes[1, 6] + 0.04 * changes[1, i]
                grating["angle"] += 0.2 * changes[2, i]
                grating["phase"] += 0.6 * changes[3, i]
                grating["color"] = grating["color"] * (np.exp(0.3 * changes[4, i]) if changes[5, i] < 0.8416 else 0)
            right, down = x - grating["column"], y - grating["row"]
            along = right * np.cos(grating["angle"]) + down * np.sin(grating["angle"])
            wave = np.cos(2 * np.pi * grating["frequency"] * along + grating["phase"])
            window = np.exp(-(right**2 + down**2) / (2 * grating["radius"] ** 2))
            pixels += (window * wave)[..., None] * grating["color"]
    expected = np.clip(128 + 50 * pixels, 0, 255)
    found = procedural(2, 5, size=size, channels=channels, key=7).images[5 + number]
    assert np.abs(found - expected).max() < 0.51  # rounded
