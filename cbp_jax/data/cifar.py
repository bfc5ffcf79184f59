"""CIFAR-10 from its binary batch files."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

_SPLITS = {"train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)), "test": ("test_batch.bin",)}
FILES = tuple(file for files in _SPLITS.values() for file in files)
# The official builder reads them from its download.
LABEL_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_RECORD = 1 + 3 * 32 * 32  # bytes: the label, then the image's red, green and blue, each row by row


def read(contents: Mapping[str, tuple[Path, bytes]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Decode and check the six files.

    Args:
      contents: for each of `FILES`, its path and its content.

    Returns:
      images uint8 [n, 32, 32, 3] and labels uint8 [n] of each split.

    Raises:
      ValueError: if a file does not hold what its name says.
    """
    splits = {}
    for split, files in _SPLITS.items():
        records = np.concatenate([_decode(*contents[file]) for file in files])
        splits[split] = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0]
    return splits


def _decode(path: Path, content: bytes) -> np.ndarray:
    """Return the records of a file, uint8 [n, 3073]."""
    if not content or len(content) % _RECORD:
        raise ValueError(
            f"{path} must be records of {_RECORD} bytes, each a label and an image of 32 x 32 pixels and 3 colors; "
            f"it has {len(content)} bytes"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD)
    if records[:, 0].max() > 9:
        raise ValueError(f"{path} must hold labels from 0 to 9; got {records[:, 0].max()}")
    return records
