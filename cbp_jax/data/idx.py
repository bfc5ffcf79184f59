"""Preparing MNIST and its relatives from local IDX files, without TensorFlow and without network."""

import gzip
import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cbp_jax.data.sources import IDX_NAMES, require, require_readable

_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def prepare(name: str, source: str | os.PathLike, data_dir: str | os.PathLike | None = None) -> Path:
    """Makes a tensorflow-datasets dataset from local IDX files.

    The official builder writes it, with only its reading of the files replaced, so the result is what it
    would have made from its own download, and any program that uses tensorflow-datasets can read it.

    Args:
      name: "mnist", "fashion_mnist" or "kmnist".
      source: directory with the four files train-images-idx3-ubyte, train-labels-idx1-ubyte,
        t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, each as it is or gzipped (.gz).
      data_dir: where tensorflow-datasets keeps its datasets; by default ``$TFDS_DATA_DIR`` or
        ``~/tensorflow_datasets``.

    Returns:
      The directory of the prepared dataset. One that was prepared before is left as it is; delete it to
      prepare anew.

    Raises:
      ValueError: if the name is not one of these, or a file is not what its name says.
      FileNotFoundError: if a file is missing; lists those that are.
      ImportError: if the extra ``cbp-jax[data]`` is not installed.
      DatasetUnavailable: if it was prepared before in a format that only TensorFlow reads.
      FileExistsError: if the directory of the dataset is there but holds no dataset.

    For example ``prepare("mnist", "downloads/mnist")``, and then ``load("mnist")``.
    """
    if name not in IDX_NAMES:
        raise ValueError(f"name must be one of {', '.join(IDX_NAMES)}, which come as IDX files; got {name!r}")
    tfds = require("tensorflow_datasets", f"dataset {name!r}")
    pil_image = require("PIL.Image", "writing images")
    official = tfds.builder_cls(name)
    splits = _read_files(name, Path(source).expanduser())

    # Unregistered, because the name is taken by the builder that this one stands in for.
    with tfds.core.registered.skip_registration():

        class FromLocalFiles(official):
            name = official.name

            def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
                return {split: self._generate_examples(*arrays) for split, arrays in splits.items()}

            def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> Iterator[tuple]:
                for index, (image, label) in enumerate(zip(images, labels, strict=True)):
                    # As PIL images, because encoding arrays takes TensorFlow.
                    yield index, {"image": pil_image.fromarray(image), "label": int(label)}

        builder = FromLocalFiles(data_dir=None if data_dir is None else os.path.expanduser(data_dir))
    path = Path(builder.data_dir)
    if path.exists() and not builder.is_prepared():
        raise FileExistsError(f"{path} is there but is not a prepared dataset: delete it and prepare again")
    if not path.exists():
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        builder.download_and_prepare(download_config=config, file_format="array_record")
    require_readable(builder, name)
    return path


def _read_files(name: str, source: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images uint8 [n, 28, 28] and labels uint8 [n] of each split, checked before anything is written."""
    found = {file: _find(source, file) for pair in _FILES.values() for file in pair}
    missing = [file for file, path in found.items() if path is None]
    if missing:
        raise FileNotFoundError(
            f"{source} must hold the four IDX files of {name}, each as it is or with .gz; missing: {', '.join(missing)}"
        )
    splits = {}
    for split, files in _FILES.items():
        images_path, labels_path = (found[file] for file in files)
        images, labels = _read_idx(images_path, ndim=3), _read_idx(labels_path, ndim=1)
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


def _find(source: Path, file: str) -> Path | None:
    return next((path for path in (source / file, source / f"{file}.gz") if path.is_file()), None)


def _read_idx(path: Path, ndim: int) -> np.ndarray:
    """Reads an IDX file of bytes: 0, 0, 8 (their type), number of axes, its big-endian lengths, the data."""
    content = path.read_bytes()
    try:
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    magic, start = bytes((0, 0, 8, ndim)), 4 + 4 * ndim
    if content[:4] != magic or len(content) < start:
        raise ValueError(
            f"{path} must be an IDX file of bytes with {ndim} axes, which starts with {magic.hex()}; "
            f"it starts with {content[:4].hex() or 'nothing'}"
        )
    shape = tuple(int(length) for length in np.frombuffer(content[4:start], ">u4"))
    if len(content) != start + math.prod(shape):
        raise ValueError(
            f"{path} must be {start} bytes of header and then data of shape {shape}; it has {len(content)} bytes in all"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
