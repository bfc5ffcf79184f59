"""Trains a learner on a growing classification, with many epochs for each increment: one compiled program, all
lanes."""

from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from cbp_jax.problems import IncrementalProblem
from cbp_jax.replacement import replaced_units
from cbp_jax.training.checkpoint import Checkpoint
from cbp_jax.training.lanes import LaneMode
from cbp_jax.training.learner import Learner, TrainState, begin_task, init_state, stream_keys, weights_of
from cbp_jax.training.loop import run_lanes
from cbp_jax.training.step import evaluate, learn
from cbp_jax.training.symptoms import symptoms


def step_size_factor(
    epoch: chex.Numeric, epochs: int, falls_at: tuple[float, ...] = (0.3, 0.6, 0.8), factor: float = 0.2
) -> chex.Array:
    """Return the factor of the step size in an epoch of an increment.

    Args:
      epoch: from 0, may be traced.
      epochs: number of epochs in the increment.
      falls_at: fractions of the increment at which the step size falls. In the Nature paper these are epochs 60, 120
        and 160 of 200.
      factor: the factor at each of these.

    Example:
      >>> [round(float(step_size_factor(epoch, 200)), 3) for epoch in (0, 59, 60, 120, 160)]
      [1.0, 1.0, 0.2, 0.04, 0.008]
    """
    falls = jnp.round(jnp.asarray(falls_at) * epochs)
    return jnp.float32(factor) ** jnp.sum(epoch >= falls)


def run_increment(
    learner: Learner, problem: IncrementalProblem, data: Any, state: TrainState, **settings: Any
) -> tuple[TrainState, dict[str, chex.Array]]:
    """Measure a network on the new classes, and train it on these and the earlier ones. Runs one lane.

    Args:
      learner: the learner; with `batch_stats`, its `train` returns the outputs and the new collection.
      problem: the classes.
      data: `problem.data`, an argument so that lanes share it.
      state: the lane's state.
      **settings: of `increment_programs`.

    Returns:
      the state after the increment, and what is measured before and during it.
    """
    measure, reset, train = increment_programs(learner, problem, **settings)
    before = measure(data, state)
    state, measures = train(data, reset(data, state))
    return state, before | measures


