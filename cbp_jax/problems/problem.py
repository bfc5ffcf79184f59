"""What every problem offers to the training loop."""

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

    The functions take ``data`` as an argument, so that it stands on the device once however many seeds run:
    vmap them over keys or tasks and not over ``data``, and do not close over it (a jitted function would hold
    a copy as a constant). All may be called inside jit, vmap and scan.

    Attributes:
      data: pytree of device arrays that all tasks of all seeds share.
      input_shape: shape of one input.
      num_classes: number of classes of the labels, or of targets where the loss is "squared_error": in either
        case how many outputs the network has.
      steps_per_task: batches in a task.
      make_task: ``(data, key, index) -> task``, the task number ``index`` (int or int32 scalar, may be
        traced) of the stream that ``key`` (a jax key) stands for. A pure function of both: tasks can be made
        in any order.
      batch: ``(data, task, step) -> (inputs, labels)``, float32 [batch, *input_shape] and int32 [batch], for
        step from 0 to steps_per_task - 1 (may be traced). Where the loss is "squared_error", labels are the
        targets, float32 [batch, num_classes].
      evaluation: ``(data, task, n) -> (inputs, labels)``, as `batch` returns them, with n rows: n distinct
        random examples of the task, independent of the order in which batches come, for measuring a network
        before it is trained. n is a Python int; a ValueError says so where the task has fewer examples.
      test: ``(data, task) -> (inputs, labels)``, as `batch` returns them: examples of the task that no batch holds, for
        measuring a network after it is trained; None where there are none.
      loss: what the network is trained on, a name of `cbp_jax.losses.LOSSES`: "softmax_cross_entropy" or
        "squared_error".
      examples: how many examples a task has to measure a network on, the largest n of `evaluation`; None where there is
        no largest.

    Raises:
      ValueError: if the loss is another.
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
