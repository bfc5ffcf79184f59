"""The interface between problems and the training loop."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from cbp_jax.losses import LOSSES

Task = Any  # a small pytree of arrays
Data = Any  # a pytree of device arrays


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A stream of tasks, as data and pure functions.

    The functions take ``data`` as an argument, so that it is on the device only once, for any number of seeds. Do not
    vmap over ``data``, and do not close over it: a jitted function would hold a copy as a constant. All functions may
    be called inside jit, vmap and scan.

    Attributes:
      data: pytree of device arrays that all tasks of all seeds share.
      input_shape: shape of one input.
      num_classes: number of classes, or of targets if the loss is "squared_error". In either case, the number of the
        network's outputs.
      steps_per_task: batches in a task.
      make_task: ``(data, key, index) -> task``, task number ``index`` (int or int32 scalar, may be traced) of the
        stream given by ``key`` (a jax key). It is a pure function of both: tasks can be made in any order.
      batch: ``(data, task, step) -> (inputs, labels)``, float32 [batch, *input_shape] and int32 [batch], for
        step from 0 to steps_per_task - 1 (may be traced). If the loss is "squared_error", labels are the targets,
        float32 [batch, num_classes].
      evaluation: ``(data, task, n) -> (inputs, labels)``, n distinct random examples of the task in the form of
        `batch`, independent of the order of batches, for measuring a network before training. n is a Python int. Raises
        a ValueError if the task has fewer examples.
      test: ``(data, task) -> (inputs, labels)``, test examples of the task, which are in no batch, in the form of
        `batch`, for measuring a network after training; None if there are none.
      loss: the training loss, a name of `cbp_jax.losses.LOSSES`: "softmax_cross_entropy" or "squared_error".
      examples: the largest n of `evaluation`; None if there is no limit.

    Raises:
      ValueError: if the loss is unknown.
    """

    data: Data
    input_shape: tuple[int, ...]
    num_classes: int
    steps_per_task: int
    make_task: Callable[[Data, jax.Array, jax.Array | int], Task]
    batch: Callable[[Data, Task, jax.Array | int], tuple[jax.Array, jax.Array]]
    evaluation: Callable[[Data, Task, int], tuple[jax.Array, jax.Array]]
    loss: str = "softmax_cross_entropy"
    test: Callable[[Data, Task], tuple[jax.Array, jax.Array]] | None = None
    examples: int | None = None

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}; got {self.loss!r}")
