"""Prepares datasets from local copies of their official files, without TensorFlow and without network."""

import gzip
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cbp_jax.data import cifar, idx
from cbp_jax.data.sources import LOCAL_FILES, require, require_readable

_FORMATS = {"mnist": idx, "fashion_mnist": idx, "kmnist": idx, "cifar10": cifar}


def prepare(name: str, source: str | os.PathLike, data_dir: str | os.PathLike | None = None) -> Path:
    """Create a tensorflow-datasets dataset from local copies of its official files.

    The official builder writes it; only its reading of the files is replaced. So the result is the same as from its own
    download, and any program that uses tensorflow-datasets can read it.

    Args:
      name: "mnist", "fashion_mnist", "kmnist" or "cifar10".
      source: directory with the dataset's files, each plain or gzipped (.gz): the four IDX files
        train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte; for
        CIFAR-10 the six binary batches data_batch_1.bin to data_batch_5.bin and test_batch.bin.
      data_dir: where tensorflow-datasets keeps its datasets; by default ``$TFDS_DATA_DIR`` or
        ``~/tensorflow_datasets``.

    Returns:
      The directory of the prepared dataset. An existing one is not changed; delete it to prepare it again.

    Raises:
      ValueError: if the name is not one of these, or a file does not hold what its name says.
      FileNotFoundError: if files are missing; the message lists them.
      ImportError: if the extra ``cbp-jax[data]`` is not installed.
      DatasetUnavailable: if it was prepared before in a format that only TensorFlow reads.
      FileExistsError: if the directory of the dataset exists but holds no dataset.

    For example ``prepare("mnist", "downloads/mnist")``, and then ``load("mnist")``.
    """
    if name not in _FORMATS:
        raise ValueError(f"name must be one of {', '.join(_FORMATS)}, which are read from local files; got {name!r}")
    tfds = require("tensorflow_datasets", f"dataset {name!r}")
    pil_image = require("PIL.Image", "writing images")
    official, files = tfds.builder_cls(name), _FORMATS[name]
    splits = files.read(_read_files(name, Path(source).expanduser(), files.FILES))  # before anything is written

    # Not registered, because the official builder already has this name.
    with tfds.core.registered.skip_registration():

        class FromLocalFiles(official):
            name = official.name

            def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
                if files.LABEL_NAMES is not None:
                    self.info.features["label"].names = list(files.LABEL_NAMES)
                return {split: self._generate_examples(split, *arrays) for split, arrays in splits.items()}

            def _generate_examples(self, split: str, images: np.ndarray, labels: np.ndarray) -> Iterator[tuple]:
                for index, (image, label) in enumerate(zip(images, labels, strict=True)):
                    # As PIL images, because encoding arrays requires TensorFlow.
                    example = {"image": pil_image.fromarray(image), "label": int(label)}
                    if "id" in self.info.features:
                        example["id"] = f"{split}_{index:05d}"
                    yield index, example

        builder = FromLocalFiles(data_dir=None if data_dir is None else os.path.expanduser(data_dir))
    path = Path(builder.data_dir)
    if path.exists() and not builder.is_prepared():
        raise FileExistsError(f"{path} is there but is not a prepared dataset: delete it and prepare again")
    if not path.exists():
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        builder.download_and_prepare(download_config=config, file_format="array_record")
    require_readable(builder, name)
    return path


def _read_files(name: str, source: Path, files: tuple[str, ...]) -> dict[str, tuple[Path, bytes]]:
    """Return the path and the unpacked content of each file."""
    found = {file: _find(source, file) for file in files}
    missing = [file for file, path in found.items() if path is None]
    if missing:
        raise FileNotFoundError(
            f"{source} must hold the {LOCAL_FILES[name]} of {name}, each as it is or with .gz; "
            f"missing: {', '.join(missing)}"
        )
    return {file: (path, _unpack(path)) for file, path in found.items()}


def _find(source: Path, file: str) -> Path | None:
    return next((path for path in (source / file, source / f"{file}.gz") if path.is_file()), None)


def _unpack(path: Path) -> bytes:
    content = path.read_bytes()
    # A batch of CIFAR-10 starts with a label, never with gzip's 31.
    if content[:2] != b"\x1f\x8b":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error
