import gzip

import numpy as np
import pytest

from cbp_jax.data import DatasetUnavailable, load, prepare


def by_index(dataset):
    """Return images and labels in the order of the first pixel."""
    order = np.argsort(dataset.images[:, 0, 0, 0])
    return dataset.images[order, :, :, 0], dataset.labels[order]


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist"])
@pytest.mark.parametrize("gz", [False, True])
def test_prepare_then_load(name, gz, tmp_path, write_idx, tiny_splits):
    source = write_idx(tmp_path / "source", tiny_splits, gz)
    path = prepare(name, source, tmp_path / "data")
    assert path.is_relative_to(tmp_path / "data" / name)
    for split, (images, labels) in tiny_splits.items():
        dataset = load(name, split, data_dir=tmp_path / "data")
        np.testing.assert_array_equal(by_index(dataset)[0], images)
        np.testing.assert_array_equal(by_index(dataset)[1], labels)
        assert (dataset.name, dataset.num_classes, dataset.max_value) == (name, 10, 255)


def test_the_result_is_an_ordinary_dataset_of_tensorflow_datasets(tmp_path, write_idx, tiny_splits):
    import tensorflow_datasets as tfds

    path = prepare("fashion_mnist", write_idx(tmp_path / "source", tiny_splits), tmp_path)
    load("fashion_mnist", data_dir=tmp_path)  # writes its cache there
    builder = tfds.builder("fashion_mnist", data_dir=tmp_path)
    assert type(builder) is tfds.builder_cls("fashion_mnist")  # the stand-in is not registered
    assert builder.is_prepared() and builder.info.features["label"].int2str(9) == "Ankle boot"
    examples = list(tfds.builder_from_directory(path).as_data_source("test"))
    assert {int(e["image"][0, 0, 0]): int(e["label"]) for e in examples} == dict(enumerate(tiny_splits["test"][1]))


def test_a_prepared_dataset_is_left_as_it_is(tmp_path, write_idx, tiny_splits):
    source = write_idx(tmp_path / "source", tiny_splits)
    path = prepare("mnist", source, tmp_path)
    before = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    assert prepare("mnist", source, tmp_path) == path
    assert {file: file.stat().st_mtime_ns for file in path.iterdir()} == before


def test_a_dataset_that_only_tensorflow_reads_is_not_readable(tmp_path, write_idx, tiny_splits):
    source = write_idx(tmp_path / "source", tiny_splits)
    info = prepare("mnist", source, tmp_path) / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    for attempt in (lambda: load("mnist", data_dir=tmp_path), lambda: prepare("mnist", source, tmp_path)):
        with pytest.raises(DatasetUnavailable, match="is prepared as tfrecord"):
            attempt()


def test_a_folder_that_holds_no_dataset_is_refused(tmp_path, write_idx, tiny_splits):
    (tmp_path / "mnist" / "3.0.1").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="is not a prepared dataset"):
        prepare("mnist", write_idx(tmp_path / "source", tiny_splits), tmp_path)


def test_missing_files_are_listed(tmp_path, write_idx, tiny_splits):
    source = write_idx(tmp_path / "source", {"train": tiny_splits["train"]})
    with pytest.raises(FileNotFoundError, match=r"missing: t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte$"):
        prepare("mnist", source, tmp_path / "data")
    with pytest.raises(FileNotFoundError, match=r"missing: train-images-idx3-ubyte, train-"):
        prepare("mnist", tmp_path / "nowhere", tmp_path / "data")


