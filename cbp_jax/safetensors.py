"""Reads and writes safetensors files, a common format for weights, with NumPy only.

A file consists of eight bytes, the header's length as a little-endian number; the header, a JSON object with the type,
shape and offsets of each tensor by name; and the tensors' bytes. https://github.com/huggingface/safetensors specifies
the format.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from cbp_jax import files

_TYPES = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "BOOL": np.bool_},
    **{f"{kind}{bits}": np.dtype(f"{kind.lower()}{bits // 8}") for kind in "IU" for bits in (8, 16, 32, 64)},
}
_NAMES = {np.dtype(dtype): name for name, dtype in _TYPES.items()}


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read all tensors of a file.

    Args:
      path: of the file.

    Returns:
      arrays by name. They are read-only and memory-mapped: read from the disk when used.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, or not of this format, or a tensor has a type that NumPy does not know.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> write(path, {"w": np.ones((2, 3), np.float32)})
      >>> {name: tensor.shape for name, tensor in read(path).items()}
      {'w': (2, 3)}
    """
    path = Path(path)
    size = path.stat().st_size
    content = np.memmap(path, np.uint8, mode="r") if size else np.zeros(0, np.uint8)
    try:
        length = int.from_bytes(content[:8].tobytes(), "little")
        if not 2 <= length <= size - 8:
            raise ValueError(f"its header is said to have {length} bytes, and the file has {size}")
        header = json.loads(content[8 : 8 + length].tobytes())
        body = content[8 + length :]
        header.pop("__metadata__", None)
        tensors = {name: _tensor(name, body, **entry) for name, entry in header.items()}
        if sum(tensor.nbytes for tensor in tensors.values()) != len(body):
            raise ValueError(f"its tensors do not make up the {len(body)} bytes that it holds")
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    return tensors


def _tensor(name: str, body: np.ndarray, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
    if dtype not in _TYPES:
        raise ValueError(f"tensor {name!r} is of type {dtype!r}; known are {list(_TYPES)}")
    kind, (start, stop) = np.dtype(_TYPES[dtype]), data_offsets
    if not 0 <= start <= stop <= len(body) or stop - start != math.prod(shape) * kind.itemsize:
        raise ValueError(f"tensor {name!r}, {dtype} {shape}, is said to be at {data_offsets} of {len(body)} bytes")
    return body[start:stop].view(kind).reshape(shape)


def write(
    path: str | os.PathLike, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a file atomically.

    Args:
      path: of the file.
      tensors: arrays by name.
      metadata: texts by name, stored with them.

    Raises:
      ValueError: a tensor is of a type that the format does not have.
      OSError: the file cannot be written. An existing file is not changed.
    """
    arrays = {name: np.ascontiguousarray(tensor).reshape(np.shape(tensor)) for name, tensor in tensors.items()}
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    # Wide types first, so that every tensor starts at a multiple of its type's size.
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    for name in order:
        array = arrays[name]
        if array.dtype not in _NAMES:
            raise ValueError(f"tensor {name!r} must be of a type of {list(_TYPES)}, got {array.dtype}")
        offsets = [start, start + array.nbytes]
        header[name] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
        start += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    files.write_whole(Path(path), len(text).to_bytes(8, "little"), text, *(arrays[name].tobytes() for name in order))
