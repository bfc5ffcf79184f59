"""Smaller images, for smaller networks."""

import dataclasses
import itertools

import numpy as np

from cbp_jax.data.dataset import Dataset


def downsample(dataset: Dataset, factor: int) -> Dataset:
    """Make images smaller: each pixel is the mean of a square of original pixels.

    Args:
      dataset: images.
      factor: height and width of a square, which must divide those of the images; 1 changes nothing.

    Returns:
      a `Dataset` with the same labels and name, and rounded values.

    Raises:
      ValueError: the factor is not an integer of at least 1 that divides the images' height and width, or the dataset
        holds features.

    Example:
      >>> from cbp_jax.data import load
      >>> downsample(load("digits"), 2)
      Dataset(digits: 1797 images of 4x4x1, 10 classes)
    """
    if isinstance(factor, int) and factor == 1:
        return dataset
    if dataset.has_features:
        raise ValueError(f"dataset {dataset.name!r} must hold images to be made smaller; it holds features")
    height, width, _ = dataset.image_shape
    if not isinstance(factor, int | np.integer) or factor < 1 or height % factor or width % factor:
        raise ValueError(f"factor must be an integer that divides {height} and {width}; got {factor!r}")
    offsets = itertools.product(range(factor), repeat=2)
    sums = sum(dataset.images[:, row::factor, column::factor].astype(np.uint32) for row, column in offsets)
    means = sums / factor**2
    return dataclasses.replace(dataset, images=np.rint(means).astype(np.uint8))
