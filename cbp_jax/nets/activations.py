"""Activations by name, so that a setting or a command line can choose one."""

from collections.abc import Callable

import jax
from flax import linen as nn

Activation = Callable[[jax.Array], jax.Array]

_ACTIVATIONS: dict[str, Activation] = {
    "relu": nn.relu,
    "leaky_relu": nn.leaky_relu,
    "elu": nn.elu,
    "selu": nn.selu,
    "gelu": nn.gelu,
    "silu": nn.silu,
    "softplus": nn.softplus,
    "sigmoid": nn.sigmoid,
    "tanh": nn.tanh,
    "identity": lambda x: x,
}


def get_activation(activation: str | Activation) -> Activation:
    """The elementwise function of a name; a function is returned as it is.

    Args:
      activation: "relu", "leaky_relu", "elu", "selu", "gelu", "silu", "softplus", "sigmoid", "tanh", "identity", or
        a function of one array.

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
