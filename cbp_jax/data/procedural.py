"""Procedural images of any number of classes, generated on the device from a key: image problems without any files."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cbp_jax.data.dataset import Dataset
from cbp_jax.numerics.compilation import RUNS_ONCE

_PATCHES = 6  # gratings of a class
_DISTRACTORS = 2  # additional random gratings of each image
_FOUR_IN_FIVE = 0.8416  # quantile: four in five normal numbers are smaller


def procedural(
    num_classes: int = 1000, per_class: int = 700, *, size: int = 32, channels: int = 3, key: int | jax.Array = 0
) -> Dataset:
    """Draw a dataset in which a class is an arrangement of six colored gratings.

    Each grating has a position, an orientation, a wavelength, a phase, a color and a size, drawn for the class. In each
    image all of them are shifted together, each one is moved, rotated and attenuated a little, one in five is missing,
    two random gratings are added, and every pixel has noise. Neither single pixels nor the mean color distinguish
    classes. On one kind of device, the same arguments give the same images.

    Args:
      num_classes: number of classes. Fewer classes are the first ones of more classes.
      per_class: number of images of each class.
      size: height and width in pixels.
      channels: number of channels.
      key: int or jax key.

    Returns:
      a `Dataset` named "procedural", class after class.

    Raises:
      ValueError: a number is not an integer of at least 1, or `size` is less than 8.

    Example:
      >>> procedural(5, 20, size=16, channels=1)
      Dataset(procedural: 100 images of 16x16x1, 5 classes)
    """
    numbers = {
        "num_classes": (num_classes, 1),
        "per_class": (per_class, 1),
        "size": (size, 8),
        "channels": (channels, 1),
    }
    for name, (value, smallest) in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < smallest:
            raise ValueError(f"{name} must be an integer of at least {smallest}; got {value!r}")
    key = jax.random.key(key) if isinstance(key, int) else key
    images = np.empty((num_classes, per_class, size, size, channels), np.uint8)
    for number in range(num_classes):  # one class at a time, so that floats fit in memory
        images[number] = _images_of_class(jax.random.fold_in(key, number), per_class, size, channels)
    labels = np.repeat(np.arange(num_classes, dtype=np.int32), per_class)
    return Dataset(images.reshape(-1, size, size, channels), labels, num_classes, "procedural")


@functools.partial(jax.jit, static_argnums=(1, 2, 3), compiler_options=RUNS_ONCE)
def _images_of_class(key: jax.Array, count: int, size: int, channels: int) -> jax.Array:
    """Draw the images of a class, uint8 [count, size, size, channels]."""
    class_key, image_key = jax.random.split(key)
    of_class = _gratings(class_key, _PATCHES, channels)
    draw = lambda number: _image(jax.random.fold_in(image_key, number), of_class, size, channels)
    return jax.vmap(draw)(jnp.arange(count))


def _gratings(key: jax.Array, count: int, channels: int) -> dict[str, jax.Array]:
    """Draw random gratings: arrays [count, ...]; lengths relative to the image's."""
    uniform_key, color_key = jax.random.split(key)
    # All in one draw, since every draw takes time to compile.
    row, column, angle, frequency, phase, radius = jax.random.uniform(uniform_key, (6, count))
    return {
        "row": 0.2 + 0.6 * row,
        "column": 0.2 + 0.6 * column,
        "angle": np.pi * angle,
        "frequency": 1.5 + 3.5 * frequency,
        "phase": 2 * np.pi * phase,
        "radius": 0.1 + 0.15 * radius,
        "color": jax.random.normal(color_key, (count, channels)),
    }


def _image(key: jax.Array, of_class: dict[str, jax.Array], size: int, channels: int) -> jax.Array:
    """Draw one image with the gratings of a class and others, uint8 [size, size, channels]."""
    change_key, other_key, noise_key = jax.random.split(key, 3)
    changes = jax.random.normal(change_key, (6, _PATCHES + 1))  # the last column applies to all gratings together
    row, column, angle, phase, strength, presence = changes[:, :-1]
    shown = jnp.where(presence < _FOUR_IN_FIVE, jnp.exp(0.3 * strength), 0.0)
    seen = {
        **of_class,
        "row": of_class["row"] + 0.08 * changes[0, -1] + 0.04 * row,
        "column": of_class["column"] + 0.08 * changes[1, -1] + 0.04 * column,
        "angle": of_class["angle"] + 0.2 * angle,
        "phase": of_class["phase"] + 0.6 * phase,
        "color": of_class["color"] * shown[:, None],
    }
    others = _gratings(other_key, _DISTRACTORS, channels)
    every = jax.tree.map(lambda *parts: jnp.concatenate(parts), seen, others)

    # A grating, exp(-(x^2 + y^2) / 2 r^2) cos(a x + b y + p), is a sum of products of functions of x and of y.
    axis = (jnp.arange(size) + 0.5) / size
    wave_number = 2 * np.pi * every["frequency"]

    def parts(center, wave_number, phase):
        distance = axis[:, None] - center  # [size, gratings]
        window = jnp.exp(-(distance**2) / (2 * every["radius"] ** 2))
        angle = wave_number * distance + phase
        return window * jnp.cos(angle), window * jnp.sin(angle)

    y_cos, y_sin = parts(every["row"], wave_number * jnp.sin(every["angle"]), every["phase"])
    x_cos, x_sin = parts(every["column"], wave_number * jnp.cos(every["angle"]), 0.0)
    rows, columns = jnp.concatenate([y_cos, -y_sin], -1), jnp.concatenate([x_cos, x_sin], -1)
    pixels = jnp.einsum("hg,wg,gc->hwc", rows, columns, jnp.tile(every["color"], (2, 1)))
    pixels += 0.2 * jax.random.normal(noise_key, pixels.shape)
    return jnp.round(jnp.clip(128 + 50 * pixels, 0, 255)).astype(jnp.uint8)
