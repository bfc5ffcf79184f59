"""Multilayer perceptron."""

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import jax
from flax import linen as nn

from cbp_jax.nets.activations import Activation, get_activation
from cbp_jax.nets.initializers import BiasInit, bias_initializer, check_bias_init
from cbp_jax.nets.online_norm import OnlineNorm


class MLP(nn.Module):
    """Dense layers. All but the last have an activation, with optional normalization before and dropout after it.

    The layers are named `Dense_0`, `Dense_1`, ... from the input on, and those that normalize `LayerNorm_0` or
    `OnlineNorm_0`, ... The network of Elsayed & Mahmood (ICLR 2024) is `MLP((300, 150), num_outputs,
    kernel_init=fan_in_uniform(), bias_init="fan_in")`.

    Attributes:
      hidden: number of units of each hidden layer.
      num_outputs: number of outputs of the last layer, which has no activation.
      activation: a name of `get_activation`, or a function of one array.
      dropout_rate: fraction of the hidden units dropped in training, in [0, 1). Above 0 a call with
        `train=True` needs `rngs={"dropout": key}`.
      kernel_init: a `jax.nn.initializers` function. The default, Kaiming uniform, is what the Nature paper used.
      normalization: normalization of hidden layers before their activation: "layer" with a learned scale and offset (Ba
        et al. 2016); "bare_layer" without these, as in Elsayed et al. (2024); "online", see `OnlineNorm`, whose
        statistics are additional variables, so that the optimizer must be wrapped in `keep_online_stats`; or None.
      bias_init: a `jax.nn.initializers` function, 0 by default; or "fan_in", uniform in ±1 / sqrt(inputs of the layer).
      output_init: `kernel_init` of the last layer, if different, such as `kaiming_uniform("identity")`.
      flatten: whether to flatten all axes of inputs but the first, as for images.

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
    normalization: Literal["layer", "online", "bare_layer"] | None = None
    bias_init: BiasInit = nn.initializers.zeros
    output_init: nn.initializers.Initializer | None = None
    flatten: bool = False

    def __post_init__(self):
        get_activation(self.activation)
        check_dropout_rate(self.dropout_rate)
        check_bias_init(self.bias_init)
        if self.normalization not in (None, *NORMALIZATIONS):
            raise ValueError(f"normalization must be None or one of {[*NORMALIZATIONS]}, got {self.normalization!r}")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Map features [..., inputs] to outputs [..., num_outputs]; `train=True` turns dropout on."""
        if self.flatten:
            x = x.reshape(x.shape[0], -1)
        for size in self.hidden:
            x = self._dense(size, x.shape[-1], self.kernel_init)(x)
            if self.normalization is not None:
                x = NORMALIZATIONS[self.normalization]()(x)
            x = get_activation(self.activation)(x)
            if self.dropout_rate > 0:
                x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return self._dense(self.num_outputs, x.shape[-1], self.output_init or self.kernel_init)(x)

    def _dense(self, size: int, inputs: int, kernel_init: nn.initializers.Initializer) -> nn.Dense:
        return nn.Dense(size, kernel_init=kernel_init, bias_init=bias_initializer(self.bias_init, inputs))


NORMALIZATIONS: dict[str, Callable[..., nn.Module]] = {
    "layer": nn.LayerNorm,
    "online": OnlineNorm,
    "bare_layer": functools.partial(nn.LayerNorm, epsilon=1e-5, use_scale=False, use_bias=False),
}


def check_dropout_rate(rate: float) -> None:
    """Raise a `ValueError` unless the rate is in [0, 1)."""
    if not 0 <= rate < 1:
        raise ValueError(f"dropout_rate must be in [0, 1), got {rate}")
