"""Datasets by name, and how each is read.

Everything except the digits and a user's own array files is read through tensorflow-datasets. A dataset that has been
prepared once can be read without TensorFlow (the error ``DatasetUnavailable`` says how to prepare it). Decoding 60,000
images takes seconds, so the arrays are cached in an npz file in the directory of the prepared dataset.
"""

import difflib
import importlib
import os
import re
import tempfile
import urllib.parse
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from cbp_jax.data import arrays
from cbp_jax.data.dataset import Dataset, DatasetUnavailable

# Datasets that `prepare` creates from local copies of their official files, and descriptions of these files.
LOCAL_FILES = {
    "mnist": "four IDX files",
    "fashion_mnist": "four IDX files",
    "kmnist": "four IDX files",
    "cifar10": "six binary batch files",
}

# Name, config and version, in the form of tensorflow-datasets.
_NAME = re.compile(r"\w+(/[\w.-]+)?(:\d+\.\d+\.\d+)?")
_CHUNK = 4096  # examples read at a time: several times faster than one by one, and little memory
_CACHE_ERRORS = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)


def names() -> tuple[str, ...]:
    """Return names with which ``load`` is tested. It accepts any image classification dataset of tensorflow-datasets.

    >>> names()
    ('digits', 'mnist', 'fashion_mnist', 'kmnist', 'cifar10', 'cifar100', 'emnist/balanced')
    """
    return ("digits", *LOCAL_FILES, "cifar100", "emnist/balanced")


def load(name: str | os.PathLike, split: str = "train", *, data_dir: str | os.PathLike | None = None) -> Dataset:
    """Load one split of a dataset into memory; never downloads.

    Args:
      name: "digits" (scikit-learn's 1,797 images of 8 x 8 pixels, which need no files and have the split
        "train" only); an image classification dataset of tensorflow-datasets: "mnist", "fashion_mnist",
        "emnist/balanced", "cifar100:3.0.2", ... with features "image" (of one size) and "label"; or the path of
        a file of your own arrays that ends in .npz or .npy.
      split: "train", "test", or, of tensorflow-datasets, a slice such as "train[:5000]" or "test[50%:]".
      data_dir: where tensorflow-datasets keeps its datasets; by default ``$TFDS_DATA_DIR`` or
        ``~/tensorflow_datasets``.

    Returns:
      The split, in storage order.

    Raises:
      DatasetUnavailable: if the dataset is known but not prepared in ``data_dir``; the message says how to prepare it.
      ValueError: if the dataset or the split is unknown, or it does not hold labeled images of one size.
      FileNotFoundError: if there is no such file.
      ImportError: if the extra ``cbp-jax[data]`` is not installed.

    A file of arrays holds images or features and their labels, under these names:

    - "image", "images", "x", "features" or "data": uint8 [n, height, width] or [n, height, width, channels], with
      values up to 255, or floats [n, features];
    - "label", "labels", "y", "target" or "targets": integers [n] from 0 on;
    - optionally "label_names" or "class_names": [classes], which gives the number of classes. Without it, the number
      follows from the largest label of the split.

    They form the split "train"; or each split has its own arrays, "x_train", "y_train", "x_test" and so on. In an npy
    file with one structured array, these are its fields. The dataset's name is the file's name without extension.

    >>> load("digits")
    Dataset(digits: 1797 images of 8x8x1, 10 classes)
    """
    name = os.fspath(name)
    if name.endswith(arrays.ENDINGS):
        return arrays.load_arrays(Path(name).expanduser(), split)
    if name == "digits":
        return _load_digits(split)
    builder = find_builder(name, data_dir)
    _require_labeled_images(builder, name)
    require_readable(builder, name)
    cache = Path(builder.data_dir) / f"cbp_jax.{urllib.parse.quote(split, safe='')}.npz"
    stored = _read_cache(cache)
    if stored is None:
        stored = _read_split(builder, name, split)
        _write_cache(cache, stored)
    return Dataset(stored["images"], stored["labels"], int(stored["num_classes"]), name)


