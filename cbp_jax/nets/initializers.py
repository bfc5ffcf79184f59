"""Initial weights of the papers' networks."""

import math
from typing import Literal

import jax
from flax import linen as nn

BiasInit = nn.initializers.Initializer | Literal["fan_in"]

# The gain that keeps the size of activations from layer to layer, as the Nature paper chose it.
GAINS = {
    "identity": 1.0,
    "sigmoid": 1.0,
    "tanh": 5 / 3,
    "relu": math.sqrt(2),
    "crelu": math.sqrt(2),
    "fourier": math.sqrt(2),  # the mean square of the two is 1/2
    "leaky_relu": math.sqrt(2 / (1 + 0.01**2)),
    "elu": math.sqrt(2),
    "silu": math.sqrt(2),
    "swish": math.sqrt(2),
}


def kaiming_uniform(activation: str) -> nn.initializers.Initializer:
    """Kaiming's initializer with the gain of an activation.

    Weights are uniform in ±gain sqrt(3 / fan_in); that of "relu" is `jax.nn.initializers.he_uniform()`.

    Args:
      activation: "identity" (of an output layer), "sigmoid", "tanh", "relu", "crelu", "fourier", "leaky_relu", "elu",
        "silu" or "swish".

    Returns:
      a `jax.nn.initializers` function.

    Raises:
      ValueError: there is no gain for that activation.

    Example:
      >>> import jax
      >>> weights = kaiming_uniform("tanh")(jax.random.key(0), (75, 1000))
      >>> round(float(abs(weights).max()), 2)
      0.33

    References:
      Dohare et al., `Loss of plasticity in deep continual learning
      <https://doi.org/10.1038/s41586-024-07711-7>`_, Nature 2024, Methods
    """
    if activation not in GAINS:
        raise ValueError(f"activation must be one of {sorted(GAINS)}, got {activation!r}")
    return nn.initializers.variance_scaling(GAINS[activation] ** 2, "fan_in", "uniform")


def fan_in_uniform() -> nn.initializers.Initializer:
    """Weights uniform in ±1 / sqrt(fan_in), as layers of PyTorch start.

    These are what Elsayed & Mahmood (ICLR 2024) used, together with `bias_init="fan_in"`, which draws biases from
    the same range.

    Returns:
      a `jax.nn.initializers` function.

    Example:
      >>> import jax
      >>> round(float(abs(fan_in_uniform()(jax.random.key(0), (25, 1000))).max()), 2)
      0.2
    """
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def bias_initializer(bias_init: BiasInit, fan_in: int) -> nn.initializers.Initializer:
    """The initializer of a layer's biases, which for "fan_in" depends on its number of inputs."""
    if bias_init != "fan_in":
        return bias_init
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jax.numpy.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def check_bias_init(bias_init: BiasInit) -> None:
    """Raises a `ValueError` unless it is a function or "fan_in"."""
    if not callable(bias_init) and bias_init != "fan_in":
        raise ValueError(f"bias_init must be a function or 'fan_in', got {bias_init!r}")
