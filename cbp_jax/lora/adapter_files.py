"""Reads and writes adapters in PEFT's file format."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cbp_jax import files, safetensors
from cbp_jax.lora.adapter import Adapter, init, sizes_of

_PREFIX = "base_model.model."
Names = Mapping[str, str] | Callable[[str], str]
# With other values of these, a change in PEFT is not simply the product of its factors.
_PLAIN = {"use_rslora": False, "use_dora": False, "bias": "none", "rank_pattern": {}, "alpha_pattern": {}}


def save(adapter: Adapter, directory: str | os.PathLike, *, names: Names | None = None) -> Path:
    """Write an adapter in PEFT's format: `adapter_model.safetensors` and `adapter_config.json`.

    Factors are transposed to PyTorch's order. Attention kernels with an axis for heads become matrices.

    Args:
      adapter: the adapter.
      directory: folder for the files, created if needed.
      names: maps the path of a kernel to the name of a module in the PyTorch network, a mapping or a function. By
        default the path's keys joined by dots, without "params" and the kernel's own key: "params/up/kernel" becomes
        "up". For `cbp_jax.nets.Bert` use `hugging_face_names(net)`.

    Returns:
      the folder.

    Raises:
      ValueError: a kernel has no name, two kernels have the same name, or kernels are stacked.
    """
    modules = _modules(adapter, names)
    tensors = {}
    for path, module in modules.items():
        for name, array in _to_torch(adapter, path).items():
            tensors[f"{_PREFIX}{module}.{name}"] = array
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha,
        "target_modules": sorted(modules.values()),
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        **_PLAIN,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    safetensors.write(directory / "adapter_model.safetensors", tensors, {"format": "pt"})
    files.write_whole(directory / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True).encode())
    return directory


def load(
    directory: str | os.PathLike,
    params: optax.Params,
    *,
    names: Names | None = None,
    axes: Mapping[str, tuple[Sequence[int], Sequence[int]]] | None = None,
) -> Adapter:
    """Read an adapter written by `save` or by PEFT.

    Args:
      directory: the folder.
      params: the params that it is for.
      names: as in `save`.
      axes: as in `init`.

    Returns:
      the adapter.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the files do not hold a plain LoRA adapter of one rank, or its kernels are not in the params.
    """
    directory = Path(directory)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"there is no file {directory / name} to load an adapter from")
    try:
        config = json.loads((directory / "adapter_config.json").read_text())
    except ValueError as error:
        raise ValueError(f"{directory / 'adapter_config.json'} is not JSON: {error}") from error
    if missing := [name for name in ("r", "lora_alpha") if name not in config]:
        raise ValueError(f"{directory / 'adapter_config.json'} must have r and lora_alpha, {missing[0]} is missing")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{directory}: peft_type must be 'LORA', got {config.get('peft_type')!r}")
    for name, plain in _PLAIN.items():
        if (config.get(name) or plain) != plain:
            raise ValueError(f"{directory}: {name} must be {plain!r}, got {config[name]!r}")
    tensors = safetensors.read(directory / "adapter_model.safetensors")
    if not tensors:
        raise ValueError(f"{directory / 'adapter_model.safetensors'} has no tensors")
    whole = init(params, 0, rank=config["r"], alpha=config["lora_alpha"], axes=axes)
    there = {name.removeprefix(_PREFIX).partition(".lora_")[0] for name in tensors}
    modules = {path: name for path, name in _modules(whole, names, some=True).items() if name in there}
    if unknown := sorted(there - set(modules.values())):
        raise ValueError(f"{directory}: the params have no kernel for {', '.join(unknown)}; names says which is whose")
    adapter = init(params, 0, rank=config["r"], alpha=config["lora_alpha"], target_modules=list(modules), axes=axes)
    factors, unused = {}, set(tensors)
    for path, module in modules.items():
        like = jax.tree.map(np.asarray, _to_torch(adapter, path))
        found: dict[str, Any] = {name: tensors.get(f"{_PREFIX}{module}.{name}") for name in like}
        for name, tensor in found.items():
            unused.discard(f"{_PREFIX}{module}.{name}")
            if tensor is None or tensor.shape != like[name].shape:
                got = "is missing" if tensor is None else f"is {list(tensor.shape)}"
                raise ValueError(f"{directory}: {module}.{name} must be {list(like[name].shape)}, and {got}")
        factors[path] = _from_torch(adapter, path, found)
    if unused:
        raise ValueError(f"{directory}: {', '.join(sorted(unused))} is not part of a plain LoRA adapter")
    return dataclasses.replace(adapter, factors=factors)


def _modules(adapter: Adapter, names: Names | None, some: bool = False) -> dict[str, str]:
    """Return the module's name by the path of a kernel. If `some`, kernels without a name are omitted."""
    found = {}
    for path in adapter.factors:
        name: str | None
        if names is None:
            name = (path.rpartition("/")[0] or path).removeprefix("params/").replace("/", ".")
        else:
            name = names(path) if callable(names) else names.get(path)
        if name is None and not some:
            raise ValueError(f"names must have a module for {path!r}")
        if name is not None:
            found[path] = name.removesuffix(".weight")
    if len(set(found.values())) < len(found):
        raise ValueError(f"names must be different modules for different kernels, got {found}")
    return found


def _is_convolution(path: str, sizes: list[tuple[int, ...]]) -> bool:
    # The output projections of Flax's attention have three axes too.
    return len(sizes[1]) > 2 or (len(sizes[1]) == 2 and path.split("/")[-2:-1] != ["out"])


def _to_torch(adapter: Adapter, path: str) -> dict[str, np.ndarray]:
    """Return the factors of a kernel by PEFT's names: A [rank, in], B [out, rank]; for convolutions with spatial axes
    last."""
    sizes = sizes_of(adapter, path)
    if sizes[0]:
        raise ValueError(f"adapter: kernel {path!r} is stacked with others, which PEFT's format does not support")
    a, b = (np.asarray(adapter.factors[path][name], np.float32) for name in ("lora_A", "lora_B"))
    if path.endswith("embedding"):
        return {"lora_embedding_A": a.T, "lora_embedding_B": b.T}
    if _is_convolution(path, sizes):
        a = np.moveaxis(a, (-1, -2), (0, 1))
        b = b.T.reshape(*b.T.shape, *(1,) * (a.ndim - 2))
    else:
        a, b = a.reshape(-1, a.shape[-1]).T, b.reshape(b.shape[0], -1).T
    return {"lora_A.weight": a, "lora_B.weight": b}


def _from_torch(adapter: Adapter, path: str, tensors: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    (_, inside, outside), own = sizes_of(adapter, path), adapter.factors[path]
    a, b = (np.asarray(tensor, np.float32) for tensor in tensors.values())
    if a.ndim > 2:
        a = np.moveaxis(a, (0, 1), (-1, -2))
        b = b.reshape(b.shape[:2]).T
    else:
        a, b = a.T.reshape(*inside, -1), b.T.reshape(-1, *outside)
    return {"lora_A": jnp.asarray(a, own["lora_A"].dtype), "lora_B": jnp.asarray(b, own["lora_B"].dtype)}
