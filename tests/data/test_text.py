import gzip
import json

import numpy as np
import pytest

from cbp_jax.data import DatasetUnavailable, docstrings, load_text

ROWS = [
    {"text": "good film", "label": "pos", "split": "train"},
    {"text": "bad, really", "label": "neg", "split": "train"},
    {"text": "so-so", "label": "neg", "split": "test"},
]


def jsonl(rows):
    return "\n".join(map(json.dumps, rows)) + "\n"


CSV = 'label,text,split\npos,good film,train\nneg,"bad, really",train\nneg,so-so,test\n'


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize(("ending", "content"), [("jsonl", jsonl(ROWS)), ("csv", CSV)])
def test_files(ending, content, gz, tmp_path):
    path = tmp_path / f"films.v2.{ending}{'.gz' if gz else ''}"
    path.write_bytes(gzip.compress(content.encode()) if gz else content.encode())
    texts = load_text(path)
    assert repr(texts) == "Texts(films.v2: 3 texts, 2 classes, train 2, test 1)"
    assert texts.texts == ("good film", "bad, really", "so-so")
    assert (texts.label_names, texts.labels.tolist(), texts.pairs) == (("neg", "pos"), [1, 0, 0], None)
    assert {split: numbers.tolist() for split, numbers in texts.splits.items()} == {"train": [0, 1], "test": [2]}


def test_labels_that_are_numbers_and_pairs(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        jsonl([{"text": "a", "pair": "b", "label": 3}, {"text": "c", "pair": "d", "label": 0}])
    )
    texts = load_text(tmp_path / "a.jsonl")
    assert (texts.label_names, texts.labels.tolist()) == (("0", "1", "2", "3"), [3, 0])
    assert texts.pairs == ("b", "d") and list(texts.splits) == ["train"]
    (tmp_path / "a.csv").write_text("text,label\nx,1\ny,0\n")
    assert load_text(tmp_path / "a.csv").labels.tolist() == [1, 0]


GOOD = b'{"text": "a", "label": 1}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", GOOD + b'{"text": "b"}\n', r"a\.jsonl, line 2: an example must have a text and a label"),
        ("a.jsonl", GOOD + b'\n{"text"\n', r"a\.jsonl, line 3: "),
        ("a.jsonl", b"[1]\n", "line 1: an example must have a text and a label"),
        ("a.jsonl", b'{"text": "a", "label": true}\n', "line 1: an example must have"),
        ("a.jsonl", b'{"text": "a", "label": -1}\n', "a label must be a name, or a number from 0 on, got -1"),
        ("a.jsonl", GOOD + b'{"text": "b", "label": "x"}\n', "a label that is a number, or none; example 1"),
        ("a.jsonl", GOOD + b'{"text": "b", "pair": "c", "label": 1}\n', "a pair, or none; example 1 differs"),
        ("a.jsonl", b"\n", "holds no examples"),
        ("a.csv", b"text\nx\n", r"a\.csv, line 2: an example must have a text and a label"),
        ("a.jsonl", b"\xff\xfe", "is not a whole file of UTF-8 text"),
        ("a.jsonl.gz", b"\x1f\x8b cut", "is not a whole file of UTF-8 text"),
    ],
)
def test_bad_files(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_text(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_text(tmp_path / "other.csv")


def write_tiny(name, data_dir, splits):
    """Write a dataset in the official builder's format, with these splits of examples."""
    import tensorflow_datasets as tfds

    official, _, config = name.partition("/")
    official = tfds.builder_cls(official)
    with tfds.core.registered.skip_registration():

        class Tiny(official):
            name = official.name

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(examples) for split, examples in splits.items()}

            def _generate_examples(self, examples):
                yield from enumerate(examples)

        builder = Tiny(data_dir=data_dir, config=config or None, file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))


def examples_of(texts, split):
    return sorted((texts.texts[n], texts.pairs and texts.pairs[n], int(texts.labels[n])) for n in texts.splits[split])


def test_a_text_of_tensorflow_datasets(tmp_path):
    examples = [{"text": "fine", "label": 1}, {"text": "naïve", "label": 0}]
    write_tiny("imdb_reviews", tmp_path, {"train": examples, "test": examples[:1]})
    texts = load_text("imdb_reviews", data_dir=tmp_path)
    assert examples_of(texts, "train") == [("fine", None, 1), ("naïve", None, 0)]
    assert examples_of(texts, "test") == [("fine", None, 1)]
    assert texts.label_names == ("neg", "pos")