def increment_programs(
    learner: Learner,
    problem: IncrementalProblem,
    *,
    epochs: int = 200,
    measured_examples: int = 1000,
    dormant_threshold: float = 0.01,
    early_stopping: bool = True,
    schedule: Callable[[chex.Numeric, int], chex.Array] = step_size_factor,
) -> tuple[Callable[[Any, TrainState], Any], ...]:
    """Return the programs of an increment of one lane: measurement, reset and training.

    After each epoch, accuracy is measured on the validation examples. The increment ends with the weights (and running
    statistics) of the epoch with the best accuracy, and with the optimizer's state of the last epoch. Running
    statistics of a network are in the collection "batch_stats" among its parameters. They have no gradient; the new
    statistics from training replace what the optimizer returns for them.

    They are separate so that learners can share programs, which take long to compile, by JAX's compilation cache: all
    share the first, and learners that differ only in what they reset the last.

    Args:
      learner: as in `run_increment`.
      problem: the classes.
      epochs: number of epochs.
      measured_examples: number of examples of the new classes on which the network is measured before the increment.
      dormant_threshold: largest score of a dormant unit, see `metrics.dormant_fraction`.
      early_stopping: whether to keep the best weights instead of the last ones.
      schedule: `(epoch, epochs) -> factor` of the step size.

    Returns:
      functions of `data` and `state`. The first returns `dead_units`, `dormant_units`, `weight_magnitude`, and
      `effective_rank` and `stable_rank` of the last hidden layer divided by its number of units. The second returns the
      state after the learner's reset. The third returns the state after the increment, and `loss` and `accuracy`, means
      over all updates; `validation_accuracy`, `test_accuracy` and `test_loss` of the final weights, over the classes
      added so far; and `replaced_units`.
    """

    def optimizer(state, epoch):
        step_size = state.hyperparameters[learner.scheduled] * schedule(epoch, epochs)
        hyperparameters = {**state.hyperparameters, learner.scheduled: step_size}
        return optax.with_extra_args_support(learner.optimizer(hyperparameters, stream_keys(state.key).optimizer))

    def measure(data, state):
        task = problem.make_task(data, stream_keys(state.key).problem, state.task)
        return _measure(learner, state.params, problem.evaluation(data, task, measured_examples)[0], dormant_threshold)

    def reset(data, state):
        params, opt_state = begin_task(learner, optimizer(state, 0), state)
        return state._replace(params=params, opt_state=opt_state)

    def train(data, state):
        keys = stream_keys(state.key)
        task = problem.make_task(data, keys.problem, state.task)
        train_key = jax.random.fold_in(keys.dropout, state.task)

        def seen_only(outputs):
            return jnp.where(task.seen, outputs, -jnp.inf)

        def epoch_fn(epoch, carry):
            tx = optimizer(state, epoch)
            order = problem.order(data, task, epoch)
            epoch_key = jax.random.fold_in(train_key, epoch)

            def step_fn(step, carry):
                params, opt_state, totals = carry
                batch, key = problem.batch(data, task, epoch, order, step), jax.random.fold_in(epoch_key, step)
                params, opt_state, found = learn(
                    learner, tx, problem.loss, params, opt_state, batch, key, head=seen_only
                )
                found["replaced_units"] = replaced_units(opt_state)
                return params, opt_state, {name: totals[name] + value for name, value in found.items()}

            params, opt_state, totals, best, best_accuracy = carry
            params, opt_state, totals = jax.lax.fori_loop(0, problem.steps(task), step_fn, (params, opt_state, totals))
            accuracy = held_out("validation", params)["accuracy"]
            better = (accuracy > best_accuracy) | (not early_stopping)
            kept = jax.tree.map(lambda new, old: jnp.where(better, new, old), (params, accuracy), (best, best_accuracy))
            return params, opt_state, totals, *kept

        def held_out(split, params):
            """Return the accuracy and loss over the classes added so far."""

            def of_class(number, sums):
                batch = problem.held_out(data, split, task.classes[number])
                found = evaluate(learner, problem.loss, params, batch, seen_only)
                return {name: sums[name] + value for name, value in found.items()}

            sums = jax.lax.fori_loop(0, task.count, of_class, {name: jnp.zeros([]) for name in ("loss", "accuracy")})
            return {name: value / task.count for name, value in sums.items()}

        totals = {name: jnp.zeros([]) for name in ("loss", "accuracy", "replaced_units")}
        carry = (state.params, state.opt_state, totals, state.params, jnp.float32(-1))
        _, opt_state, totals, params, accuracy = jax.lax.fori_loop(0, epochs, epoch_fn, carry)
        updates = epochs * problem.steps(task)
        measures = {name: totals[name] / updates for name in ("loss", "accuracy")}
        measures |= {"replaced_units": totals["replaced_units"], "validation_accuracy": accuracy}
        measures |= {f"test_{name}": value for name, value in held_out("test", params).items()}
        return state._replace(params=params, opt_state=opt_state, task=state.task + 1), measures

    return measure, reset, train


def run_increments(
    learner: Learner,
    problem: IncrementalProblem,
    seeds: chex.Array,
    hyperparameters: dict[str, chex.Array],
    tasks: int,
    *,
    mode: LaneMode = "auto",
    checkpoint: Checkpoint | None = None,
    lanes_at_once: int | None = None,
    **settings: Any,
) -> Iterator[dict[str, Any]]:
    """Train all lanes on the first increments.

    Args:
      learner: the learner that is trained.
      problem: the classes.
      seeds: int [lanes], the seed of each lane.
      hyperparameters: arrays [lanes] by name.
      tasks: how many increments.
      mode: how the lanes of a device run, see `Lanes`.
      checkpoint: where the state is saved. A run resumes from the state found there.
      lanes_at_once: the most lanes that the devices hold, by default all; see `Lanes`.
      **settings: of `increment_programs`.

    Yields:
      after each increment, NumPy arrays [lanes] of what `run_increment` measures.
    """
    measure, reset, train = increment_programs(learner, problem, **settings)
    start = lambda seed, values: init_state(learner, seed, values)
    return run_lanes(
        start,
        train,
        problem.data,
        seeds,
        hyperparameters,
        tasks,
        mode=mode,
        checkpoint=checkpoint,
        probe=measure,
        begin=reset,  # of all learners: with nothing to reset, too, or `train` would be compiled for them again
        lanes_at_once=lanes_at_once,
    )


def _measure(learner: Learner, params: optax.Params, x: chex.Array, dormant_threshold: float) -> dict[str, chex.Array]:
    _, features = learner.predict(params, x)
    # The last of the inputs of dense layers, which is that of the output layer; if all have positions, as with `crelu`,
    # the last layer. A dict of features is not in forward order.
    forward = jax.tree.leaves([features[group.name] for group in learner.units])
    read = [h for h in forward if h.ndim == 2] or forward
    return symptoms(features, weights_of(params), ranked=read[-1:], dormant_threshold=dormant_threshold)
