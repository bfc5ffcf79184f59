"""Helpers of the problems: random examples, scaling of inputs, checks of settings."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cbp_jax.data import Dataset
from cbp_jax.problems.problem import Problem

# Mean and standard deviation, each one number or one for each channel.
Normalization = tuple[float | Sequence[float], float | Sequence[float]]


def distinct(key: jax.Array, size: int, count: int) -> jax.Array:
    """Draw distinct random indices below size, in random order, int32 [count]."""
    if count == size:
        return jax.random.permutation(key, size).astype(jnp.int32)
    # The positions of the largest of `size` random numbers: 1 ms for 1,000 of 60,000. Shuffling all takes 24 ms.
    return jax.lax.top_k(jax.random.uniform(key, (size,)), count)[1].astype(jnp.int32)


def passes(key: jax.Array, size: int, count: int) -> jax.Array:
    """Draw random indices below size, int32 [count]; none is repeated before all were used."""
    if count <= size:
        return distinct(key, size, count)
    whole, rest = divmod(count, size)
    keys = jax.random.split(key, whole + 1)
    parts = [jax.vmap(lambda key: distinct(key, size, size))(keys[:whole]).ravel()]
    if rest:
        parts.append(distinct(keys[whole], size, rest))
    return jnp.concatenate(parts)


def scaling(dataset: Dataset, normalize: Normalization | None) -> Callable[[jax.Array], jax.Array]:
    """Make the function that maps stored inputs to a network's inputs.

    Args:
      dataset: images, which are first scaled to [0, 1], or features.
      normalize: mean and standard deviation to subtract and divide by, or None.

    Returns:
      a function of arrays [..., pixels], with the channels of a pixel adjacent, that returns float32.

    Raises:
      ValueError: `normalize` is not of this form, or a standard deviation is not above 0.
    """
    largest = 1 if dataset.has_features else dataset.max_value
    if normalize is None:
        # A factor, because jit turns a division by a constant into a multiplication, and results must not depend on
        # jit.
        scale = np.float32(1 / largest)
        return lambda x: x.astype(jnp.float32) * scale
    if len(normalize) != 2:
        raise ValueError(f"normalize must be a mean and a standard deviation; got {normalize!r}")
    mean, deviation = (_per_pixel(part, dataset) for part in normalize)
    if not np.isfinite(mean).all() or not (deviation > 0).all():
        raise ValueError(f"normalize must have finite means and standard deviations above 0; got {normalize!r}")
    # Subtracting first, because XLA may fuse a product followed by a sum, but not this.
    offset, factor = (mean * largest).astype(np.float32), (1 / (largest * deviation)).astype(np.float32)
    return lambda x: (x.astype(jnp.float32) - offset) * factor


def stream_of(
    dataset: Dataset,
    *,
    flatten: bool,
    examples: int,
    batch_size: int,
    make_task: Callable[..., Any],
    gather: Callable[..., tuple[jax.Array, jax.Array]],
) -> Problem:
    """Create a problem whose tasks show examples of one dataset, each in its own order.

    Args:
      dataset: images, or features, and labels. Images stay uint8 on the device.
      flatten: whether inputs are vectors.
      examples: in a task.
      batch_size: examples in a batch.
      make_task: of the problem; its tasks have `order`, the indices of examples, and `evaluation_key`.
      gather: `(data, task, indices) -> (inputs [n, pixels], labels [n])`, as the task shows them.

    Returns:
      the problem.
    """
    size, pixels = len(dataset), dataset.images[0].size
    input_shape = (pixels,) if flatten else dataset.image_shape

    def shown(data: dict[str, jax.Array], task: Any, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
        inputs, labels = gather(data, task, indices)
        return inputs.reshape(-1, *input_shape), labels

    def batch(data: dict[str, jax.Array], task: Any, step: jax.Array | int):
        return shown(data, task, jax.lax.dynamic_slice(task.order, (step * batch_size,), (batch_size,)))

    def evaluation(data: dict[str, jax.Array], task: Any, n: int):
        return shown(data, task, distinct(task.evaluation_key, size, check_integer("n", n, size)))

    return Problem(
        data={
            "images": jnp.array(dataset.images.reshape(size, pixels)),  # a copy that nobody can write to
            "labels": jnp.array(dataset.labels),
        },
        input_shape=input_shape,
        num_classes=dataset.num_classes,
        steps_per_task=examples // batch_size,
        make_task=make_task,
        batch=batch,
        evaluation=evaluation,
        examples=size,
    )


def _per_pixel(value: float | Sequence[float], dataset: Dataset) -> np.ndarray:
    """Return a number for all pixels, or one for each of a flat image, float64."""
    array = np.asarray(value, np.float64)
    if array.ndim == 0:
        return array
    if array.shape != dataset.image_shape[-1:]:
        raise ValueError(
            f"normalize must have one number, or one for each of {dataset.image_shape[-1]} channels; got {value!r}"
        )
    return np.broadcast_to(array, dataset.image_shape).ravel()


def check_integer(name: str, value: Any, largest: int | None = None, smallest: int = 1) -> int:
    """Return the setting as an int.

    Raises:
      ValueError: it is not an integer, or out of range.
    """
    try:
        integer = operator.index(value)
    except TypeError:
        integer = None
    if integer is None or integer < smallest or (largest is not None and integer > largest):
        limits = f"of at least {smallest}" if largest is None else f"from {smallest} to {largest}"
        raise ValueError(f"{name} must be an integer {limits}; got {value!r}")
    return integer
