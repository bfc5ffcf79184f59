import numpy as np
import pytest

from cbp_jax.data import load

IMAGES = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
LABELS = np.array([2, 0, 4], np.uint16)


def write(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_images(tmp_path):
    path = write(tmp_path / "scrawls.npz", image=IMAGES, label=LABELS, label_names=np.array([*"abcdefg"]))
    dataset = load(str(path))
    assert repr(dataset) == "Dataset(scrawls: 3 images of 4x5x1, 7 classes)"
    np.testing.assert_array_equal(dataset.images[..., 0], IMAGES)
    assert dataset.labels.tolist() == [2, 0, 4] and dataset.labels.dtype == np.int32
    assert dataset.max_value == 255


@pytest.mark.parametrize(
    ("inputs", "labels"), [("images", "labels"), ("x", "y"), ("features", "target"), ("x", "targets")]
)
def test_other_names_and_no_names_of_classes(tmp_path, inputs, labels):
    path = write(
        tmp_path / "a.npz", **{inputs: np.stack([IMAGES, IMAGES, IMAGES], -1), labels: LABELS.astype(np.int64)}
    )
    dataset = load(path)  # a path that is not a string
    assert (dataset.image_shape, dataset.num_classes) == ((4, 5, 3), 5)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_features(tmp_path, dtype):
    features = np.random.default_rng(0).normal(size=(3, 2048)).astype(dtype)
    dataset = load(write(tmp_path / "mini.v2.npz", features=features, labels=LABELS))
    assert (dataset.name, dataset.has_features, dataset.images.dtype) == ("mini.v2", True, np.float32)
    np.testing.assert_array_equal(dataset.images, features.astype(np.float32))


def test_splits_with_their_own_arrays(tmp_path):
    path = write(tmp_path / "a.npz", x_train=IMAGES, y_train=LABELS, x_test=IMAGES[:2], y_test=LABELS[:2])
    assert [len(load(path, split)) for split in ("train", "test")] == [3, 2]
    with pytest.raises(
        ValueError, match=r"of the split 'validation', one of image_validation, .* it holds x_test, x_tr"
    ):
        load(path, "validation")


def test_a_structured_npy_file(tmp_path):
    records = np.zeros(3, [("image", np.uint8, (4, 5)), ("label", np.int64)])
    records["image"], records["label"] = IMAGES, LABELS
    np.save(tmp_path / "records.npy", records)
    dataset = load(tmp_path / "records.npy")
    np.testing.assert_array_equal(dataset.images[..., 0], IMAGES)
    assert (dataset.name, dataset.labels.tolist()) == ("records", [2, 0, 4])
    np.save(tmp_path / "plain.npy", IMAGES)
    with pytest.raises(
        ValueError, match=r"exactly one array of images or features .* it holds one array without a name"
    ):
        load(tmp_path / "plain.npy")


def test_a_home_directory_and_a_missing_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.npz", x=IMAGES, y=LABELS)
    assert len(load("~/a.npz")) == 3
    with pytest.raises(FileNotFoundError, match=r"there is no file .*/b\.npz to load a dataset from"):
        load("~/b.npz")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": IMAGES}, "exactly one array of labels of the split 'train', one of label_train, .*; it holds x$"),
        ({"y": LABELS}, "exactly one array of images or features"),
        ({"x": IMAGES, "image": IMAGES, "y": LABELS}, "exactly one array of images or features"),
        ({"x": IMAGES.reshape(3, 20), "y": LABELS}, r"x of .*a\.npz must be uint8 .* got uint8 \[3, 20\]"),
        ({"x": IMAGES.astype(np.float32), "y": LABELS}, r"got float32 \[3, 4, 5\]"),
        ({"x": IMAGES[:0], "y": LABELS[:0]}, "and not empty"),
        ({"x": IMAGES, "y": LABELS[:2]}, r"y of .*a\.npz must be integers \[3\] from 0 on; got uint16 \[2\]"),
        ({"x": IMAGES, "y": LABELS / 2}, r"got float64 \[3\]"),
        ({"x": IMAGES, "y": np.array([*"abc"])}, r"got <U1 \[3\]"),
        ({"x": IMAGES, "y": LABELS.astype(int) - 1}, r"from 0 on; got int64 \[3\] from -1 on"),
        ({"x": IMAGES, "y": LABELS, "label_names": np.array(["a", "b"])}, "from 0 to num_classes - 1 = 1; got 0 to 4"),
        (
            {"x": IMAGES, "y": np.array([0, 1, 2**40]), "label_names": np.array(["a", "b"])},
            r"y of .*a\.npz must be from 0 to num_classes - 1 = 1; got 0 to 1099511627776",
        ),
        ({"x": IMAGES, "y": np.array([0, 1, 2**62])}, r"y of .*a\.npz must be below 100000 .* got 4611686018427387904"),
        ({"x": IMAGES, "y": np.array([0, 1, 10**9], np.uint64)}, "must be below 100000 .* got 1000000000"),
    ],
)
def test_bad_files(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path / "a.npz", **arrays))


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 half an archive"])
def test_a_damaged_file(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz is not a file of arrays"):
        load(tmp_path / "a.npz")


def test_quick_draw(real_data):
    dataset = load(real_data / "quickdraw345.npz")
    assert repr(dataset) == "Dataset(quickdraw345: 34500 images of 28x28x1, 345 classes)"
    assert (np.bincount(dataset.labels) == 100).all()


def test_a_path_is_not_a_name_of_tensorflow_datasets(tmp_path):
    with pytest.raises(ValueError, match=r"unknown dataset .*must end in \.npz or \.npy"):
        load(tmp_path / "a.csv")


@pytest.mark.parametrize("at", [0.3, 0.5, 0.7])
def test_errors_of_damaged_compressed_arrays_name_the_file_and_the_array(tmp_path, at):
    path = tmp_path / "a.npz"
    rng = np.random.default_rng(0)
    np.savez_compressed(path, x=rng.integers(0, 256, (50, 8, 8), dtype=np.uint8), y=np.arange(50) % 3)
    damaged = bytearray(path.read_bytes())
    middle = int(at * 3000)  # within the images
    damaged[middle : middle + 20] = bytes(byte ^ 0xFF for byte in damaged[middle : middle + 20])
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"a\.npz is damaged: its array 'x' cannot be read"):
        load(path)
