"""Sources of images and texts: tensorflow-datasets, local files, and data that every installation has."""

from cbp_jax.data.dataset import Dataset, DatasetUnavailable
from cbp_jax.data.downsample import downsample
from cbp_jax.data.local import prepare
from cbp_jax.data.normalizations import normalization
from cbp_jax.data.procedural import procedural
from cbp_jax.data.sources import load, names
from cbp_jax.data.text import Texts, load_text
from cbp_jax.data.tokens import FileTokenizer, TokenDataset, Tokenizer, WordTokenizer

__all__ = [
    "Dataset",
    "DatasetUnavailable",
    "FileTokenizer",
    "Texts",
    "TokenDataset",
    "Tokenizer",
    "WordTokenizer",
    "downsample",
    "load",
    "load_text",
    "names",
    "normalization",
    "prepare",
    "procedural",
]
