"""Online Permuted MNIST: the same images with their pixels permuted in every task.

Dohare et al., "Loss of plasticity in deep continual learning", Nature 2024: each task draws one permutation of the
pixels, applies it to all images, and presents each image once, in random order. The learner is not informed of task
changes. All tasks are equally hard, so a learner that gets worse over tasks has lost plasticity.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cbp_jax.data import Dataset
from cbp_jax.problems import sampling
from cbp_jax.problems.problem import Problem


class PermutedTask(NamedTuple):
    """One task of ``online_permuted``."""

    permutation: jax.Array  # int32 [pixels]; pixel i of an input is pixel permutation[i] of the image
    order: jax.Array  # int32 [examples_per_task], indices of images in the order of presentation
    evaluation_key: jax.Array  # key, for the choice of the examples of `evaluation`


def online_permuted(
    dataset: Dataset,
    *,
    examples_per_task: int | None = None,
    batch_size: int = 1,
    normalize: sampling.Normalization | None = None,
    flatten: bool = True,
) -> Problem:
    """Create a stream of tasks that differ in the permutation of the input's pixels.

    Task ``index`` is drawn from ``jax.random.fold_in(key, index)``: its permutation, and its examples in their order.
    By default these are all examples once. A task of more examples than the dataset has repeats them in the same order,
    as in the authors' program. Inputs are flat vectors with values in [0, 1], or these values in the shape of an image
    for a network that takes images. Images stay uint8 on the device; each batch is gathered, scaled and permuted on
    demand.

    Input-permuted MNIST of Elsayed & Mahmood (ICLR 2024) is this stream with ``examples_per_task=5000`` and
    ``normalize=cbp_jax.data.normalization(dataset)``.

    Args:
      dataset: images, or features, and labels, as ``cbp_jax.data.load`` returns them.
      examples_per_task: number of examples in a task, ``len(dataset)`` by default. Each task draws its own.
      batch_size: examples in a batch, at most ``examples_per_task``. Examples that do not fill a last batch
        are not shown.
      normalize: mean and standard deviation, of pixels in [0, 1] or of features, that inputs are normalized by;
        each one number, or one for each channel. By default pixels stay in [0, 1] and features as they are.
      flatten: whether inputs are vectors. Otherwise permuted pixels have the shape [height, width, channels].

    Returns:
      A ``Problem`` whose inputs are float32 [pixels], pixels = height * width * channels, or [height, width, channels]
      if not flattened. Its ``evaluation`` draws from the whole dataset under the task's permutation, so n may be up to
      ``len(dataset)`` in small tasks too.

    Raises:
      ValueError: if ``examples_per_task`` or ``batch_size`` is not an integer in range, or ``normalize`` is not of this
        form.

    >>> import jax, cbp_jax.data
    >>> problem = online_permuted(cbp_jax.data.load("digits"), batch_size=16)
    >>> task = problem.make_task(problem.data, jax.random.key(0), 3)
    >>> x, y = problem.batch(problem.data, task, 0)
    >>> x.shape, y.shape, problem.steps_per_task
    ((16, 64), (16,), 112)
    """
    size = len(dataset)
    examples = sampling.check_integer("examples_per_task", size if examples_per_task is None else examples_per_task)
    batch_size = sampling.check_integer("batch_size", batch_size, examples)
    pixels = dataset.images[0].size
    scale = sampling.scaling(dataset, normalize)

    def make_task(data: dict[str, jax.Array], key: jax.Array, index: jax.Array | int) -> PermutedTask:
        del data
        permutation_key, order_key, evaluation_key = jax.random.split(jax.random.fold_in(key, index), 3)
        permutation = jax.random.permutation(permutation_key, pixels).astype(jnp.int32)
        order = jnp.resize(sampling.distinct(order_key, size, min(examples, size)), (examples,))  # repeated if needed
        return PermutedTask(permutation, order, evaluation_key)

    def gather(data, task, indices):
        # First rows, then pixels: one gather with both indices takes 5 us instead of 0.7 us at batch 1. Converted to
        # float before permuting: XLA's gather of bytes takes 60 us instead of 12 us at batch 16.
        rows = scale(data["images"][indices])
        return rows[:, task.permutation], data["labels"][indices]

    return sampling.stream_of(
        dataset, flatten=flatten, examples=examples, batch_size=batch_size, make_task=make_task, gather=gather
    )
