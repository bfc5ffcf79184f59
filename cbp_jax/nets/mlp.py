"""Multilayer perceptron."""

from collections.abc import Sequence

import jax
from flax import linen as nn

from cbp_jax.nets.activations import Activation, get_activation


class MLP(nn.Module):
    """Dense layers with an activation, and dropout where wanted, after each but the last.

    The layers are named `Dense_0`, `Dense_1`, ... from the input on. Biases start at 0.

    Attributes:
      hidden: number of units of each hidden layer.
      num_outputs: number of outputs of the last layer, which has no activation.
      activation: a name of `get_activation`, or a function of one array.
      dropout_rate: fraction of the hidden units dropped in training, in [0, 1). Above 0 a call with
        `deterministic=False` needs `rngs={"dropout": key}`.
      kernel_init: a `jax.nn.initializers` function. The default, Kaiming uniform, is what the Nature paper used.

    Raises:
      ValueError: an attribute is out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> net = MLP(hidden=(100, 100), num_outputs=10)
      >>> params = net.init(jax.random.key(0), jnp.zeros((1, 784)))
      >>> net.apply(params, jnp.zeros((32, 784))).shape, sorted(params["params"])
      ((32, 10), ['Dense_0', 'Dense_1', 'Dense_2'])
    """

    hidden: Sequence[int]
    num_outputs: int
    activation: str | Activation = "relu"
    dropout_rate: float = 0.0
    kernel_init: nn.initializers.Initializer = nn.initializers.he_uniform()

    def __post_init__(self):
        get_activation(self.activation)
        check_dropout_rate(self.dropout_rate)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Maps features [..., inputs] to outputs [..., num_outputs]; `deterministic=False` turns dropout on."""
        for size in self.hidden:
            x = nn.Dense(size, kernel_init=self.kernel_init)(x)
            x = get_activation(self.activation)(x)
            if self.dropout_rate > 0:
                x = nn.Dropout(self.dropout_rate, deterministic=deterministic)(x)
        return nn.Dense(self.num_outputs, kernel_init=self.kernel_init)(x)


def check_dropout_rate(rate: float) -> None:
    """Raises a `ValueError` unless the rate is in [0, 1)."""
    if not 0 <= rate < 1:
        raise ValueError(f"dropout_rate must be in [0, 1), got {rate}")
