"""Activations by name, so that a setting or a command line can choose one."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

Activation = Callable[[jax.Array], jax.Array]


def crelu(x: jax.Array) -> jax.Array:
    """Apply concatenated ReLU: return the positive parts of all units, then the negative parts.

    The next layer has twice as many inputs. A unit has two positions, one of which is active, so it cannot die.

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


def fourier(x: jax.Array) -> jax.Array:
    r"""Compute deep Fourier features: return the sines of all units, then the cosines.

    .. math:: [\sin(z_1), \dots, \sin(z_n), \cos(z_1), \dots, \cos(z_n)]

    For every z, one of the two is close to a linear function of it, so that the network stays trainable like a deep
    linear network. The next layer has twice as many inputs. In the paper, layers have the same number of outputs as
    those of ReLU networks; for that, choose half as many hidden units. A unit has two positions, as with `crelu`:
    `discover_units` finds one group of n units, and if a unit is replaced, outgoing weights of both outputs become 0.

    Args:
      x: [..., units].

    Returns:
      [..., 2 units].

    Example:
      >>> import jax.numpy as jnp
      >>> fourier(jnp.array([0.0, jnp.pi / 2])).round(3).tolist()
      [0.0, 1.0, 1.0, -0.0]

    References:
      Lewandowski, Schuurmans & Machado, `Plastic learning with deep Fourier features
      <https://arxiv.org/abs/2410.20634>`_, ICLR 2025
    """
    return jnp.concatenate([jnp.sin(x), jnp.cos(x)], axis=-1)


_ACTIVATIONS: dict[str, Activation] = {
    "relu": nn.relu,
    "crelu": crelu,
    "fourier": fourier,
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
    """Look up an activation by name. All are elementwise except "crelu" and "fourier". A function is returned as it is.

    Args:
      activation: "relu", "crelu", "fourier", "leaky_relu", "elu", "selu", "gelu", "silu" or its synonym "swish",
        "softplus", "sigmoid", "tanh", "identity", or a function of one array.

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
