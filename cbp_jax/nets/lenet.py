"""LeNet-5, as the network of label-permuted CIFAR-10 has it."""

from collections.abc import Sequence
from typing import Any

from cbp_jax.nets.convnet import ConvNet


class LeNet(ConvNet):
    """LeNet-5's sizes with ReLU and max pooling, the network of label-permuted CIFAR-10.

    Two convolutions of 6 and 16 channels with kernels of 5x5, then dense layers of 120 and 84 units; weights and
    biases start as PyTorch's do. The public code of the paper has no activation after its convolutions:
    `conv_activation="identity"` is that. Attributes are those of `ConvNet`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = jax.eval_shape(LeNet(10).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
      >>> [layer["kernel"].shape for layer in params["params"].values()]
      [(5, 5, 3, 6), (5, 5, 6, 16), (400, 120), (120, 84), (84, 10)]

    References:
      LeCun et al., `Gradient-based learning applied to document recognition
      <https://doi.org/10.1109/5.726791>`_, 1998; Elsayed & Mahmood, `Addressing Loss of Plasticity and Catastrophic
      Forgetting in Continual Learning <https://openreview.net/forum?id=sKPzAXoylB>`_, ICLR 2024
    """

    channels: Sequence[int] = (6, 16)
    kernel_sizes: Sequence[int] = (5, 5)
    hidden: Sequence[int] = (120, 84)


def lenet(num_outputs: int, **settings: Any) -> LeNet:
    """Makes a `LeNet` of its number of outputs, and of attributes that are to be others than its own."""
    return LeNet(num_outputs, **settings)
