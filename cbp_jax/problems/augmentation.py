"""Data augmentation: random changes of training images, on the device."""

import jax
import jax.numpy as jnp
import numpy as np


def augment(
    key: jax.Array, images: jax.Array, *, flip: bool = True, padding: int = 4, max_rotation: float = 15.0
) -> jax.Array:
    """Flip, shift and rotate images, each by its own random amounts.

    In this order: a flip from left to right with probability 1/2; a random crop of the image padded by its reflection;
    a counterclockwise rotation about the center by an angle uniform in [0, max_rotation] degrees, with nearest-neighbor
    interpolation and 0 outside of the image, as in the public program of the Nature paper. Everything is one gather.

    Args:
      key: jax key.
      images: [batch, height, width, channels], normalized, so that 0 is the mean.
      flip: whether images are flipped.
      padding: pixels of reflection on every side, less than height and width.
      max_rotation: degrees.

    Returns:
      images of the same shape and dtype.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> images = jnp.arange(2 * 4 * 4.0).reshape(2, 4, 4, 1)
      >>> same = augment(jax.random.key(0), images, flip=False, padding=0, max_rotation=0.0)
      >>> bool((same == images).all())
      True
    """
    count, height, width, _ = images.shape
    uniform = jax.random.uniform(key, (count, 4))

    def of_one(image, random):
        angle = jnp.deg2rad(max_rotation) * random[0]
        y = jnp.arange(height)[:, None] - (height - 1) / 2
        x = jnp.arange(width)[None, :] - (width - 1) / 2
        # Where a pixel of the result was before the rotation. Row numbers grow downwards.
        row = jnp.round(jnp.sin(angle) * x + jnp.cos(angle) * y + (height - 1) / 2).astype(jnp.int32)
        column = jnp.round(jnp.cos(angle) * x - jnp.sin(angle) * y + (width - 1) / 2).astype(jnp.int32)
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        shift = jnp.floor(random[1:3] * (2 * padding + 1)).astype(jnp.int32) - padding
        row, column = _reflected(row + shift[0], height), _reflected(column + shift[1], width)
        if flip:
            column = jnp.where(random[3] < 0.5, width - 1 - column, column)
        # Outside of the image nothing is read, so the indices need not be valid.
        pixels = image[jnp.clip(row, 0, height - 1), jnp.clip(column, 0, width - 1)]
        return jnp.where(inside[..., None], pixels, jnp.zeros((), image.dtype))

    return jax.vmap(of_one)(images, uniform)


def _reflected(number: jax.Array, length: int) -> jax.Array:
    """Reflect row numbers beyond an edge, without repeating the edge."""
    last = np.int32(length - 1)
    return last - jnp.abs(last - jnp.abs(number))
