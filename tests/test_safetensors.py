import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from cbp_jax import safetensors

TENSORS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.arange(3, dtype=np.int64),
    "half": np.ones((2, 2), jnp.bfloat16),
    "bits": np.array([True, False, True]),
    "scalar": np.asarray(2.5, np.float16),
    "none": np.zeros((0, 4), np.uint8),
}


def test_tensors_are_the_same_after_writing_and_reading(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.write(path, TENSORS, {"format": "pt"})
    found = safetensors.read(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        np.testing.assert_array_equal(found[name], tensor)
    assert list(tmp_path.iterdir()) == [path]


def test_the_format_of_a_file(tmp_path):
    """As specified: a length, a header, and data in order, without gaps, aligned to multiples of their size."""
    path = tmp_path / "model.safetensors"
    safetensors.write(path, TENSORS, {"format": "pt"})
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    places = sorted(entry["data_offsets"] for entry in header.values())
    assert places[0][0] == 0 and places[-1][1] == len(content) - 8 - length
    assert all(before[1] == after[0] for before, after in itertools.pairwise(places))
    assert header["b"]["dtype"] == "F32" and header["b"]["shape"] == [2, 3] and header["half"]["dtype"] == "BF16"
    start, stop = header["b"]["data_offsets"]
    assert content[8 + length + start : 8 + length + stop] == TENSORS["b"].tobytes()
    assert all(header[name]["data_offsets"][0] % TENSORS[name].dtype.itemsize == 0 for name in header)


def test_files_are_compatible_with_the_safetensors_package(tmp_path):
    package = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    known = {name: tensor for name, tensor in TENSORS.items() if name != "half"}
    package.save_file(known, tmp_path / "theirs.safetensors")
    safetensors.write(tmp_path / "ours.safetensors", known)
    for found in (safetensors.read(tmp_path / "theirs.safetensors"), package.load_file(tmp_path / "ours.safetensors")):
        for name, tensor in known.items():
            np.testing.assert_array_equal(found[name], tensor)


def header(**entries):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "its header is said to have 0 bytes"),
        (b"\xff" * 20, "its header is said to have"),
        ((20).to_bytes(8, "little") + b"no json at all, just", "is not a whole safetensors file"),
        (header(w=F32) + b"1234", r"tensor 'w', F32 \[2\], is said to be at \[0, 8\] of 4 bytes"),
        (header(w=F32) + b"123456789", "its tensors do not make up the 9 bytes"),
        (header(w={**F32, "shape": [3]}) + b"12345678", r"tensor 'w', F32 \[3\], is said to be at"),
        (header(w={**F32, "dtype": "F8_E4M3"}) + b"12345678", "tensor 'w' is of type 'F8_E4M3'; known are"),
        (header(w={"dtype": "F32"}) + b"12345678", "is not a whole safetensors file"),
    ],
)
def test_damaged_files(content, message, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        safetensors.read(tmp_path / "model.safetensors")


def test_unsupported_types(tmp_path):
    with pytest.raises(ValueError, match=r"tensor 'c' must be of a type of .* got complex64"):
        safetensors.write(tmp_path / "model.safetensors", {"c": np.ones(2, np.complex64)})
    with pytest.raises(FileNotFoundError):
        safetensors.read(tmp_path / "model.safetensors")
