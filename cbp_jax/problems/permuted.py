"""Online Permuted MNIST: the same images with their pixels shuffled anew in every task.

Dohare et al., "Loss of plasticity in deep continual learning", Nature 2024: each task draws one permutation
of the pixels, applies it to all images, and presents these once, in random order, without telling the learner
where a task ends. All tasks are equally hard, so a learner that gets worse over tasks has lost its
plasticity.
"""

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cbp_jax.data import Dataset
from cbp_jax.problems.problem import Problem


class PermutedTask(NamedTuple):
    """One task of ``online_permuted``."""

    permutation: jax.Array  # int32 [pixels]; pixel i of an input is pixel permutation[i] of the image
    order: jax.Array  # int32 [examples_per_task], distinct indices of images in the order of presentation
    evaluation_key: jax.Array  # key, for the choice of the examples of `evaluation`


def online_permuted(dataset: Dataset, *, examples_per_task: int | None = None, batch_size: int = 1) -> Problem:
    """A stream of tasks that differ in the permutation of the input's pixels.

    Task ``index`` is drawn from ``jax.random.fold_in(key, index)``: its permutation, and which examples it
    shows in which order (each at most once; all of them by default). Inputs are flat vectors with values in
    [0, 1]. Images stay uint8 on the device; each batch is gathered, scaled and permuted as it is asked for.

    Args:
      dataset: images and labels, as ``cbp_jax.data.load`` returns them.
      examples_per_task: number of examples in a task, at most ``len(dataset)``, which is the default. Each
        task draws its own.
      batch_size: examples in a batch, at most ``examples_per_task``. Examples that do not fill a last batch
        are not shown.

    Returns:
      A ``Problem`` whose inputs are float32 [pixels], pixels = height * width * channels. Its ``evaluation``
      draws from the whole dataset under the task's permutation, so n may be up to ``len(dataset)`` in small
      tasks too.

    Raises:
      ValueError: if ``examples_per_task`` or ``batch_size`` is not an integer in its range.

    >>> import jax, cbp_jax.data
    >>> problem = online_permuted(cbp_jax.data.load("digits"), batch_size=16)
    >>> task = problem.make_task(problem.data, jax.random.key(0), 3)
    >>> x, y = problem.batch(problem.data, task, 0)
    >>> x.shape, y.shape, problem.steps_per_task
    ((16, 64), (16,), 112)
    """
    size = len(dataset)
    examples = _integer("examples_per_task", size if examples_per_task is None else examples_per_task, size)
    batch_size = _integer("batch_size", batch_size, examples)
    pixels = dataset.images[0].size
    # A factor, because jit turns a division by a constant into one, and results must not depend on jit.
    scale = np.float32(1 / dataset.max_value)
    data = {
        "images": jnp.array(dataset.images.reshape(size, pixels)),  # a copy, which nobody can write to
        "labels": jnp.array(dataset.labels),
    }

    def make_task(data: dict[str, jax.Array], key: jax.Array, index: jax.typing.ArrayLike) -> PermutedTask:
        del data
        permutation_key, order_key, evaluation_key = jax.random.split(jax.random.fold_in(key, index), 3)
        permutation = jax.random.permutation(permutation_key, pixels).astype(jnp.int32)
        return PermutedTask(permutation, _distinct(order_key, size, examples), evaluation_key)

    def gather(data, task, indices):
        # Rows first and then pixels: one gather with both indices costs 5 us instead of 0.7 us at batch 1. To
        # float before permuting: XLA's gather of bytes costs 60 us instead of 12 us at batch 16.
        rows = data["images"][indices].astype(jnp.float32) * scale
        return rows[:, task.permutation], data["labels"][indices]

    def batch(data: dict[str, jax.Array], task: PermutedTask, step: jax.typing.ArrayLike):
        return gather(data, task, jax.lax.dynamic_slice(task.order, (step * batch_size,), (batch_size,)))

    def evaluation(data: dict[str, jax.Array], task: PermutedTask, n: int):
        return gather(data, task, _distinct(task.evaluation_key, size, _integer("n", n, size)))

    return Problem(
        data=data,
        input_shape=(pixels,),
        num_classes=dataset.num_classes,
        steps_per_task=examples // batch_size,
        make_task=make_task,
        batch=batch,
        evaluation=evaluation,
    )


def _distinct(key: jax.Array, size: int, count: int) -> jax.Array:
    """int32 [count], distinct random indices below size, in random order."""
    if count == size:
        return jax.random.permutation(key, size).astype(jnp.int32)
    # Where the largest of `size` random numbers are: 1 ms for 1,000 of 60,000; shuffling all takes 24 ms.
    return jax.lax.top_k(jax.random.uniform(key, (size,)), count)[1].astype(jnp.int32)


def _integer(name: str, value: Any, largest: int) -> int:
    try:
        integer = operator.index(value)
    except TypeError:
        integer = None
    if integer is None or not 1 <= integer <= largest:
        raise ValueError(f"{name} must be an integer from 1 to {largest}; got {value!r}")
    return integer
