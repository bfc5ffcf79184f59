"""Tokenizers, and a dataset of tokens."""

import collections
import dataclasses
import importlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

_WORDS = re.compile(r"\w+|[^\w\s]")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TokenDataset:
    """Labeled texts as tokens, all padded to one length.

    There is one length for all texts instead of several buckets: the training program is compiled only once, a batch is
    any random examples, and seeds can run in parallel. Padding costs as much as text. The mask excludes it from
    attention and from means.

    Attributes:
      tokens: int32 [examples, length].
      lengths: int32 [examples], the number of tokens without padding.
      labels: int32 [examples], from 0 to num_classes - 1.
      splits: by name, such as "train" and "test", the indices of examples, int [n].
      num_classes: number of classes.
      name: for titles and results.
      vocabulary: number of different tokens.
      types: int32 [examples, length], 1 in the second of two texts.
      pad: the padding token.

    Raises:
      ValueError: the arrays do not have these types and shapes, or a value is out of range.

    Example:
      >>> tokens = np.array([[2, 5, 3, 0], [2, 6, 7, 3]], np.int32)
      >>> data = TokenDataset(tokens, np.array([3, 4], np.int32), np.array([0, 1], np.int32),
      ...                     {"train": np.array([0, 1])}, 2, "two", 8)
      >>> data
      TokenDataset(two: 2 texts of up to 4 tokens, 2 classes, train 2)
      >>> data.mask[0].tolist()
      [True, True, True, False]
    """

    tokens: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    splits: Mapping[str, np.ndarray]
    num_classes: int
    name: str
    vocabulary: int
    types: np.ndarray | None = None
    pad: int = 0

    def __post_init__(self):
        if self.tokens.ndim != 2 or self.tokens.dtype != np.int32 or not self.tokens.size:
            raise ValueError(
                f"tokens must be int32 [examples, length], got {self.tokens.dtype} {list(self.tokens.shape)}"
            )
        if self.types is None:
            object.__setattr__(self, "types", np.zeros_like(self.tokens))
        if self.types.shape != self.tokens.shape or self.types.dtype != np.int32:
            raise ValueError(f"types must be int32 {list(self.tokens.shape)}, got {list(self.types.shape)}")
        upper = {"lengths": self.tokens.shape[1], "labels": self.num_classes - 1}
        for name, largest in upper.items():
            array = getattr(self, name)
            if array.shape != self.tokens.shape[:1] or array.dtype != np.int32:
                raise ValueError(f"{name} must be int32 [{len(self.tokens)}], got {array.dtype} {list(array.shape)}")
            if array.min() < 0 or array.max() > largest:
                raise ValueError(f"{name} must be from 0 to {largest}, got {array.min()} to {array.max()}")
        if self.tokens.min() < 0 or self.tokens.max() >= self.vocabulary:
            raise ValueError(
                f"tokens must be from 0 to vocabulary - 1 = {self.vocabulary - 1}, got {self.tokens.min()} to "
                f"{self.tokens.max()}"
            )

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {len(numbers)}" for name, numbers in self.splits.items())
        return (
            f"TokenDataset({self.name}: {len(self)} texts of up to {self.tokens.shape[1]} tokens, "
            f"{self.num_classes} classes, {sizes})"
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def mask(self) -> np.ndarray:
        """Which tokens are not padding, bool [examples, length]."""
        return np.arange(self.tokens.shape[1]) < self.lengths[:, None]

    def take(self, split: str, count: int | None = None, seed: int = 0) -> "TokenDataset":
        """Return examples of a split, shuffled.

        Args:
          split: a name of `splits`.
          count: the most examples; all by default. Fewer examples are the first of more.
          seed: seed of their order.

        Returns:
          a dataset with only that split.

        Raises:
          ValueError: there is no such split, or it is empty.
        """
        if split not in self.splits or not len(self.splits[split]):
            raise ValueError(f"split must be one of {list(self.splits)} of {self.name!r}, got {split!r}")
        chosen = np.random.default_rng(seed).permutation(self.splits[split])[:count]
        arrays = {name: getattr(self, name)[chosen] for name in ("tokens", "lengths", "labels", "types")}
        return dataclasses.replace(self, splits={split: np.arange(len(chosen))}, **arrays)


class Tokenizer(Protocol):
    """Interface of tokenizers."""

    vocabulary: int
    pad: int

    def encode(
        self, texts: Sequence[str], pairs: Sequence[str] | None, length: int
    ) -> list[tuple[Sequence[int], Sequence[int]]]:
        """Return the tokens of each text, or pair of texts, cut to a maximum length, and their types."""
        ...


@dataclasses.dataclass(frozen=True)
class WordTokenizer:
    """A tokenizer of lowercase words and punctuation, the most frequent of some texts. It needs no file.

    Token 0 is padding, 1 an unknown word, 2 the start and 3 the end of a text; the words follow.

    Attributes:
      words: the words of the tokens from 4 on.

    Example:
      >>> tokenizer = WordTokenizer.of(["to be, or not to be"], 6)
      >>> tokenizer.words
      ('be', 'to')
      >>> tokenizer.encode(["To see"], None, 8)
      [([2, 5, 1, 3], [0, 0, 0, 0])]
    """

    words: tuple[str, ...]
    pad: int = 0

    def __post_init__(self):
        object.__setattr__(self, "_numbers", {word: number for number, word in enumerate(self.words, 4)})

    @classmethod
    def of(cls, texts: Iterable[str], vocabulary: int) -> "WordTokenizer":
        """Return the tokenizer of the most frequent words of texts; ties are in alphabetical order."""
        if vocabulary < 5:
            raise ValueError(f"vocabulary must be at least 5, got {vocabulary}")
        counts = collections.Counter(word for text in texts for word in _split(text))
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(tuple(ranked[: vocabulary - 4]))

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return len(self.words) + 4

    def encode(
        self, texts: Sequence[str], pairs: Sequence[str] | None, length: int
    ) -> list[tuple[list[int], list[int]]]:
        """Return at most `length` tokens of each text, or pair of texts, with their types.

        In a pair, the longer text is truncated first.
        """
        numbers = lambda text: [self._numbers.get(word, 1) for word in _split(text)]
        encoded = []
        for number, text in enumerate(texts):
            first = numbers(text)
            if pairs is None:
                ids = [2, *first[: length - 2], 3]
                encoded.append((ids, [0] * len(ids)))
                continue
            second, room = numbers(pairs[number]), length - 3
            keep = min(len(first), max(room - len(second), (room + 1) // 2))
            head, tail = [2, *first[:keep], 3], [*second[: room - keep], 3]
            encoded.append((head + tail, [0] * len(head) + [1] * len(tail)))
        return encoded


def _split(text: str) -> list[str]:
    return _WORDS.findall(text.lower())


class FileTokenizer:
    """The tokenizer in a `tokenizer.json`, as saved by Hugging Face libraries. Requires the package `tokenizers`.

    Args:
      path: the file, or a folder that contains it.

    Raises:
      FileNotFoundError: there is no such file.
      ImportError: tokenizers is not installed.
      ValueError: the file does not hold a tokenizer.
    """

    def __init__(self, path: str | os.PathLike):
        path = Path(path).expanduser()
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path} to read a tokenizer from")
        try:
            tokenizers = importlib.import_module("tokenizers")
        except ImportError as error:
            raise ImportError(
                f'{path} needs tokenizers, which is not installed: pip install "cbp-jax[text]"'
            ) from error
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(os.fspath(path))
        except Exception as error:  # its Rust code raises a bare Exception
            raise ValueError(f"{path} is not a file of a tokenizer: {error}") from error
        self._tokenizer.no_padding()
        self.vocabulary: int = self._tokenizer.get_vocab_size()
        found = (self._tokenizer.token_to_id(token) for token in ("[PAD]", "<pad>"))
        self.pad: int = next((number for number in found if number is not None), 0)

    def encode(
        self, texts: Sequence[str], pairs: Sequence[str] | None, length: int
    ) -> list[tuple[Sequence[int], Sequence[int]]]:
        """Return the tokens of each text, or pair of texts, cut to a maximum length, and their types."""
        self._tokenizer.enable_truncation(length)
        inputs = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        return [(found.ids, found.type_ids) for found in self._tokenizer.encode_batch(inputs)]
