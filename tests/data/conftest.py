import gzip
import os
from pathlib import Path

import numpy as np
import pytest

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def idx_bytes(array):
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.fixture
def write_idx():
    """Return a function that writes four files for {"train": (images [n, 28, 28], labels [n]), "test": ...}."""

    def write(folder, splits, gz=False):
        folder.mkdir(exist_ok=True)
        for split, arrays in splits.items():
            for file, array in zip(FILES[split], arrays, strict=True):
                content = idx_bytes(array)
                (folder / (f"{file}.gz" if gz else file)).write_bytes(gzip.compress(content) if gz else content)
        return folder

    return write


@pytest.fixture
def tiny_splits():
    """Make random splits of 10 and 4 images. TFDS stores them shuffled, so the first pixel of each is its index."""
    rng = np.random.default_rng(0)

    def split(n):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        images[:, 0, 0] = np.arange(n)
        return images, rng.integers(0, 10, n, dtype=np.uint8)

    return {"train": split(10), "test": split(4)}


@pytest.fixture
def real_data():
    """Return the folder with mnist/ and fashion_mnist/, each with the four official IDX files."""
    folder = Path(os.environ.get("CBP_JAX_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
    if not (folder / "mnist").is_dir():
        pytest.skip(f"no MNIST files in {folder}; point CBP_JAX_TEST_DATA at a folder that has them")
    return folder
