"""Labeled texts from installed libraries, a user's own files, and tensorflow-datasets."""

import csv
import dataclasses
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cbp_jax.data import docstrings, sources
from cbp_jax.data.tokens import TokenDataset, Tokenizer

ENDINGS = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz")
EMBEDDED = ("docstrings/library", "docstrings/kind")
_TEST_SHARE = 0.2


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Texts:
    """Labeled texts, or pairs of texts.

    Attributes:
      texts: the text of each example.
      labels: int32 [examples].
      label_names: the name of each class.
      splits: by name, such as "train" and "test", the indices of examples.
      name: the name under which it was loaded.
      pairs: the second text of each example, if examples are pairs of texts.
    """

    texts: tuple[str, ...]
    labels: np.ndarray
    label_names: tuple[str, ...]
    splits: Mapping[str, np.ndarray]
    name: str
    pairs: tuple[str, ...] | None = None

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {len(numbers)}" for name, numbers in self.splits.items())
        return f"Texts({self.name}: {len(self)} texts, {len(self.label_names)} classes, {sizes})"

    def __len__(self) -> int:
        return len(self.texts)

    def tokenize(self, tokenizer: Tokenizer, length: int) -> TokenDataset:
        """Return the texts as tokens.

        Args:
          tokenizer: a `WordTokenizer`, a `FileTokenizer`, or another object with the same methods.
          length: number of tokens of each text; longer texts are truncated.

        Raises:
          ValueError: `length` is less than 4.
        """
        if length < 4:
            raise ValueError(f"length must be at least 4, got {length}")
        tokens = np.full((len(self), length), tokenizer.pad, np.int32)
        types, lengths = np.zeros_like(tokens), np.zeros(len(self), np.int32)
        for row, (ids, kinds) in enumerate(tokenizer.encode(self.texts, self.pairs, length)):
            tokens[row, : len(ids)], types[row, : len(ids)], lengths[row] = ids, kinds, len(ids)
        count = len(self.label_names)
        return TokenDataset(
            tokens, lengths, self.labels, self.splits, count, self.name, tokenizer.vocabulary, types, tokenizer.pad
        )


def load_text(name: str | os.PathLike, *, data_dir: str | os.PathLike | None = None) -> Texts:
    """Load labeled texts, all splits; never downloads.

    Args:
      name: "docstrings/library" or "docstrings/kind", which need no files: docstrings of installed libraries, labeled
        by library or by the kind of object; a text classification dataset of tensorflow-datasets, such as "glue/sst2",
        "ag_news_subset" or "imdb_reviews", with a class label and one text or two; or the path of a file of your own
        that ends in .jsonl or .csv, gzipped (.gz) or not.
      data_dir: where tensorflow-datasets keeps its datasets, as in `load`.

    Returns:
      the texts. Splits with secret labels, such as GLUE's "test", are left out.

    Raises:
      DatasetUnavailable: the dataset is known but not prepared in `data_dir`; the message says how to prepare it.
      ValueError: the dataset is unknown, or does not hold labeled texts, or a file is malformed.
      FileNotFoundError: there is no such file.
      ImportError: the extra `cbp-jax[data]` is not installed.

    In a file, each example is a JSON object on its own line (.jsonl), or a row below a row of column names (.csv). It
    has "text", optionally "pair" for a second text, "label", and "split", such as "train" or "test", if there are
    several splits. Labels are names or numbers.

    >>> load_text("docstrings/kind").label_names
    ('class', 'function', 'method', 'module')
    """
    name = os.fspath(name)
    if name.endswith(ENDINGS):
        return _load_file(Path(name).expanduser())
    if name in EMBEDDED:
        texts, labels = docstrings.docstrings(name.partition("/")[2])
        kept = ["test" if _share(text) < _TEST_SHARE else "train" for text in texts]
        return _texts(name, texts, None, labels, kept)
    if name.partition("/")[0] == "docstrings":
        raise ValueError(f"unknown dataset {name!r}; those of installed libraries are {', '.join(EMBEDDED)}")
    return _load_tfds(name, data_dir)


