import jax
import numpy as np
import PIL.Image
import pytest

from cbp_jax.problems import augment

COUNT, HEIGHT, WIDTH, PADDING = 200, 5, 6, 2


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).normal(size=(HEIGHT, WIDTH, 2)).astype(np.float32)


def many(image, **settings):
    run = jax.jit(lambda key, images: augment(key, images, **settings))
    return np.asarray(run(jax.random.key(0), np.broadcast_to(image, (COUNT, *image.shape))))


def test_flips_and_crops_are_those_of_numpy_each_equally_often(image):
    crops = {}
    for flipped in (False, True):
        whole = np.pad(
            image[:, ::-1] if flipped else image, ((PADDING, PADDING), (PADDING, PADDING), (0, 0)), "reflect"
        )
        for row in range(2 * PADDING + 1):
            for column in range(2 * PADDING + 1):
                crop = whole[row : row + HEIGHT, column : column + WIDTH]
                crops[crop.tobytes()] = flipped, row, column
    drawn = np.array([crops[one.tobytes()] for one in many(image, padding=PADDING, max_rotation=0.0)])
    assert abs(drawn[:, 0].mean() - 0.5) < 0.15
    for axis in (1, 2):
        counts = np.bincount(drawn[:, axis], minlength=5)
        assert len(counts) == 5 and counts.min() > 20 and counts.max() < 65  # about 40 of each
    assert len(np.unique(drawn, axis=0)) > 40


def test_without_flips_and_crops_images_are_unchanged(image):
    np.testing.assert_array_equal(many(image, flip=False, padding=0, max_rotation=0.0)[7], image)


def test_rotations_are_counterclockwise_about_the_center_up_to_the_largest():
    image = np.random.default_rng(1).normal(size=(16, 16)).astype(np.float32)
    turned = many(image[..., None], flip=False, padding=0, max_rotation=30.0)[:, :, :, 0]
    angles = np.linspace(-30, 30, 601)
    rotated = np.stack([PIL.Image.fromarray(image).rotate(angle) for angle in angles])
    best = []
    for one in turned[:40]:
        differing = (np.abs(rotated - one) > 1e-6).mean((1, 2))
        best.append(angles[differing == differing.min()].max())  # a small angle moves no pixel, like the opposite angle
        assert differing.min() < 0.03  # pixels where the grid of angles is rounded differently
    assert min(best) > -0.2 and max(best) < 30.2 and min(best) < 5 and max(best) > 25
    corners = turned[np.arange(COUNT), 0, 0]
    assert (corners == 0).mean() > 0.5 and set(corners) <= {0.0, *image.ravel().tolist()}
