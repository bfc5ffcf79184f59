"""Label-permuted classification: the same images with the labels permuted in every task.

Elsayed & Mahmood, "Addressing Loss of Plasticity and Catastrophic Forgetting in Continual Learning", ICLR 2024:
every 2,500 examples a permutation of the classes changes all labels, and the learner is not informed. Features that
distinguish the classes stay useful, so a learner that keeps them improves over tasks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cbp_jax.data import Dataset
from cbp_jax.problems import sampling
from cbp_jax.problems.problem import Problem


class LabelPermutedTask(NamedTuple):
    """One task of ``label_permuted``."""

    labels: jax.Array  # int32 [num_classes], a permutation; examples of class c are labeled labels[c]
    order: jax.Array  # int32 [examples_per_task], indices of examples in the order of presentation
    evaluation_key: jax.Array  # key, for the choice of the examples of `evaluation`


def label_permuted(
    dataset: Dataset,
    *,
    examples_per_task: int = 2500,
    batch_size: int = 1,
    normalize: sampling.Normalization | None = None,
    flatten: bool = True,
) -> Problem:
    """Create a stream of tasks that differ in the permutation of the class labels.

    Task ``index`` is drawn from ``jax.random.fold_in(key, index)``: its permutation, and its examples in their order.
    The permutation is uniform and independent of earlier ones (as is the paper's composition of uniform permutations),
    from the first task on. A task of more examples than the dataset has goes through it again in another order.

    Args:
      dataset: images, or features, and labels, as ``cbp_jax.data.load`` returns them.
      examples_per_task: number of examples in a task. Each task draws its own.
      batch_size: examples in a batch, at most ``examples_per_task``. Examples that do not fill a last batch
        are not shown.
      normalize: mean and standard deviation, of pixels in [0, 1] or of features, that inputs are normalized by;
        each one number, or one for each channel. By default pixels stay in [0, 1] and features as they are. The
        paper's is ``cbp_jax.data.normalization(dataset)``.
      flatten: whether inputs are vectors. Otherwise images keep their height, width and channels.

    Returns:
      A ``Problem`` whose inputs are float32 [pixels], or [height, width, channels] if not flattened. Its ``evaluation``
      draws from the whole dataset, so n may be up to ``len(dataset)``.

    Raises:
      ValueError: if ``examples_per_task`` or ``batch_size`` is not an integer in range, or ``normalize`` is not of this
        form.

    >>> import jax, cbp_jax.data
    >>> problem = label_permuted(cbp_jax.data.load("digits"), examples_per_task=900, batch_size=10, flatten=False)
    >>> task = jax.jit(problem.make_task)(problem.data, jax.random.key(0), 3)
    >>> x, y = jax.jit(problem.batch)(problem.data, task, 0)
    >>> x.shape, y.shape, problem.steps_per_task
    ((10, 8, 8, 1), (10,), 90)
    """
    size = len(dataset)
    examples = sampling.check_integer("examples_per_task", examples_per_task)
    batch_size = sampling.check_integer("batch_size", batch_size, examples)
    scale = sampling.scaling(dataset, normalize)

    def make_task(data: dict[str, jax.Array], key: jax.Array, index: jax.Array | int) -> LabelPermutedTask:
        del data
        label_key, order_key, evaluation_key = jax.random.split(jax.random.fold_in(key, index), 3)
        labels = jax.random.permutation(label_key, dataset.num_classes).astype(jnp.int32)
        return LabelPermutedTask(labels, sampling.passes(order_key, size, examples), evaluation_key)

    def gather(data, task, indices):
        return scale(data["images"][indices]), task.labels[data["labels"][indices]]

    return sampling.stream_of(
        dataset, flatten=flatten, examples=examples, batch_size=batch_size, make_task=make_task, gather=gather
    )
