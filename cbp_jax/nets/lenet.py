"""LeNet-5, the network of label-permuted CIFAR-10."""

from collections.abc import Sequence
from typing import Any

from cbp_jax.nets.convnet import ConvNet


class LeNet(ConvNet):
    """LeNet-5 with ReLU and max pooling, the network of label-permuted CIFAR-10.

    It has two convolutions of 6 and 16 channels with kernels of 5x5, then dense layers of 120 and 84 units. Weights and
    biases are initialized as in PyTorch. The public code of the paper has no activation after its convolutions; for
    that use `conv_activation="identity"`. Attributes are those of `ConvNet`.

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
    """Make a `LeNet` from its number of outputs and attributes that differ from its defaults."""
    return LeNet(num_outputs, **settings)
