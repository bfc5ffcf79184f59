"""Residual network for small images."""

from collections.abc import Sequence

import jax
from flax import linen as nn


class ResNet(nn.Module):
    """ResNet of basic blocks with batch normalization for images of 32x32; the default is ResNet-18.

    The stem is a 3x3 convolution without pooling; stages after the first begin with a stride of 2 and a 1x1
    projection. As in the Nature paper's class-incremental CIFAR-100, convolutions have biases and weights are Kaiming
    normal. Training uses batch statistics and updates running statistics:
    `net.apply(variables, x, train=True, mutable=["batch_stats"])`.

    Attributes:
      num_outputs: number of outputs of the last layer, which has no activation.
      widths: channels of each stage.
      blocks: number of blocks of each stage.
      momentum: decay rate of the running statistics, in [0, 1).
      use_bias: whether convolutions have biases.
      kernel_init: a `jax.nn.initializers` function for convolutions.

    Raises:
      ValueError: `widths` and `blocks` are of different lengths, or empty.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> net = ResNet(num_outputs=100)
      >>> variables = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
      >>> sorted(variables), sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
      (['batch_stats', 'params'], 11224932)

    References:
      He et al., `Deep residual learning for image recognition <https://arxiv.org/abs/1512.03385>`_, CVPR 2016;
      Dohare et al., `Loss of plasticity in deep continual learning
      <https://doi.org/10.1038/s41586-024-07711-7>`_, Nature 2024
    """

    num_outputs: int
    widths: Sequence[int] = (64, 128, 256, 512)
    blocks: Sequence[int] = (2, 2, 2, 2)
    momentum: float = 0.9
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.he_normal()

    def __post_init__(self):
        if len(self.widths) != len(self.blocks) or not self.widths:
            raise ValueError(f"widths and blocks must be of one length, got {self.widths} and {self.blocks}")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Map images [batch, height, width, channels] to outputs [batch, num_outputs]."""

        def convolve(x, width, size, stride, name):
            conv = nn.Conv(
                width,
                (size, size),
                (stride, stride),
                padding=size // 2,
                use_bias=self.use_bias,
                kernel_init=self.kernel_init,
                name=name,
            )
            norm = nn.BatchNorm(use_running_average=not train, momentum=self.momentum, name=f"{name}_norm")
            return norm(conv(x))

        x = nn.relu(convolve(x, self.widths[0], 3, 1, "stem"))
        for stage, (width, blocks) in enumerate(zip(self.widths, self.blocks, strict=True)):
            for block in range(blocks):
                name = f"stage{stage + 1}_block{block + 1}"
                stride = 2 if stage > 0 and block == 0 else 1
                h = nn.relu(convolve(x, width, 3, stride, f"{name}_conv1"))
                h = convolve(h, width, 3, 1, f"{name}_conv2")
                if stride > 1 or x.shape[-1] != width:
                    x = convolve(x, width, 1, stride, f"{name}_projection")
                x = nn.relu(x + h)
        return nn.Dense(self.num_outputs, kernel_init=nn.initializers.lecun_normal(), name="head")(x.mean((1, 2)))