def test_pairs_of_texts_and_splits_without_labels(tmp_path):
    pair = lambda n, label: {"premise": f"p{n}", "hypothesis": f"h{n}", "label": label, "idx": n}
    splits = {"train": [pair(0, 2), pair(1, 0)], "validation_matched": [pair(2, 1)], "test_matched": [pair(3, -1)]}
    write_tiny("glue/mnli", tmp_path, splits)
    texts = load_text("glue/mnli", data_dir=tmp_path)
    assert list(texts.splits) == ["train", "validation_matched"]
    assert examples_of(texts, "train") == [("p0", "h0", 2), ("p1", "h1", 0)]
    assert examples_of(texts, "validation_matched") == [("p2", "h2", 1)]
    assert len(texts.label_names) == 3
    write_tiny("ag_news_subset", tmp_path, {"train": [{"title": "t", "description": "d", "label": 3}]})
    news = load_text("ag_news_subset", data_dir=tmp_path)
    assert examples_of(news, "train") == [("t", "d", 3)] and len(news.label_names) == 4


def test_other_datasets_of_tensorflow_datasets(tmp_path):
    with pytest.raises(DatasetUnavailable, match="imdb_reviews") as error:
        load_text("imdb_reviews", data_dir=tmp_path)
    assert "use the dataset 'docstrings/library', which comes with the installed libraries" in str(error.value)
    with pytest.raises(ValueError, match=r"must have one text or two, and a class label: its features are \['id"):
        load_text("glue/stsb", data_dir=tmp_path)
    with pytest.raises(ValueError, match="'mnist' must have one text"):
        load_text("mnist", data_dir=tmp_path)
    with pytest.raises(ValueError, match="those of installed libraries are docstrings/library, docstrings/kind"):
        load_text("docstrings/author")


SOURCE = '''
"""Tools for JAX arrays and for lists of them, as jax_numpy and jaxprs have them.

Args:
  none
"""

class Thing:
    """A thing that is made of things, with jnp inside of it.

    >>> code
    """

    def method(self):
        """Give this very thing back to whoever has asked for it."""

def function():
    """Short."""

async def other():
    """Compute what there is to be computed, and then the rest.

    Parameters
    ----------
    x : numpy.ndarray
    """
'''


def test_prose_by_library_and_by_kind(tmp_path, monkeypatch):
    for name, source in (("one", SOURCE), ("two", SOURCE.replace("very", "other")), ("broken", "def (")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise AssertionError('it is not run')")
        (tmp_path / name / "module.py").write_text(source)
        (tmp_path / name / "test_module.py").write_text('"""One two three four five six seven eight nine ten."""')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(docstrings, "LIBRARIES", ("one", "two", "broken", "not_installed"))
    docstrings._of_library.cache_clear()
    by_kind = dict(zip(*docstrings.docstrings("kind"), strict=True))
    assert by_kind == {
        "Tools for library arrays and for lists of them, as library and library have them.": "module",
        "A thing that is made of things, with library inside of it.": "class",
        "Give this very thing back to whoever has asked for it.": "method",
        "Give this other thing back to whoever has asked for it.": "method",
        "Compute what there is to be computed, and then the rest.": "function",
    }
    by_library = dict(zip(*docstrings.docstrings("library"), strict=True))  # the first of two equal ones
    assert list(by_library.values()).count("two") == 1
    docstrings._of_library.cache_clear()
    with pytest.raises(ValueError, match="by must be 'library' or 'kind', got 'author'"):
        docstrings.docstrings("author")


@pytest.mark.slow
def test_texts_of_every_installation():
    texts = load_text("docstrings/library")
    assert len(texts) > 500 and set(texts.splits) == {"train", "test"} and len(set(texts.texts)) == len(texts)
    assert {"jax", "numpy", "optax"} <= set(texts.label_names)
    words = {word for text in texts.texts for word in text.lower().replace(".", " ").split()}
    assert not words & {"jax", "numpy", "jnp", "np", "optax", "flax", "scipy", "chex"}
    share = len(texts.splits["test"]) / len(texts)
    assert 0.15 < share < 0.25
    kinds = load_text("docstrings/kind")
    assert kinds.texts == texts.texts
    np.testing.assert_array_equal(kinds.splits["test"], texts.splits["test"])


def test_real_texts(real_data):
    folder = real_data / "text"
    if not folder.is_dir():
        pytest.skip(f"no texts in {folder}")
    texts = load_text(folder / "vader_movie.jsonl.gz")
    assert (len(texts), texts.label_names) == (10_041, ("neg", "pos"))
    assert set(texts.splits) == {"train", "test"}
