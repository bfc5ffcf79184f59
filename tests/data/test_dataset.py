import dataclasses

import numpy as np
import pytest

from cbp_jax.data import Dataset

GOOD = Dataset(np.full((3, 2, 4, 1), 16, np.uint8), np.array([0, 2, 1], np.int32), 3, "small", max_value=16)


def test_length_and_shape():
    assert len(GOOD) == 3
    assert GOOD.image_shape == (2, 4, 1)


def test_features():
    features = Dataset(np.full((3, 8), -1e38, np.float32), GOOD.labels, 3, "vectors")
    assert (len(features), features.image_shape, features.has_features) == (3, (8,), True)
    assert not GOOD.has_features


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("images", np.zeros((3, 2, 4, 1), np.float32), "images must be uint8"),
        ("images", np.zeros((3, 8), np.uint8), "images must be uint8"),
        ("images", np.zeros((3, 8)), r"or float32 \[n, features\], .* got float64 \[3, 8\]"),
        ("images", np.zeros((0, 8), np.float32), "not empty"),
        ("images", np.full((3, 8), np.nan, np.float32), "must be finite"),
        ("images", np.array([[1], [np.inf], [-np.inf]], np.float32), "must be finite"),
        ("images", np.zeros((0, 2, 4, 1), np.uint8), "not empty"),
        ("labels", np.zeros(3, np.int64), r"labels must be int32 \[3\]"),
        ("labels", np.zeros(2, np.int32), r"labels must be int32 \[3\]"),
        ("labels", np.array([0, 3, 1], np.int32), "from 0 to num_classes - 1 = 2; got 0 to 3"),
        ("labels", np.array([0, -1, 1], np.int32), "from 0 to num_classes - 1 = 2; got -1 to 1"),
        ("max_value", 15, "must not exceed max_value = 15; got 16"),
    ],
)
def test_bad_arrays_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(GOOD, **{field: value})
