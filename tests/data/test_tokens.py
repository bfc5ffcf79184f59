import json
import sys

import numpy as np
import pytest

from cbp_jax.data import FileTokenizer, Texts, TokenDataset, WordTokenizer

TEXTS = ["One cat, one dog.", "A dog!", "one"]


def test_the_most_frequent_words():
    tokenizer = WordTokenizer.of(TEXTS, 8)
    assert (tokenizer.words, tokenizer.vocabulary) == (("one", "dog", "!", ","), 8)
    assert WordTokenizer.of(TEXTS, 1000).vocabulary == 4 + 7
    with pytest.raises(ValueError, match="vocabulary must be at least 5, got 4"):
        WordTokenizer.of(TEXTS, 4)


def test_tokens_of_texts_and_of_pairs():
    tokenizer = WordTokenizer(("one", "two", "three", "four"))
    assert tokenizer.encode(["two FIVE one"], None, 9) == [([2, 5, 1, 4, 3], [0] * 5)]
    assert tokenizer.encode(["two FIVE one"], None, 4) == [([2, 5, 1, 3], [0] * 4)]
    assert tokenizer.encode([""], None, 4) == [([2, 3], [0, 0])]
    assert tokenizer.encode(["one two"], ["three"], 9) == [([2, 4, 5, 3, 6, 3], [0, 0, 0, 0, 1, 1])]


@pytest.mark.parametrize(("first", "second"), [(9, 2), (2, 9), (9, 9), (3, 4), (0, 9)])
def test_the_longer_text_of_a_pair_is_cut_first(first, second):
    """Words are removed from the longer text, one by one, until both fit."""
    kept, length = [first, second], 10
    while sum(kept) > length - 3:
        kept[0 if kept[0] > kept[1] else 1] -= 1
    (ids, types), = WordTokenizer(("a", "b")).encode(["a " * first], ["b " * second], length)  # fmt: skip
    assert [ids.count(4), ids.count(5)] == kept
    assert types == [0] * (2 + kept[0]) + [1] * (1 + kept[1])


def make(**changes):
    fields = {
        "tokens": np.array([[2, 5, 3, 0], [2, 3, 0, 0], [2, 6, 7, 3]], np.int32),
        "lengths": np.array([3, 2, 4], np.int32),
        "labels": np.array([0, 2, 1], np.int32),
        "splits": {"train": np.array([0, 2]), "test": np.array([1])},
        "num_classes": 3,
        "name": "three",
        "vocabulary": 8,
    }
    return TokenDataset(**{**fields, **changes})


def test_a_split():
    data = make()
    assert repr(data) == "TokenDataset(three: 3 texts of up to 4 tokens, 3 classes, train 2, test 1)"
    test = data.take("test")
    assert test.tokens.tolist() == [[2, 3, 0, 0]] and test.mask.tolist() == [[True, True, False, False]]
    assert (test.labels.tolist(), test.num_classes, list(test.splits)) == ([2], 3, ["test"])
    orders = {tuple(data.take("train", seed=seed).labels.tolist()) for seed in range(10)}
    assert orders == {(0, 1), (1, 0)}
    for seed in range(5):
        assert data.take("train", 1, seed).labels[0] == data.take("train", seed=seed).labels[0]
    with pytest.raises(ValueError, match=r"split must be one of \['train', 'test'\] of 'three', got 'validation'"):
        data.take("validation")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": np.zeros((3, 4))}, r"tokens must be int32 \[examples, length\], got float64 \[3, 4\]"),
        ({"tokens": np.full((3, 4), 8, np.int32)}, "tokens must be from 0 to vocabulary - 1 = 7, got 8 to 8"),
        ({"lengths": np.array([3, 2, 5], np.int32)}, "lengths must be from 0 to 4, got 2 to 5"),
        ({"labels": np.array([0, 1], np.int32)}, r"labels must be int32 \[3\], got int32 \[2\]"),
        ({"labels": np.array([0, 1, 3], np.int32)}, "labels must be from 0 to 2, got 0 to 3"),
        ({"types": np.zeros((3, 3), np.int32)}, r"types must be int32 \[3, 4\], got \[3, 3\]"),
    ],
)
def test_bad_arrays(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_texts_as_tokens():
    texts = Texts(("one two three four", "two"), np.array([1, 0], np.int32), ("a", "b"), {"train": np.arange(2)}, "n")
    data = texts.tokenize(WordTokenizer(("one", "two")), 5)
    assert data.tokens.tolist() == [[2, 4, 5, 1, 3], [2, 5, 3, 0, 0]]
    assert (data.lengths.tolist(), data.num_classes, data.vocabulary) == ([5, 3], 2, 6)
    assert repr(texts) == "Texts(n: 2 texts, 2 classes, train 2)"
    with pytest.raises(ValueError, match="length must be at least 4, got 3"):
        texts.tokenize(WordTokenizer(("one",)), 3)


WORD_LEVEL = {
    "version": "1.0",
    "truncation": None,
    "padding": {"strategy": "BatchLongest", "direction": "Right", "pad_id": 1, "pad_type_id": 0, "pad_token": "<pad>"},
    "added_tokens": [],
    "normalizer": {"type": "Lowercase"},
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "<pad>": 1, "one": 2, "two": 3}, "unk_token": "[UNK]"},
}


def test_a_tokenizer_from_a_file(tmp_path):
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(WORD_LEVEL))
    tokenizer = FileTokenizer(tmp_path)
    assert (tokenizer.vocabulary, tokenizer.pad) == (4, 1)
    assert [ids for ids, _ in tokenizer.encode(["One three two", "one"], None, 2)] == [[2, 0], [2]]
    ((ids, types),) = tokenizer.encode(["one"], ["two two"], 9)
    assert (list(ids), list(types)) == ([2, 3, 3], [0, 1, 1])
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a file of a tokenizer"):
        FileTokenizer(path)


def test_a_tokenizer_without_its_file_or_its_package(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*tokenizer\.json"):
        FileTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r'needs tokenizers, which .*: pip install "cbp-jax\[text\]"'):
        FileTokenizer(tmp_path)
