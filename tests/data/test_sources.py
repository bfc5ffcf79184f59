import socket
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from PIL import Image

from cbp_jax.data import DatasetUnavailable, load, names, prepare, sources


@pytest.fixture
def mnist(tmp_path, write_idx, tiny_splits):
    """Prepare a tiny "mnist" and return its directory."""
    prepare("mnist", write_idx(tmp_path / "source", tiny_splits), tmp_path / "data")
    return tmp_path / "data"


def write_tiny(name, data_dir, examples):
    """Write a dataset in the official builder's format, with these training examples."""
    import tensorflow_datasets as tfds

    official = tfds.builder_cls(name.split("/")[0])
    with tfds.core.registered.skip_registration():

        class Tiny(official):
            name = official.name

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                yield from enumerate(examples)

        config = name.split("/")[1] if "/" in name else None
        builder = Tiny(data_dir=data_dir, config=config, file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))


def test_digits():
    digits = load("digits")
    assert digits.images.shape == (1797, 8, 8, 1)
    assert (digits.images.max(), digits.max_value, digits.num_classes) == (16, 16, 10)
    assert digits.labels[:5].tolist() == [0, 1, 2, 3, 4]
    assert digits.images[0, 0, :, 0].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]
    with pytest.raises(ValueError, match=r"unknown split 'test' of dataset 'digits'; it has \['train'\]"):
        load("digits", "test")


def test_color_images_and_many_classes(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    write_tiny(
        "cifar100",
        tmp_path,
        [{"id": str(i), "image": Image.fromarray(images[i]), "label": 90 + i, "coarse_label": 1} for i in range(6)],
    )
    dataset = load("cifar100", data_dir=tmp_path)
    assert dataset.num_classes == 100
    np.testing.assert_array_equal(dataset.images[np.argsort(dataset.labels)], images)
    assert sorted(dataset.labels.tolist()) == [90, 91, 92, 93, 94, 95]


def test_a_dataset_with_configs(tmp_path):
    blank = Image.fromarray(np.zeros((28, 28), np.uint8))
    write_tiny("emnist/balanced", tmp_path, [{"image": blank, "label": 46}])
    dataset = load("emnist/balanced", data_dir=tmp_path)
    assert (len(dataset), dataset.num_classes, dataset.labels.tolist()) == (1, 47, [46])
    with pytest.raises(DatasetUnavailable, match="emnist/letters"):
        load("emnist/letters", data_dir=tmp_path)


def test_chunks_join_to_the_whole(mnist, monkeypatch):
    whole = load("mnist", "train[:9]", data_dir=mnist)
    monkeypatch.setattr(sources, "_CHUNK", 4)
    in_chunks = load("mnist", data_dir=mnist)
    assert len(whole) == 9 and len(in_chunks) == 10
    np.testing.assert_array_equal(in_chunks.images[:9], whole.images)
    np.testing.assert_array_equal(in_chunks.labels[:9], whole.labels)
    assert sorted(in_chunks.images[:, 0, 0, 0].tolist()) == list(range(10))


def refuse(*args, **kwargs):
    raise AssertionError("must not be called")


def test_the_second_load_comes_from_the_cache_of_that_split_and_directory(
    mnist, tmp_path, monkeypatch, write_idx, tiny_splits
):
    first = {split: load("mnist", split, data_dir=mnist) for split in ("train", "test", "train[:3]")}
    other = {split: (images[:2], labels[:2]) for split, (images, labels) in tiny_splits.items()}
    prepare("mnist", write_idx(tmp_path / "other_source", other), tmp_path / "other")
    assert len(load("mnist", data_dir=tmp_path / "other")) == 2
    monkeypatch.setattr(sources, "_read_split", refuse)
    for split, dataset in first.items():
        again = load("mnist", split, data_dir=mnist)
        np.testing.assert_array_equal(again.images, dataset.images)
        np.testing.assert_array_equal(again.labels, dataset.labels)
        assert (again.num_classes, again.labels.dtype) == (10, np.int32)


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"not an archive"])
def test_a_damaged_cache_is_rewritten(mnist, damage):
    first = load("mnist", data_dir=mnist)
    (cache,) = mnist.rglob("*.npz")
    whole = cache.read_bytes()
    cache.write_bytes(damage(whole))
    np.testing.assert_array_equal(load("mnist", data_dir=mnist).images, first.images)
    assert len(cache.read_bytes()) == len(whole)


