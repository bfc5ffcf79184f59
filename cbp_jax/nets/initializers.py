"""Initial weights of the papers' networks."""

import math
from typing import Any, Literal

import jax
from flax import linen as nn

BiasInit = nn.initializers.Initializer | Literal["fan_in"]

# The gain that preserves the size of activations from layer to layer, as chosen in the Nature paper.
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
    """Return Kaiming's initializer with the gain of an activation.

    Weights are uniform in ±gain sqrt(3 / fan_in). For "relu" it equals `jax.nn.initializers.he_uniform()`.

    Args:
      activation: "identity" (for an output layer), "sigmoid", "tanh", "relu", "crelu", "fourier", "leaky_relu", "elu",
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
    """Draw weights uniformly in ±1 / sqrt(fan_in), PyTorch's default.

    Elsayed & Mahmood (ICLR 2024) used it together with `bias_init="fan_in"`, which draws biases from the same range.

    Returns:
      a `jax.nn.initializers` function.

    Example:
      >>> import jax
      >>> round(float(abs(fan_in_uniform()(jax.random.key(0), (25, 1000))).max()), 2)
      0.2
    """
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def sparse(
    fraction: float = 0.9, kernel_init: nn.initializers.Initializer | None = None
) -> nn.initializers.Initializer:
    """Return an initializer of sparse weights: each unit has only a few weights that are not 0, at random positions.

    Of the n incoming weights of a unit, `ceil(fraction * n)` are 0, but never all of them. With few inputs, such as the
    four of a cart-pole, the paper's program may leave none; here one is left.

    Args:
      fraction: fraction of a unit's weights that are 0, in [0, 1).
      kernel_init: initializer of the others, `fan_in_uniform()` by default, with the fan-in of the full kernel.

    Returns:
      a `jax.nn.initializers` function, for kernels [..., units].

    Raises:
      ValueError: `fraction` is out of range; from the function, the shape has fewer than two axes.

    Example:
      >>> import jax
      >>> weights = sparse(0.9)(jax.random.key(0), (20, 100))
      >>> (weights != 0).sum(0).tolist() == [2] * 100
      True

    References:
      Elsayed, Vasan & Mahmood, `Streaming deep reinforcement learning finally works
      <https://arxiv.org/abs/2410.14606>`_, 2024, Algorithm 1
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must be in [0, 1), got {fraction}")
    dense = fan_in_uniform() if kernel_init is None else kernel_init

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jax.numpy.float32) -> jax.Array:
        if len(shape) < 2:
            raise ValueError(f"shape must be that of a kernel, of at least two axes, got {shape}")
        weights_key, places_key = jax.random.split(key)
        inputs = math.prod(shape[:-1])
        places = jax.numpy.broadcast_to(jax.numpy.arange(inputs)[:, None], (inputs, shape[-1]))
        places = jax.random.permutation(places_key, places, axis=0, independent=True).reshape(shape)
        zeros = min(math.ceil(fraction * inputs), inputs - 1)
        return jax.numpy.where(places < zeros, 0, dense(weights_key, shape, dtype)).astype(dtype)

    return init


def bias_initializer(bias_init: BiasInit, fan_in: int) -> nn.initializers.Initializer:
    """Return the initializer of a layer's biases. For "fan_in" it depends on the number of inputs."""
    if bias_init != "fan_in":
        return bias_init
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jax.numpy.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def check_bias_init(bias_init: BiasInit) -> None:
    """Raise a `ValueError` unless it is a function or "fan_in"."""
    if not callable(bias_init) and bias_init != "fan_in":
        raise ValueError(f"bias_init must be a function or 'fan_in', got {bias_init!r}")
