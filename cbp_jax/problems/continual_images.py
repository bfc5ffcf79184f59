"""Continual ImageNet: binary classification of a new pair of classes in each task, for many epochs.

Dohare et al., "Loss of plasticity in deep continual learning", Nature 2024: a task is to distinguish two classes of
ImageNet. The next task has two other classes, and the output layer is reset to zero. All tasks are equally hard on
average, so a learner whose accuracy on test images falls over tasks has lost plasticity.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cbp_jax.data import Dataset
from cbp_jax.problems import sampling
from cbp_jax.problems.problem import Problem


class ImageTask(NamedTuple):
    """One task of ``continual_images``."""

    classes: jax.Array  # int32 [classes_per_task], of the dataset; an example of classes[i] is labeled i
    order: jax.Array  # int32 [steps, batch_size], indices of training examples, class after class
    evaluation_key: jax.Array  # key, for the choice of the examples of `evaluation`


def continual_images(
    dataset: Dataset,
    *,
    train_per_class: int = 600,
    test_per_class: int = 100,
    epochs: int = 250,
    batch_size: int = 100,
    classes_per_task: int = 2,
    normalize: sampling.Normalization | None = None,
) -> Problem:
    """Create a stream of tasks, each of which is to distinguish a few classes.

    Classes are dealt like cards: they are shuffled, each task takes the next ``classes_per_task``, and when too few are
    left for a task, all are shuffled again. So a class returns only after the others were used, and in another pair. If
    ``classes_per_task`` does not divide the number of classes, those left at the end of a round are skipped. (The
    paper's public program repeats one order of the classes, and therefore its 500 pairs.) Task ``index`` is a pure
    function of (key, index). A task shows its training examples once in each epoch, in a new order. Examples that do
    not fill the last batch of an epoch are not shown in that epoch.

    Args:
      dataset: images and labels, as ``cbp_jax.data.load`` returns them; the paper's is "imagenet_resized/32x32". The
        first examples of each class, in storage order, are used for training and the next for testing. Classes without
        examples are not used.
      train_per_class: number of training examples of a class.
      test_per_class: number of test examples of a class.
      epochs: how often a task shows each of its training examples.
      batch_size: examples in a batch, at most those of a task.
      classes_per_task: number of classes of a task, from 2 to the number of classes.
      normalize: mean and standard deviation of pixels in [0, 1], or of features, by which inputs are normalized, each
        one number or one for each channel. By default pixels stay in [0, 1] and features as they are.

    Returns:
      A ``Problem`` whose inputs are float32 [height, width, channels], or [features]. Its ``evaluation`` draws from
      the task's training examples, and its ``test`` gives all test examples of the task, class after class.

    Raises:
      ValueError: if a number is not an integer in range, a class has too few examples, or ``normalize`` is not of this
        form.

    >>> import jax, cbp_jax.data
    >>> images = cbp_jax.data.load("digits")
    >>> problem = continual_images(images, train_per_class=100, test_per_class=50, epochs=3, batch_size=20)
    >>> task = jax.jit(problem.make_task)(problem.data, jax.random.key(0), 7)
    >>> x, y = jax.jit(problem.batch)(problem.data, task, 0)
    >>> x.shape, y.shape, problem.steps_per_task, jax.jit(problem.test)(problem.data, task)[0].shape
    ((20, 8, 8, 1), (20,), 30, (100, 8, 8, 1))

    References:
      Dohare et al., `Loss of plasticity in deep continual learning
      <https://doi.org/10.1038/s41586-024-07711-7>`_, Nature 2024, Methods; https://github.com/shibhansh/loss-of-plasticity
    """
    train = sampling.check_integer("train_per_class", train_per_class)
    test = sampling.check_integer("test_per_class", test_per_class)
    epochs = sampling.check_integer("epochs", epochs)
    counts = np.bincount(dataset.labels, minlength=dataset.num_classes)
    used = np.flatnonzero(counts)
    if counts[used].min() < train + test:
        few = used[counts[used].argmin()]
        raise ValueError(
            f"train_per_class + test_per_class must be at most the examples of each class of {dataset.name!r}: "
            f"class {few} has {counts[few]}; got {train} + {test}"
        )
    width = sampling.check_integer("classes_per_task", classes_per_task, len(used), smallest=2)
    examples = width * train
    batch_size = sampling.check_integer("batch_size", batch_size, examples)
    batches = examples // batch_size
    scale = sampling.scaling(dataset, normalize)
    by_class = np.argsort(dataset.labels, kind="stable")
    starts = (np.cumsum(counts) - counts)[used]
    rows = by_class[starts[:, None] + np.arange(train + test)]
    # Rows of pixels, [classes * (train + test), pixels], so that one gather of rows extracts a batch.
    data = {"images": jnp.array(dataset.images[rows.ravel()].reshape(rows.size, -1))}

    def make_task(data: dict[str, jax.Array], key: jax.Array, index: jax.Array | int) -> ImageTask:
        del data
        class_key, task_key = jax.random.split(key)
        order_key, evaluation_key = jax.random.split(jax.random.fold_in(task_key, index))
        tasks_per_round = len(used) // width
        deck = jax.random.permutation(jax.random.fold_in(class_key, index // tasks_per_round), len(used))
        classes = jax.lax.dynamic_slice(deck, (index % tasks_per_round * width,), (width,))
        orders = jax.vmap(lambda key: sampling.distinct(key, examples, batches * batch_size))(
            jax.random.split(order_key, epochs)
        )
        return ImageTask(classes.astype(jnp.int32), orders.reshape(-1, batch_size), evaluation_key)

    def gather(data, task, labels, number):
        """Return inputs and labels of examples, given by their indices within the classes."""
        inputs = scale(data["images"][task.classes[labels] * (train + test) + number])
        return inputs.reshape(-1, *dataset.image_shape), labels

    def batch(data: dict[str, jax.Array], task: ImageTask, step: jax.Array | int):
        shown = task.order[step]
        return gather(data, task, shown // train, shown % train)

    def evaluation(data: dict[str, jax.Array], task: ImageTask, n: int):
        n = sampling.check_integer("n", n, examples)
        shown = sampling.distinct(task.evaluation_key, examples, n)
        return gather(data, task, shown // train, shown % train)

    def all_test(data: dict[str, jax.Array], task: ImageTask):
        shown = jnp.arange(width * test, dtype=jnp.int32)
        return gather(data, task, shown // test, train + shown % test)

    return Problem(
        data=data,
        input_shape=dataset.image_shape,
        num_classes=width,
        steps_per_task=epochs * batches,
        examples=examples,
        make_task=make_task,
        batch=batch,
        evaluation=evaluation,
        test=all_test,
    )
