"""MNIST and its relatives from their IDX files."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

_SPLITS = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
FILES = tuple(file for files in _SPLITS.values() for file in files)
LABEL_NAMES = None  # those of the official builder


def read(contents: Mapping[str, tuple[Path, bytes]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Decode and check the four files.

    Args:
      contents: for each of `FILES`, its path and its content.

    Returns:
      images uint8 [n, 28, 28] and labels uint8 [n] of each split.

    Raises:
      ValueError: if a file does not hold what its name says.
    """
    splits = {}
    for split, (images_file, labels_file) in _SPLITS.items():
        images, labels = _decode(*contents[images_file], ndim=3), _decode(*contents[labels_file], ndim=1)
        images_path, labels_path = contents[images_file][0], contents[labels_file][0]
        if images.shape[1:] != (28, 28):
            raise ValueError(f"{images_path} must hold images of 28 x 28 pixels; got {images.shape[1:]}")
        if len(images) == 0 or len(images) != len(labels):
            raise ValueError(
                f"{images_path} and {labels_path} must hold a label for each image, and some; "
                f"got {len(images)} images and {len(labels)} labels"
            )
        if labels.max() > 9:
            raise ValueError(f"{labels_path} must hold labels from 0 to 9; got {labels.max()}")
        splits[split] = images, labels
    return splits


def _decode(path: Path, content: bytes, ndim: int) -> np.ndarray:
    """Read an IDX file of bytes: 0, 0, 8 (their type), number of axes, its big-endian lengths, the data."""
    magic, start = bytes((0, 0, 8, ndim)), 4 + 4 * ndim
    if content[:4] != magic or len(content) < start:
        raise ValueError(
            f"{path} must be an IDX file of bytes with {ndim} axes, which starts with {magic.hex()}; "
            f"it starts with {content[:4].hex() or 'nothing'}"
        )
    shape = tuple(int(length) for length in np.frombuffer(content[4:start], ">u4"))
    if len(content) != start + math.prod(shape):
        raise ValueError(
            f"{path} must be {start} bytes of header, then data of shape {shape}; it has {len(content)} bytes in total"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
