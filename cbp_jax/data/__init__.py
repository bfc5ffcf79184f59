"""Where images come from: tensorflow-datasets, local files, and the digits embedded in scikit-learn."""

from cbp_jax.data.dataset import Dataset, DatasetUnavailable
from cbp_jax.data.idx import prepare
from cbp_jax.data.sources import load, names

__all__ = ["Dataset", "DatasetUnavailable", "load", "names", "prepare"]
