"""Where images come from: tensorflow-datasets, local files, and the digits embedded in scikit-learn."""

from cbp_jax.data.dataset import Dataset, DatasetUnavailable
from cbp_jax.data.downsample import downsample
from cbp_jax.data.local import prepare
from cbp_jax.data.normalizations import normalization
from cbp_jax.data.procedural import procedural
from cbp_jax.data.sources import load, names

__all__ = [
    "Dataset",
    "DatasetUnavailable",
    "downsample",
    "load",
    "names",
    "normalization",
    "prepare",
    "procedural",
]
