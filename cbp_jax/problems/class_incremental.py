"""Class-incremental CIFAR-100: the number of classes grows.

Dohare et al., "Loss of plasticity in deep continual learning", Nature 2024: a network learns 5 classes for 200 epochs,
then 5 more together with the old ones, and so on up to 100. Since the task becomes harder, accuracy alone says little.
It is compared with that of a network trained from scratch on the same classes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cbp_jax.data import Dataset
from cbp_jax.problems import sampling
from cbp_jax.problems.augmentation import augment


class Increment(NamedTuple):
    """One stretch of ``class_incremental`` between two additions of classes."""

    classes: jax.Array  # int32 [num_classes], in the order in which they are added
    count: jax.Array  # type: ignore[assignment]  # int32 [], how many of these there are by now
    seen: jax.Array  # bool [num_classes], which classes have been added
    key: jax.Array  # key, of orders and augmentations
    evaluation_key: jax.Array  # key, for the choice of the examples of `evaluation`


@dataclasses.dataclass(frozen=True, eq=False)
class IncrementalProblem:
    """A classification with a growing number of classes, as data and pure functions; see ``Problem``.

    Attributes:
      data: pytree of device arrays that all increments of all seeds share.
      input_shape: shape of one input.
      num_classes: final number of classes, which is the number of outputs.
      increments: how many increments there are.
      make_task: ``(data, key, index) -> Increment``, a pure function of both.
      steps: ``(increment) -> int32 scalar``, batches in an epoch.
      order: ``(data, increment, epoch) -> int32 [examples]``, the indices of the training examples of the classes added
        so far, in the order of that epoch, followed by those of the other classes.
      batch: ``(data, increment, epoch, order, step) -> (inputs, labels)``, augmented, float32 [batch, *input_shape] and
        int32 [batch], for the step-th batch of an epoch.
      held_out: ``(data, split, class) -> (inputs, labels)``, all examples of a class (may be traced) in the split
        "validation" or "test".
      evaluation: ``(data, increment, n) -> (inputs, labels)``: n distinct random training examples of the classes that
        this increment adds, without augmentation.
      loss: "softmax_cross_entropy".
      examples: the largest n of `evaluation`; None if unknown.
    """

    data: Any
    input_shape: tuple[int, ...]
    num_classes: int
    increments: int
    make_task: Callable[..., Increment]
    steps: Callable[[Increment], jax.Array]
    order: Callable[..., jax.Array]
    batch: Callable[..., tuple[jax.Array, jax.Array]]
    held_out: Callable[..., tuple[jax.Array, jax.Array]]
    evaluation: Callable[..., tuple[jax.Array, jax.Array]]
    loss: str = "softmax_cross_entropy"
    examples: int | None = None


def class_incremental(
    dataset: Dataset,
    test: Dataset | None = None,
    *,
    classes_per_increment: int = 5,
    num_classes: int | None = None,
    train_per_class: int = 450,
    validation_per_class: int = 50,
    test_per_class: int = 100,
    batch_size: int = 90,
    flip: bool = True,
    padding: int = 4,
    max_rotation: float = 15.0,
    normalize: sampling.Normalization | None = None,
) -> IncrementalProblem:
    """Create a classification to which classes are added, in an order determined by the key.

    Labels are the classes' own numbers. A network's outputs for classes that have not been added yet must be ignored.
    The defaults are those of the Nature paper for CIFAR-100.

    Args:
      dataset: images, as ``cbp_jax.data.load`` returns them. The first examples of each class, in storage order, are
        used for validation and the next for training.
      test: dataset of the test examples; by default the next examples of ``dataset``.
      classes_per_increment: number of classes added by each increment.
      num_classes: number of classes to use, the first ones of the dataset; by default all. A multiple of
        ``classes_per_increment``.
      train_per_class: number of training examples of a class.
      validation_per_class: number of validation examples of a class.
      test_per_class: number of test examples of a class.
      batch_size: examples in a batch, at most those of the first increment. Examples that do not fill the last batch of
        an epoch are not shown in that epoch.
      flip: see ``augment``, also for the next two. Drawings and digits should not be flipped.
      padding: pixels of reflection, less than the images' height and width.
      max_rotation: degrees.
      normalize: mean and standard deviation of pixels in [0, 1] by which inputs are normalized, each one number or one
        for each channel. By default pixels stay in [0, 1].

    Returns:
      An ``IncrementalProblem``.

    Raises:
      ValueError: if a number is out of range, a class has too few examples, the datasets hold features or differ in
        size, or ``normalize`` is not of this form.

    >>> import jax, cbp_jax.data
    >>> images = cbp_jax.data.load("digits")
    >>> problem = class_incremental(images, train_per_class=100, test_per_class=20, flip=False, padding=1)
    >>> task = problem.make_task(problem.data, jax.random.key(0), 1)
    >>> order = problem.order(problem.data, task, 0)
    >>> x, y = problem.batch(problem.data, task, 0, order, 3)
    >>> x.shape, int(task.count), int(problem.steps(task)), problem.increments
    ((90, 8, 8, 1), 10, 11, 2)

    References:
      Dohare et al., `Loss of plasticity in deep continual learning
      <https://doi.org/10.1038/s41586-024-07711-7>`_, Nature 2024, Methods
    """
    if dataset.has_features or (test is not None and test.image_shape != dataset.image_shape):
        shapes = dataset.image_shape, None if test is None else test.image_shape
        raise ValueError(f"dataset and test must hold images of one size; got {shapes[0]} and {shapes[1]}")
    width = sampling.check_integer("classes_per_increment", classes_per_increment, dataset.num_classes)
    total = sampling.check_integer(
        "num_classes", dataset.num_classes if num_classes is None else num_classes, dataset.num_classes
    )
    if total % width:
        raise ValueError(f"num_classes must be a multiple of classes_per_increment = {width}; got {total}")
    train = sampling.check_integer("train_per_class", train_per_class)
    validation = sampling.check_integer("validation_per_class", validation_per_class)
    held = sampling.check_integer("test_per_class", test_per_class)
    batch_size = sampling.check_integer("batch_size", batch_size, width * train)
    sampling.check_integer("padding", padding, min(dataset.image_shape[:2]) - 1, smallest=0)
    if not max_rotation >= 0:
        raise ValueError(f"max_rotation must not be negative; got {max_rotation!r}")
    scale = sampling.scaling(dataset, normalize)

    def pixels(name, source, skip, each):
        """Return rows of pixels of each class, uint8 [classes * each, pixels]."""
        rows = [np.flatnonzero(source.labels == number)[skip : skip + each] for number in range(total)]
        few = min(range(total), key=lambda number: len(rows[number]))
        if len(rows[few]) < each:
            raise ValueError(
                f"{name} must be at most what each class of {source.name!r} has; "
                f"got {each}, and class {few} has {len(rows[few])} after the {skip} before them"
            )
        return jnp.array(source.images[np.concatenate(rows)].reshape(total * each, -1))

    data = {
        "validation": pixels("validation_per_class", dataset, 0, validation),
        "train": pixels("train_per_class", dataset, validation, train),
        "test": pixels("test_per_class", test or dataset, 0 if test else validation + train, held),
    }
    label_of = jnp.repeat(jnp.arange(total, dtype=jnp.int32), train)

    def make_task(data: dict[str, jax.Array], key: jax.Array, index: jax.Array | int) -> Increment:
        del data
        class_key, task_key = jax.random.split(key)
        classes = jax.random.permutation(class_key, total).astype(jnp.int32)
        count = jnp.asarray((index + 1) * width, jnp.int32)
        seen = jnp.zeros(total, bool).at[classes].set(jnp.arange(total) < count)
        return Increment(classes, count, seen, *jax.random.split(jax.random.fold_in(task_key, index)))

    def steps(task: Increment) -> jax.Array:
        return task.count * train // batch_size

    def order(data: dict[str, jax.Array], task: Increment, epoch: jax.Array | int) -> jax.Array:
        del data
        order_key, _ = jax.random.split(jax.random.fold_in(task.key, epoch))
        drawn = jax.random.uniform(order_key, label_of.shape)
        return jnp.argsort(jnp.where(task.seen[label_of], drawn, 2.0)).astype(jnp.int32)

    def images_of(rows):
        return scale(rows).reshape(-1, *dataset.image_shape)

    def batch(data: dict[str, jax.Array], task: Increment, epoch, order: jax.Array, step):
        _, augmentation_key = jax.random.split(jax.random.fold_in(task.key, epoch))
        shown = jax.lax.dynamic_slice(order, (step * batch_size,), (batch_size,))
        inputs = augment(
            jax.random.fold_in(augmentation_key, step),
            images_of(data["train"][shown]),
            flip=flip,
            padding=padding,
            max_rotation=max_rotation,
        )
        return inputs, label_of[shown]

    def held_out(data: dict[str, jax.Array], split: str, number: jax.Array | int):
        each = {"validation": validation, "test": held}[split]
        rows = jax.lax.dynamic_slice_in_dim(data[split], number * each, each)
        return images_of(rows), jnp.full(each, number, jnp.int32)

    def evaluation(data: dict[str, jax.Array], task: Increment, n: int):
        n = sampling.check_integer("n", n, width * train)
        new = jax.lax.dynamic_slice(task.classes, (task.count - width,), (width,))
        chosen = sampling.distinct(task.evaluation_key, width * train, n)
        labels = new[chosen // train]
        return images_of(data["train"][labels * train + chosen % train]), labels

    return IncrementalProblem(
        num_classes=total,
        increments=total // width,
        data=data,
        input_shape=dataset.image_shape,
        make_task=make_task,
        steps=steps,
        order=order,
        batch=batch,
        examples=width * train,
        held_out=held_out,
        evaluation=evaluation,
    )