IMAGES = "train-images-idx3-ubyte"
LABELS = "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (IMAGES, lambda b: b[:-1], "it has 7855 bytes"),
        (IMAGES, lambda b: b + b"0", "it has 7857 bytes"),
        (IMAGES, lambda b: b[:10], "must be an IDX file of bytes with 3 axes"),
        (IMAGES, lambda b: b"", "it starts with nothing"),
        (IMAGES, lambda b: b"\x00\x00\x0d" + b[3:], "must be an IDX file of bytes"),
        (IMAGES, lambda b: gzip.compress(b)[:-20], "is not a whole gzip file"),
        (IMAGES, lambda b: b[:8] + b[12:16] + bytes((0, 0, 0, 14)) + b[16:4 + 12 + 3920], "28 x 28 pixels"),
        (LABELS, lambda b: bytes((0, 0, 8, 1, 0, 0, 0, 9)) + b[8:17], "got 10 images and 9 labels"),
        (LABELS, lambda b: b[:-1] + b"\x0a", "from 0 to 9; got 10"),
        (LABELS, lambda b: bytes((0, 0, 8, 3)) + b[4:], "with 1 axes"),
    ],
)  # fmt: skip
def test_bad_files_are_named_before_anything_is_written(tmp_path, write_idx, tiny_splits, file, change, message):
    source = write_idx(tmp_path / "source", tiny_splits)
    (source / file).write_bytes(change((source / file).read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        prepare("mnist", source, tmp_path / "data")
    assert str(source / file) in str(error.value)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", ["digits", "cifar100", "nonsense"])
def test_only_these_datasets_can_be_prepared(name, tmp_path):
    with pytest.raises(ValueError, match="name must be one of mnist, fashion_mnist, kmnist, cifar10"):
        prepare(name, tmp_path)


BATCHES = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]


@pytest.fixture
def batches(tmp_path):
    """Make a folder with six batches of 2 images. An image's red pixel [0, 1] is its number, and [1, 0] its batch."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "source"
    folder.mkdir()
    for number, file in enumerate(BATCHES):
        records = rng.integers(0, 256, (2, 3073), dtype=np.uint8)
        records[:, 0] = [number, 9 - number]
        records[:, 1 + 1] = [0, 1]
        records[:, 1 + 32] = number
        (folder / file).write_bytes(records.tobytes())
    return folder


def test_cifar10_from_its_batches(batches, tmp_path):
    import tensorflow_datasets as tfds

    zipped = batches / "data_batch_3.bin"
    (batches / "data_batch_3.bin.gz").write_bytes(gzip.compress(zipped.read_bytes()))
    zipped.unlink()
    path = prepare("cifar10", batches, tmp_path / "data")
    train, test = (load("cifar10", split, data_dir=tmp_path / "data") for split in ("train", "test"))
    assert (train.images.shape, test.images.shape) == ((10, 32, 32, 3), (2, 32, 32, 3))
    assert (train.name, train.num_classes, train.max_value) == ("cifar10", 10, 255)
    numbers = zip(train.images[:, 1, 0, 0].tolist(), train.images[:, 0, 1, 0].tolist(), strict=True)
    found = dict(zip(numbers, train.labels.tolist(), strict=True))
    assert found == {(batch, i): (batch, 9 - batch)[i] for batch in range(5) for i in range(2)}
    # Every pixel: red, green and blue planes, row by row.
    record = np.frombuffer((batches / "test_batch.bin").read_bytes(), np.uint8).reshape(2, 3073)[1]
    image = test.images[test.images[:, 0, 1, 0].tolist().index(1)]
    for y, x, color in ((0, 0, 0), (0, 31, 1), (17, 5, 2), (31, 31, 2)):
        assert image[y, x, color] == record[1 + 1024 * color + 32 * y + x]
    builder = tfds.builder_from_directory(path)
    assert builder.info.features["label"].int2str(9) == "truck"
    assert {example["id"].decode() for example in builder.as_data_source("test")} == {"test_00000", "test_00001"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b[:-1], "records of 3073 bytes, .* it has 6145 bytes"),
        (lambda b: b"", "it has 0 bytes"),
        (lambda b: b"\x0a" + b[1:], "labels from 0 to 9; got 10"),
    ],
)
def test_bad_batches_are_named_before_anything_is_written(batches, tmp_path, change, message):
    file = batches / "data_batch_2.bin"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        prepare("cifar10", batches, tmp_path / "data")
    assert str(file) in str(error.value)
    assert not (tmp_path / "data").exists()


def test_missing_batches_are_listed(batches, tmp_path):
    (batches / "test_batch.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"six binary batch files of cifar10, .* missing: test_batch.bin$"):
        prepare("cifar10", batches, tmp_path / "data")


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_real_files(name, real_data, tmp_path, write_idx):
    """Prepare and load the first images of the official files."""

    def head(file, header, each, n=64):
        content = gzip.decompress((real_data / name / f"{file}.gz").read_bytes())
        return np.frombuffer(content[header : header + n * each], np.uint8)

    splits = {
        split: (
            head(f"{prefix}-images-idx3-ubyte", 16, 784).reshape(-1, 28, 28),
            head(f"{prefix}-labels-idx1-ubyte", 8, 1),
        )
        for split, prefix in (("train", "train"), ("test", "t10k"))
    }
    expected = {"mnist": [5, 0, 4, 1, 9], "fashion_mnist": [9, 0, 0, 3, 0]}[name]
    assert splits["train"][1][:5].tolist() == expected
    prepare(name, write_idx(tmp_path / "source", splits), tmp_path)
    for split, (images, labels) in splits.items():
        dataset = load(name, split, data_dir=tmp_path)
        loaded = {image.tobytes(): label for image, label in zip(dataset.images, dataset.labels, strict=True)}
        assert loaded == {image.tobytes(): label for image, label in zip(images, labels, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_real_files_whole(name, real_data, tmp_path):
    prepare(name, real_data / name, tmp_path)
    train, test = load(name, "train", data_dir=tmp_path), load(name, "test", data_dir=tmp_path)
    assert train.images.shape == (60000, 28, 28, 1) and test.images.shape == (10000, 28, 28, 1)
    counts = {
        "mnist": [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
        "fashion_mnist": [6000] * 10,
    }
    assert np.bincount(train.labels).tolist() == counts[name]
    np.testing.assert_array_equal(load(name, "train", data_dir=tmp_path).images, train.images)  # from the cache