def require(module: str, purpose: str) -> ModuleType:
    """Import a module of the extra ``data``, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'{purpose} needs {module.split(".")[0]}, which cannot be imported: pip install "cbp-jax[data]"'
        ) from error


def find_builder(name: str, data_dir: str | os.PathLike | None) -> Any:
    """Return the tensorflow-datasets builder of that name, prepared or not."""
    tfds = require("tensorflow_datasets", f"dataset {name!r}")
    known = (
        f"known are {', '.join(names())}, and the image classification datasets of tensorflow-datasets; "
        "the path of a file of arrays must end in .npz or .npy"
    )
    if _NAME.fullmatch(name) is None:  # such as "huggingface:mnist", which would use the network
        raise ValueError(f"unknown dataset {name!r}; {known}")
    try:
        return tfds.builder(name, data_dir=None if data_dir is None else os.path.expanduser(data_dir))
    except tfds.core.registered.DatasetNotFoundError as error:
        candidates = {*names(), *tfds.list_builders(with_community_datasets=False)}
        near = difflib.get_close_matches(name, candidates)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise ValueError(f"unknown dataset {name!r}{hint}; {known}") from error
    except (AssertionError, ValueError) as error:  # a config or a version that the dataset does not have
        configs = list(tfds.builder_cls(re.split("[/:]", name)[0]).builder_configs)
        hint = f"; its configs are {', '.join(configs)}" if configs else ""
        raise ValueError(f"unknown config or version of dataset {name!r}{hint} ({error})") from error


def require_readable(builder: Any, name: str, embedded: str = "'digits', which comes with scikit-learn") -> None:
    """Raise DatasetUnavailable unless the dataset is prepared in a format with random access."""
    if not os.path.isdir(builder.data_dir) or not builder.is_prepared():
        raise DatasetUnavailable(_ways_out(builder, name, "is not prepared", embedded))
    tfds = require("tensorflow_datasets", f"dataset {name!r}")
    readable = tfds.core.FileFormat.with_random_access()
    if readable.isdisjoint(builder.info.available_file_formats()):
        file_format = builder.info.file_format.value
        reason = f"is prepared as {file_format}, which only TensorFlow reads (delete it or look elsewhere),"
        raise DatasetUnavailable(_ways_out(builder, name, reason, embedded))


def _ways_out(builder: Any, name: str, reason: str, embedded: str) -> str:
    root = os.fspath(builder.data_dir_root)
    call = f"tfds.builder({name!r}, data_dir={root!r}, file_format='array_record').download_and_prepare()"
    ways = [
        'download and prepare it once, with TensorFlow (pip install "cbp-jax[prepare]"):\n'
        f'       python -c "import tensorflow_datasets as tfds; {call}"',
        "name the directory that holds it: data_dir=..., or the environment variable TFDS_DATA_DIR",
        f"use the dataset {embedded}",
    ]
    if builder.name in LOCAL_FILES:
        files = LOCAL_FILES[builder.name]
        local = f"prepare it from copies of its {files}, without TensorFlow and without network:\n"
        ways.insert(1, f"{local}       cbp-jax data prepare {name} --from DIR")
    listed = "\n".join(f"  {i}. {way}" for i, way in enumerate(ways, start=1))
    where = f"{reason} in {builder.data_dir}, and nothing is downloaded unasked"
    return f"dataset {name!r} {where}. Either\n{listed}"


def _require_labeled_images(builder: Any, name: str) -> None:
    tfds = require("tensorflow_datasets", f"dataset {name!r}")
    features = dict(builder.info.features or {})
    image, label = features.get("image"), features.get("label")
    if not isinstance(image, tfds.features.Image) or not isinstance(label, tfds.features.ClassLabel):
        raise ValueError(f"dataset {name!r} must have labeled images: its features are {sorted(features)}")
    if None in image.shape or image.np_dtype != np.uint8:
        got = f"{np.dtype(image.np_dtype)} {image.shape}"
        raise ValueError(f"dataset {name!r} must have uint8 images of one size; got {got} (None: varies)")


def _read_split(builder: Any, name: str, split: str) -> dict[str, np.ndarray]:
    """Decode a split into arrays images, labels and num_classes."""
    require("PIL.Image", "decoding images")
    try:
        source = builder.as_data_source(split)
    except (KeyError, ValueError) as error:
        known = sorted(builder.info.splits)
        raise ValueError(f"unknown split {split!r} of dataset {name!r}; it has {known}") from error

    features = builder.info.features
    images = np.empty((len(source), *features["image"].shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    for start in range(0, len(source), _CHUNK):
        stop = min(start + _CHUNK, len(source))
        examples = source.__getitems__(range(start, stop))
        images[start:stop] = [example["image"] for example in examples]
        labels[start:stop] = [example["label"] for example in examples]
    return {"images": images, "labels": labels, "num_classes": np.asarray(features["label"].num_classes)}


def _read_cache(path: Path) -> dict[str, np.ndarray] | None:
    try:
        with np.load(path) as stored:
            return {key: stored[key] for key in ("images", "labels", "num_classes")}
    except _CACHE_ERRORS:  # absent, or damaged: read the dataset itself
        return None


def _write_cache(path: Path, stored: dict[str, np.ndarray]) -> None:
    """Write the file atomically. If the directory is not writable, the data is decoded again next time."""
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = file.name
            np.savez(file, **stored)
        os.chmod(temporary, 0o644)  # temporary files are private, and datasets are shared
        os.replace(temporary, path)
    except OSError:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def _load_digits(split: str) -> Dataset:
    if split != "train":
        raise ValueError(f"unknown split {split!r} of dataset 'digits'; it has ['train']")
    digits = require("sklearn.datasets", "dataset 'digits'").load_digits()
    images = digits.images.astype(np.uint8)[..., None]
    return Dataset(images, digits.target.astype(np.int32), num_classes=10, name="digits", max_value=16)
