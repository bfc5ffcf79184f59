"""Activations by name, so that a setting or a command line can choose one."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

Activation = Callable[[jax.Array], jax.Array]


def crelu(x: jax.Array) -> jax.Array:
    """Concatenated ReLU: the positive part of every unit and then the negative part, side by side.

    The next layer has twice as many inputs; a unit has two positions, of which one is active, so that it cannot die.

    Args:
      x: [..., units].

    Returns:
      [..., 2 units].

    Example:
      >>> import jax.numpy as jnp
      >>> crelu(jnp.array([-1.0, 2.0])).tolist()
      [0.0, 2.0, 1.0, 0.0]

    References:
      Shang et al., `Understanding and Improving Convolutional Neural Networks via Concatenated Rectified Linear Units
      <https://arxiv.org/abs/1603.05201>`_, ICML 2016
    """
    return jnp.concatenate([nn.relu(x), nn.relu(-x)], axis=-1)


_ACTIVATIONS: dict[str, Activation] = {
    "relu": nn.relu,
    "crelu": crelu,
    "leaky_relu": nn.leaky_relu,
    "elu": nn.elu,
    "selu": nn.selu,
    "gelu": nn.gelu,
    "silu": nn.silu,
    "swish": nn.silu,
    "softplus": nn.softplus,
    "sigmoid": nn.sigmoid,
    "tanh": nn.tanh,
    "identity": lambda x: x,
}


def get_activation(activation: str | Activation) -> Activation:
    """The function of a name, elementwise but for "crelu"; a function is returned as it is.

    Args:
      activation: "relu", "crelu", "leaky_relu", "elu", "selu", "gelu", "silu" or "swish", which are one, "softplus",
        "sigmoid", "tanh", "identity", or a function of one array.

    Returns:
      a function of one array.

    Raises:
      ValueError: the name is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> get_activation("relu")(jnp.array([-1.0, 2.0])).tolist()
      [0.0, 2.0]
    """
    if callable(activation):
        return activation
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be a function or one of {sorted(_ACTIVATIONS)}, got {activation!r}")
    return _ACTIVATIONS[activation]