def test_a_cache_that_cannot_be_written_leaves_nothing_behind(mnist, monkeypatch):
    def fail_half_way(file, **arrays):
        file.write(b"half a file")
        raise OSError("no space left on device")

    before = set(mnist.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(sources.np, "savez", fail_half_way)
        assert len(load("mnist", data_dir=mnist)) == 10
    assert set(mnist.rglob("*")) == before
    with monkeypatch.context() as patch:  # a directory without write permission
        patch.setattr(tempfile, "NamedTemporaryFile", lambda **_: (_ for _ in ()).throw(PermissionError("read-only")))
        assert len(load("mnist", data_dir=mnist)) == 10
    assert set(mnist.rglob("*")) == before


def test_the_error_for_an_absent_dataset_names_it_its_directory_and_the_remedies(tmp_path, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(DatasetUnavailable) as error:
        load("fashion_mnist", data_dir=tmp_path)
    message = str(error.value)
    for part in (
        "'fashion_mnist'",
        str(tmp_path / "fashion_mnist"),
        "download_and_prepare()",
        'pip install "cbp-jax[prepare]"',
        "cbp-jax data prepare fashion_mnist --from DIR",
        "TFDS_DATA_DIR",
        "'digits'",
    ):
        assert part in message
    # The command is valid Python.
    command = message.split('python -c "')[1].split('"\n')[0]
    compile(command, "command", "exec")
    assert list(tmp_path.iterdir()) == []

    with pytest.raises(DatasetUnavailable) as error:
        load("cifar100", data_dir=tmp_path)
    assert "data prepare" not in str(error.value)  # the command cannot prepare this dataset
    with pytest.raises(DatasetUnavailable, match="six binary batch files, without TensorFlow"):
        load("cifar10", data_dir=tmp_path)


def test_the_home_directory_is_expanded(tmp_path, monkeypatch, write_idx, tiny_splits):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_idx(tmp_path / "source", tiny_splits)
    path = prepare("mnist", "~/source", "~/data")
    assert path.is_relative_to(tmp_path / "data")
    assert len(load("mnist", data_dir="~/data")) == 10


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", "unknown dataset 'nonsense'; known are digits, mnist, fashion_mnist"),
        ("minst", r"unknown dataset 'minst' \(did you mean .*mnist.*known are digits"),
        ("huggingface:mnist", "unknown dataset 'huggingface:mnist'; known are"),
        ("../mnist", "unknown dataset"),
        ("emnist/unbalanced", "unknown config or version .* its configs are byclass, bymerge, balanced"),
        ("mnist:0.0.1", r"unknown config or version .*3\.0\.1"),
        ("imdb_reviews", r"must have labeled images: its features are \['label', 'text'\]"),
        ("oxford_flowers102", "must have uint8 images of one size"),
    ],
)
def test_unknown_datasets(name, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(name, data_dir=tmp_path)


@pytest.mark.parametrize("split", ["validation", "train[", ""])
def test_unknown_splits(split, mnist):
    with pytest.raises(ValueError, match=r"unknown split .* it has \['test', 'train'\]"):
        load("mnist", split, data_dir=mnist)


def test_listed_names_are_known(tmp_path):
    assert names()[0] == "digits" and {"mnist", "fashion_mnist"} < set(names())
    for name in names()[1:]:
        with pytest.raises(DatasetUnavailable, match=name):
            load(name, data_dir=tmp_path)


@pytest.mark.parametrize(
    ("module", "use"),
    [
        ("tensorflow_datasets", lambda folder: load("mnist", data_dir=folder)),
        ("tensorflow_datasets", lambda folder: prepare("mnist", folder)),
        ("PIL.Image", lambda folder: load("mnist", data_dir=folder)),
        ("sklearn.datasets", lambda folder: load("digits")),
    ],
)
def test_a_missing_extra_says_how_to_install_it(module, use, mnist, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'needs \w+, which .*: pip install "cbp-jax\[data\]"'):
        use(mnist)


def test_importing_needs_no_extra():
    code = "import sys, cbp_jax.data; print({'tensorflow_datasets', 'sklearn', 'PIL'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
