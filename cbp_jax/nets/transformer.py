"""Transformer encoder, and vision transformer."""

import jax
from flax import linen as nn


class Encoder(nn.Module):
    """Transformer encoder with layer normalization before each block ("pre-LN").

    Attributes:
      depth: number of layers, each of self-attention and a multilayer perceptron.
      heads: number of attention heads; divides the width of the input.
      hidden: number of hidden units of each perceptron.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> net = Encoder(depth=2, heads=4, hidden=64)
      >>> x = jnp.zeros((3, 10, 32))
      >>> params = jax.eval_shape(net.init, jax.random.key(0), x)
      >>> jax.eval_shape(net.apply, params, x).shape
      (3, 10, 32)

    References:
      Vaswani et al., `Attention is all you need <https://arxiv.org/abs/1706.03762>`_, NeurIPS 2017; Xiong et al., `On
      layer normalization in the transformer architecture <https://arxiv.org/abs/2002.04745>`_, ICML 2020
    """

    depth: int = 12
    heads: int = 4
    hidden: int = 256

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Map tokens [batch, tokens, width] to the same shape.

        `mask` [batch, 1, tokens, tokens] is true where a token (third axis) may attend to another (last axis).
        """
        width = x.shape[-1]
        for layer in range(self.depth):
            attention = nn.MultiHeadDotProductAttention(self.heads, name=f"layer{layer}_attention")
            x = x + attention(nn.LayerNorm(name=f"layer{layer}_norm1")(x), mask=mask)
            h = nn.LayerNorm(name=f"layer{layer}_norm2")(x)
            h = nn.gelu(nn.Dense(self.hidden, name=f"layer{layer}_mlp1")(h))
            x = x + nn.Dense(width, name=f"layer{layer}_mlp2")(h)
        return nn.LayerNorm(name="norm")(x)


class ViT(nn.Module):
    """Vision transformer for small images: an encoder of patches and a class token, then a linear head.

    Attributes:
      num_outputs: number of outputs.
      patch: height and width of a patch.
      width: size of a token.
      depth: number of layers of the encoder.
      heads: number of attention heads.
      hidden: number of hidden units of each perceptron.

    Raises:
      ValueError: in a call, the images cannot be cut into patches.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> net = ViT(num_outputs=10, depth=2)
      >>> x = jnp.zeros((1, 32, 32, 3))
      >>> jax.eval_shape(net.apply, jax.eval_shape(net.init, jax.random.key(0), x), x).shape
      (1, 10)

    References:
      Dosovitskiy et al., `An image is worth 16x16 words <https://arxiv.org/abs/2010.11929>`_, ICLR 2021
    """

    num_outputs: int
    patch: int = 4
    width: int = 64
    depth: int = 6
    heads: int = 4
    hidden: int = 128

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Map images [batch, height, width, channels] to outputs [batch, num_outputs]. `train` has no effect."""
        del train
        if x.ndim != 4 or x.shape[1] % self.patch or x.shape[2] % self.patch:
            raise ValueError(f"x must be images whose sides are multiples of patch={self.patch}, got shape {x.shape}")
        size = (self.patch, self.patch)
        x = nn.Conv(self.width, size, strides=size, padding="VALID", name="patches")(x)
        x = x.reshape(x.shape[0], -1, self.width)
        token = self.param("class_token", nn.initializers.zeros, (1, 1, self.width))
        x = jax.numpy.concatenate([jax.numpy.broadcast_to(token, (x.shape[0], 1, self.width)), x], 1)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, x.shape[1], self.width))
        x = Encoder(self.depth, self.heads, self.hidden, name="encoder")(x)
        return nn.Dense(self.num_outputs, name="head")(x[:, 0])
