"""Slowly-Changing Regression: a fixed target network whose inputs drift.

Dohare et al., "Loss of plasticity in deep continual learning", Nature 2024: of m bits, f are fixed for T examples; then
one of these flips, or all f are redrawn. The other bits are random in every example. The target is more complex than
the learner can represent, so the best approximation changes with the bits, and the learner must keep tracking it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cbp_jax.problems import sampling
from cbp_jax.problems.problem import Problem

_BLOCK = 256  # flips drawn at a time


class RegressionTask(NamedTuple):
    """One task of ``slowly_changing_regression``, between two changes of its bits, with the target network."""

    bits: jax.Array  # float32 [flipping_bits], 0 or 1
    input_weights: jax.Array  # float32 [num_inputs + 1, target_units], -1 or 1; the same in all tasks of a stream
    thresholds: jax.Array  # float32 [target_units], the same in all tasks
    output_weights: jax.Array  # float32 [target_units], -1 or 1, the same in all tasks
    key: jax.Array  # key, of the random bits of each batch
    evaluation_key: jax.Array  # key, of those of `evaluation`


def slowly_changing_regression(
    *,
    num_inputs: int = 20,
    flipping_bits: int = 15,
    examples_per_task: int = 10_000,
    target_units: int = 100,
    beta: float = 0.7,
    redraw: bool = False,
    batch_size: int = 1,
) -> Problem:
    r"""Create a stream of tasks, each between two changes of the slow input bits. The defaults are those of the paper.

    An input consists of ``num_inputs`` bits and a constant 1. The first ``flipping_bits`` bits are fixed during a task;
    before the next task one of them, drawn uniformly, flips, or with ``redraw`` all are redrawn. The other bits are
    random in every example. The target network has one hidden layer of linear threshold units and random weights of -1
    or 1,

    .. math:: y = \sum_i w_i [v_i \cdot x > \theta_i], \quad \theta_i = (m + 1) \beta - S_i

    with S_i the number of negative weights among the m + 1 of v_i. The key of a stream determines its target network
    and all its tasks, which can be made in any order. Making a task takes, besides a constant time, that of 256 random
    numbers for every 256 tasks before it. (The authors' program adds a bias of -1 or 1 to y, which a learner's own bias
    can represent, and counts the constant's weight in S_i with the opposite sign; we follow the paper. Its learners do
    not see the constant. It has configurations that flip one bit, as in the paper, and others that redraw all bits.)

    Args:
      num_inputs: m, number of bits besides the constant.
      flipping_bits: f, at most m.
      examples_per_task: T, number of examples between two changes.
      target_units: number of threshold units of the target network.
      beta: the fraction of the m + 1 inputs that must agree in sign with a threshold unit's weights to activate it, in
        [0, 1].
      redraw: whether a change draws all ``flipping_bits`` anew, instead of flipping one.
      batch_size: examples in a batch, at most ``examples_per_task``. Examples that do not fill a last batch
        are not shown.

    Returns:
      A ``Problem`` with the loss "squared_error", inputs float32 [num_inputs + 1] and targets float32 [1]. It has no
      data. Its ``evaluation`` draws any number n of examples of the task independently.

    Raises:
      ValueError: if a setting is out of range.

    >>> import jax
    >>> problem = slowly_changing_regression()
    >>> task = jax.jit(problem.make_task)(problem.data, jax.random.key(0), 300)
    >>> x, y = jax.jit(problem.batch)(problem.data, task, 0)
    >>> x.shape, y.shape, problem.num_classes, problem.loss
    ((1, 21), (1, 1), 1, 'squared_error')

    References:
      Dohare et al., `Loss of plasticity in deep continual learning
      <https://doi.org/10.1038/s41586-024-07711-7>`_, Nature 2024, Methods and Extended Data Fig. 2
    """
    num_inputs = sampling.check_integer("num_inputs", num_inputs)
    flipping_bits = sampling.check_integer("flipping_bits", flipping_bits, num_inputs)
    examples = sampling.check_integer("examples_per_task", examples_per_task)
    target_units = sampling.check_integer("target_units", target_units)
    batch_size = sampling.check_integer("batch_size", batch_size, examples)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be in [0, 1]; got {beta!r}")
    # In float64, since (m + 1) beta may be an integer that a pre-activation can equal.
    agreeing = np.float32((num_inputs + 1) * beta)

    def make_task(data: tuple[()], key: jax.Array, index: jax.Array | int) -> RegressionTask:
        del data
        target_key, flip_key, task_key = jax.random.split(key, 3)
        input_key, output_key = jax.random.split(target_key)
        input_weights = jax.random.rademacher(input_key, (num_inputs + 1, target_units), jnp.float32)
        first_key, flip_key = jax.random.split(flip_key)
        if redraw:
            bits = jax.random.bernoulli(jax.random.fold_in(first_key, index), shape=(flipping_bits,))
        else:
            first = jax.random.bernoulli(first_key, shape=(flipping_bits,))
            bits = first ^ (_flips(flip_key, index, flipping_bits) % 2 == 1)
        batch_key, evaluation_key = jax.random.split(jax.random.fold_in(task_key, index))
        return RegressionTask(
            bits=bits.astype(jnp.float32),
            input_weights=input_weights,
            thresholds=agreeing - jnp.sum(input_weights < 0, axis=0, dtype=jnp.float32),
            output_weights=jax.random.rademacher(output_key, (target_units,), jnp.float32),
            key=batch_key,
            evaluation_key=evaluation_key,
        )

    def examples_of(task, key, n):
        random_bits = jax.random.bernoulli(key, shape=(n, num_inputs - flipping_bits)).astype(jnp.float32)
        held = jnp.broadcast_to(task.bits, (n, flipping_bits))
        x = jnp.concatenate([held, random_bits, jnp.ones((n, 1))], axis=1)
        # Sums of ones are exact in any matrix product precision.
        on = (x @ task.input_weights > task.thresholds).astype(jnp.float32)
        return x, (on @ task.output_weights)[:, None]

    def batch(data: tuple[()], task: RegressionTask, step: jax.Array | int):
        del data
        return examples_of(task, jax.random.fold_in(task.key, step), batch_size)

    def evaluation(data: tuple[()], task: RegressionTask, n: int):
        del data
        return examples_of(task, task.evaluation_key, sampling.check_integer("n", n))

    return Problem(
        data=(),
        input_shape=(num_inputs + 1,),
        num_classes=1,
        steps_per_task=examples // batch_size,
        make_task=make_task,
        batch=batch,
        evaluation=evaluation,
        loss="squared_error",
    )


def _flips(key: jax.Array, count: jax.Array | int, bits: int) -> jax.Array:
    """Return how often each bit flipped in the first `count` flips, int32 [bits]."""

    def add_block(number, flips):
        flipped = jax.random.randint(jax.random.fold_in(key, number), (_BLOCK, 1), 0, bits)
        happened = number * _BLOCK + jnp.arange(_BLOCK)[:, None] < count
        return flips + jnp.sum((flipped == jnp.arange(bits)) & happened, axis=0, dtype=jnp.int32)

    return jax.lax.fori_loop(0, -(-count // _BLOCK), add_block, jnp.zeros(bits, jnp.int32))
