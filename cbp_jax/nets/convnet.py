"""Convolutional network for small images."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn

from cbp_jax.nets.activations import Activation, get_activation
from cbp_jax.nets.initializers import BiasInit, bias_initializer, check_bias_init, fan_in_uniform
from cbp_jax.nets.mlp import check_dropout_rate


class ConvNet(nn.Module):
    """Convolutions, each followed by an activation and 2x2 max pooling, then dense layers.

    The default sizes are those of the Nature paper's network for Continual ImageNet (images of 32x32x3). Layers are
    named `Conv_0`, ..., `Dense_0`, ... from the input on. Conv-2 of the lottery ticket paper is `ConvNet(10, (64, 64),
    (3, 3), (256, 256), "SAME", pool_every=2)`; Conv-4 has channels `(64, 64, 128, 128)`.

    Attributes:
      num_outputs: number of outputs of the last layer, which has no activation.
      channels: number of channels of each convolution.
      kernel_sizes: height and width of each convolution's kernel.
      hidden: number of units of each hidden dense layer.
      padding: padding of the convolutions, "VALID" (none) or "SAME".
      activation: a name of `get_activation`, or a function of one array.
      dropout_rate: fraction of the hidden dense units dropped in training, in [0, 1). Above 0 a call with
        `train=True` needs `rngs={"dropout": key}`.
      kernel_init: a `jax.nn.initializers` function. By default weights are uniform in ±1 / sqrt(inputs of a unit), as
        in the Nature paper's program, also for replaced units.
      bias_init: a `jax.nn.initializers` function; or "fan_in", the default, for the same range as that of the weights.
      conv_activation: activation of the convolutions, if different from that of the dense layers.
      pool_every: number of convolutions before each pooling.

    Raises:
      ValueError: an attribute is out of range; in a call, the images are too small for the convolutions.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> net = ConvNet(num_outputs=2)
      >>> params = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
      >>> for name, layer in params["params"].items():
      ...   print(name, layer["kernel"].shape)
      Conv_0 (5, 5, 3, 32)
      Conv_1 (3, 3, 32, 64)
      Conv_2 (3, 3, 64, 128)
      Dense_0 (512, 128)
      Dense_1 (128, 128)
      Dense_2 (128, 2)

    References:
      Dohare et al., `Loss of plasticity in deep continual learning
      <https://doi.org/10.1038/s41586-024-07711-7>`_, Nature 2024
    """

    num_outputs: int
    channels: Sequence[int] = (32, 64, 128)
    kernel_sizes: Sequence[int] = (5, 3, 3)
    hidden: Sequence[int] = (128, 128)
    padding: str = "VALID"
    activation: str | Activation = "relu"
    dropout_rate: float = 0.0
    kernel_init: nn.initializers.Initializer = fan_in_uniform()
    bias_init: BiasInit = "fan_in"
    conv_activation: str | Activation | None = None
    pool_every: int = 1

    def __post_init__(self):
        get_activation(self.activation)
        get_activation(self.activation if self.conv_activation is None else self.conv_activation)
        check_dropout_rate(self.dropout_rate)
        check_bias_init(self.bias_init)
        if len(self.channels) != len(self.kernel_sizes):
            raise ValueError(
                f"channels and kernel_sizes must be of one length, got {self.channels} and {self.kernel_sizes}"
            )
        if self.pool_every < 1 or len(self.channels) % self.pool_every:
            raise ValueError(
                f"pool_every must divide the number of convolutions, {len(self.channels)}, got {self.pool_every}"
            )
        if self.padding not in ("VALID", "SAME"):
            raise ValueError(f"padding must be 'VALID' or 'SAME', got {self.padding!r}")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Map images [batch, height, width, channels] to outputs [batch, num_outputs].

        `train=True` turns dropout on.
        """
        if x.ndim != 4:
            raise ValueError(f"x must be images [batch, height, width, channels], got shape {x.shape}")
        images = x.shape
        activation = get_activation(self.activation)
        conv_activation = activation if self.conv_activation is None else get_activation(self.conv_activation)
        for number, (channels, size) in enumerate(zip(self.channels, self.kernel_sizes, strict=True), start=1):
            shrink = size - 1 if self.padding == "VALID" else 0
            pooled = number % self.pool_every == 0
            if min(x.shape[1:3]) - shrink < (2 if pooled else 1):
                raise ValueError(
                    f"images of {images[1]}x{images[2]} are too small for kernel_sizes={tuple(self.kernel_sizes)} "
                    f"with padding={self.padding!r}: nothing would be left after pooling"
                )
            init = self._init(size * size * x.shape[-1])
            x = conv_activation(nn.Conv(channels, (size, size), padding=self.padding, **init)(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2)) if pooled else x
        x = x.reshape(x.shape[0], -1)
        for size in self.hidden:
            x = activation(nn.Dense(size, **self._init(x.shape[-1]))(x))
            if self.dropout_rate > 0:
                x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return nn.Dense(self.num_outputs, **self._init(x.shape[-1]))(x)

    def _init(self, fan_in: int) -> dict[str, Any]:
        return {"kernel_init": self.kernel_init, "bias_init": bias_initializer(self.bias_init, fan_in)}