def _share(text: str) -> float:
    """Return a pseudo-random number in [0, 1) for splitting texts, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32


def _texts(name: str, texts: list[str], pairs: list[str] | None, labels: list[Any], splits: list[str]) -> Texts:
    numbers = all(isinstance(label, int) for label in labels)
    names = [str(n) for n in range(max(labels) + 1)] if numbers else sorted(set(labels))
    number = {label: label if numbers else place for place, label in enumerate(names)}
    coded = np.asarray(labels if numbers else [number[label] for label in labels], np.int32)
    found = {split: np.flatnonzero(np.asarray(splits) == split) for split in dict.fromkeys(splits)}
    return Texts(tuple(texts), coded, tuple(names), found, name, None if pairs is None else tuple(pairs))


def _load_file(path: Path) -> Texts:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} to load texts from")
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a whole file of UTF-8 text: {error}") from error
    rows = _csv_rows(text) if ".csv" in path.suffixes else _json_rows(path, text)
    columns: dict[str, list[Any]] = {"text": [], "pair": [], "label": [], "split": []}
    for line, row in rows:
        label = row.get("label")
        if not isinstance(row.get("text"), str) or isinstance(label, bool) or not isinstance(label, str | int):
            raise ValueError(f"{path}, line {line}: an example must have a text and a label, got {str(row)[:100]}")
        if not isinstance(label, str) and label < 0:
            raise ValueError(f"{path}, line {line}: a label must be a name, or a number from 0 on, got {label}")
        for name, default in (("text", ""), ("pair", None), ("label", ""), ("split", "train")):
            columns[name].append(row.get(name, default))
    if not columns["text"]:
        raise ValueError(f"{path} holds no examples")
    for name, what in (("pair", "a pair"), ("label", "a label that is a number")):
        there = [value is not None if name == "pair" else isinstance(value, int) for value in columns[name]]
        if len(set(there)) > 1:
            odd = there.index(not there[0])
            raise ValueError(f"{path}: either all examples have {what}, or none; example {odd} differs from the first")
    stem = path.name.removesuffix(".gz").rpartition(".")[0]
    pairs = columns["pair"] if columns["pair"][0] is not None else None
    return _texts(stem, columns["text"], pairs, columns["label"], columns["split"])


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, content in enumerate(text.splitlines(), 1):
        if content.strip():
            try:
                row = json.loads(content)
            except ValueError as error:
                raise ValueError(f"{path}, line {line}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {line}: an example must have a text and a label, got {str(row)[:100]}")
            yield line, row


def _csv_rows(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    for row in reader:
        label = row.get("label")
        yield reader.line_num, row | ({"label": int(label)} if label and label.isdigit() else {})


def _load_tfds(name: str, data_dir: str | os.PathLike | None) -> Texts:
    builder = sources.find_builder(name, data_dir)
    tfds = sources.require("tensorflow_datasets", f"dataset {name!r}")
    features = dict(builder.info.features or {})
    fields = [field for field, feature in features.items() if isinstance(feature, tfds.features.Text)]
    label = features.get("label")
    if not 1 <= len(fields) <= 2 or not isinstance(label, tfds.features.ClassLabel):
        raise ValueError(
            f"dataset {name!r} must have one text or two, and a class label: its features are {sorted(features)}"
        )
    sources.require_readable(builder, name, embedded=f"{EMBEDDED[0]!r}, which comes with the installed libraries")
    columns: list[list[str]] = [[] for _ in fields]
    labels, splits = [], []
    for split in sorted(builder.info.splits, key=lambda split: (split != "train", split)):
        source = builder.as_data_source(split)
        examples = source.__getitems__(range(len(source))) if len(source) else []
        if any(int(example["label"]) < 0 for example in examples):  # secret labels
            continue
        for column, field in zip(columns, fields, strict=True):
            column += [bytes(example[field]).decode() for example in examples]
        labels += [int(example["label"]) for example in examples]
        splits += [split] * len(examples)
    if not labels:
        raise ValueError(f"dataset {name!r} has no labeled examples")
    found = _texts(name, columns[0], columns[1] if len(columns) == 2 else None, labels, splits)
    return dataclasses.replace(found, label_names=tuple(label.names))
