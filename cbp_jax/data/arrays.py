"""Datasets from a user's own array files."""

import zipfile
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from cbp_jax.data.dataset import Dataset

ENDINGS = (".npz", ".npy")

_INPUTS = ("image", "images", "x", "features", "data")
_LABELS = ("label", "labels", "y", "target", "targets")
_CLASSES = ("label_names", "class_names")
_MOST_CLASSES = 100_000  # for labels without names, a larger label is taken for a mistake
_DAMAGES = (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error)


def load_arrays(path: Path, split: str) -> Dataset:
    """Read one split of a file of arrays; ``load`` says what the file holds.

    Args:
      path: a file that ends in .npz or .npy.
      split: "train" or "test".

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file does not hold what it should, or is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} to load a dataset from")
    try:
        stored = np.load(path, allow_pickle=False)
    except _DAMAGES as error:
        raise ValueError(f"{path} is not a file of arrays that numpy.savez or numpy.save wrote: {error}") from error
    if isinstance(stored, np.ndarray):
        return _dataset(path, stored, stored.dtype.names or (), split)
    with stored:
        return _dataset(path, stored, stored.files, split)


def _dataset(path: Path, stored: Mapping[str, np.ndarray], names: Collection[str], split: str) -> Dataset:
    found = {}
    for role, known in (("images or features", _INPUTS), ("labels", _LABELS)):
        wanted = [f"{name}_{split}" for name in known] + (list(known) if split == "train" else [])
        present = [name for name in wanted if name in names]
        if len(present) != 1:
            raise ValueError(
                f"{path} must hold exactly one array of {role} of the split {split!r}, one of {', '.join(wanted)} "
                f"(numpy.savez writes such files); it holds {', '.join(sorted(names)) or 'one array without a name'}"
            )
        found[role] = present[0], _read(path, stored, present[0])
    images = _images(path, *found["images or features"])
    labels = _labels(path, *found["labels"], len(images))
    named = [name for name in _CLASSES if name in names]
    num_classes = len(_read(path, stored, named[-1])) if named else int(labels.max()) + 1
    if num_classes > _MOST_CLASSES and not named:
        raise ValueError(
            f"{found['labels'][0]} of {path} must be below {_MOST_CLASSES} where no label_names says how many classes "
            f"there are; got {labels.max()}"
        )
    if labels.max() >= num_classes:
        raise ValueError(
            f"{found['labels'][0]} of {path} must be from 0 to num_classes - 1 = {num_classes - 1}; "
            f"got {labels.min()} to {labels.max()}"
        )
    return Dataset(images, labels.astype(np.int32, copy=False), num_classes, path.stem)


def _read(path: Path, stored: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    try:
        return stored[name]
    except _DAMAGES as error:
        raise ValueError(f"{path} is damaged: its array {name!r} cannot be read ({error})") from error


def _images(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    if array.size and array.dtype == np.uint8 and array.ndim in (3, 4):
        return array if array.ndim == 4 else array[..., None]
    if array.size and np.issubdtype(array.dtype, np.floating) and array.ndim == 2:
        return array.astype(np.float32, copy=False)
    raise ValueError(
        f"{name} of {path} must be uint8 [n, height, width] or [n, height, width, channels], or floats [n, features], "
        f"and not empty; got {array.dtype} {list(array.shape)}"
    )


def _labels(path: Path, name: str, array: np.ndarray, count: int) -> np.ndarray:
    if array.shape != (count,) or not np.issubdtype(array.dtype, np.integer) or array.min() < 0:
        lowest = f" from {array.min()} on" if array.size and np.issubdtype(array.dtype, np.number) else ""
        raise ValueError(
            f"{name} of {path} must be integers [{count}] from 0 on; got {array.dtype} {list(array.shape)}{lowest}"
        )
    return array
