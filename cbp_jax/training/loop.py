"""Trains a learner online on a stream of tasks: one compiled scan per task, for all lanes at once."""

from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from cbp_jax.losses import LOSSES
from cbp_jax.problems import Problem
from cbp_jax.replacement import replaced_units
from cbp_jax.training.checkpoint import Checkpoint
from cbp_jax.training.lanes import LaneMode, Lanes
from cbp_jax.training.learner import (
    Hyperparameters,
    Learner,
    TrainState,
    begin_task,
    init_state,
    stream_keys,
    weights_of,
)
from cbp_jax.training.step import OF_UPDATES, evaluate, learn
from cbp_jax.training.symptoms import symptoms


def measure(
    learner: Learner,
    params: optax.Params,
    x: chex.Array,
    *,
    matrices: bool = False,
    dormant_threshold: float | None = None,
) -> dict[str, chex.Array]:
    """Measure the symptoms of lost plasticity on examples x [examples, ...].

    Args:
      learner: the learner whose network is measured.
      params: the network's parameters.
      x: examples.
      matrices: whether to measure the weights as matrices too.
      dormant_threshold: largest score of a dormant unit, see `metrics.dormant_fraction`. By default dormant units are
        not counted.

    Returns:
      the result of `symptoms`, for all hidden layers.
    """
    _, features = learner.predict(params, x)
    return symptoms(features, weights_of(params), matrices=matrices, dormant_threshold=dormant_threshold)


def run_task(
    learner: Learner,
    problem: Problem,
    data: Any,
    state: TrainState,
    *,
    measured_examples: int = 2000,
    measure_every: int | None = None,
    dormant_threshold: float | None = None,
) -> tuple[TrainState, dict[str, chex.Array]]:
    """Measure a network on the next task, and train it on that task. Runs one lane.

    Args:
      learner: the learner that is trained.
      problem: the stream of tasks.
      data: `problem.data`, an argument so that lanes share it.
      state: the lane's state.
      measured_examples: number of examples of the task on which the network is measured before the task.
      measure_every: number of steps between measurements of plasticity and gradients, each of which takes an extra
        forward pass; at most the steps of a task. By default they are not measured.
      dormant_threshold: as in `measure`.

    Returns:
      the state after the task; and scalars: `loss`, and for a classification `accuracy`, means over the task's
      examples, each measured before learning from it; `replaced_units`; those of `measure`; and for a classification
      with test examples `test_accuracy` and `test_loss` after the task. With `measure_every` also means over the
      measured steps: `plasticity`, from each example's loss before and after the update, and for gradients
      `gradient_l0`, the fraction that is not 0, `gradient_l1` and `gradient_l2`.

    """
    keys = stream_keys(state.key)
    task = problem.make_task(data, keys.problem, state.task)
    measures = measure(
        learner,
        state.params,
        problem.evaluation(data, task, measured_examples)[0],
        matrices=measure_every is not None,
        dormant_threshold=dormant_threshold,
    )
    tx = optax.with_extra_args_support(learner.optimizer(state.hyperparameters, keys.optimizer))
    task_key = jax.random.fold_in(keys.dropout, state.task)
    reference_key = jax.random.fold_in(task_key, 2**31)

    def earlier(number):
        """Return inputs of earlier batches of this task, drawn with replacement; in the first step, the batch
        itself."""
        drawn = jax.random.randint(jax.random.fold_in(reference_key, number), (learner.reference,), 0, number)
        x = jax.vmap(lambda each: problem.batch(data, task, each)[0])(drawn)
        return x.reshape(-1, *x.shape[2:])

    def step(carry, number, measured=False):
        params, opt_state, totals = carry
        params, opt_state, found = learn(
            learner,
            tx,
            problem.loss,
            params,
            opt_state,
            problem.batch(data, task, number),
            jax.random.fold_in(task_key, number),
            measured=measured,
            reference=earlier(number) if learner.reference else None,
        )
        found["replaced_units"] = replaced_units(opt_state)
        totals = totals | {name: totals[name] + value for name, value in found.items()}
        return (params, opt_state, totals), None

    def plain_then_measured(carry, numbers):
        carry, _ = jax.lax.scan(step, carry, numbers[:-1])
        return step(carry, numbers[-1], measured=True)

    steps, every = problem.steps_per_task, measure_every or problem.steps_per_task
    of_steps, of_updates = ("loss", *LOSSES[problem.loss].metrics), OF_UPDATES if measure_every is not None else ()
    totals = {name: jnp.zeros([]) for name in ("replaced_units", *of_steps, *of_updates)}
    carry = (*begin_task(learner, tx, state), totals)
    numbers = jnp.arange(steps)
    if measure_every is not None:
        whole = steps // every * every
        carry, _ = jax.lax.scan(plain_then_measured, carry, numbers[:whole].reshape(-1, every))
        numbers = numbers[whole:]
    if numbers.size:
        carry, _ = jax.lax.scan(step, carry, numbers)
    params, opt_state, totals = carry
    measures["replaced_units"] = totals["replaced_units"]
    measures |= {name: totals[name] / steps for name in of_steps}
    measures |= {name: totals[name] / (steps // every) for name in of_updates}
    if problem.test is not None:
        found = evaluate(learner, problem.loss, params, problem.test(data, task))
        measures |= {f"test_{name}": value for name, value in found.items()}
    return state._replace(params=params, opt_state=opt_state, task=state.task + 1), measures


def run_tasks(
    learner: Learner,
    problem: Problem,
    seeds: chex.Array,
    hyperparameters: dict[str, chex.Array],
    tasks: int,
    *,
    mode: LaneMode = "auto",
    measured_examples: int = 2000,
    measure_every: int | None = None,
    dormant_threshold: float | None = None,
    checkpoint: Checkpoint | None = None,
    probe: Callable[[Any, TrainState], dict[str, chex.Array]] | None = None,
    probe_every: int = 1,
    lanes_at_once: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Train all lanes on a stream of tasks.

    Args:
      learner: the learner that is trained.
      problem: the stream of tasks.
      seeds: int [lanes], the seed of each lane.
      hyperparameters: arrays [lanes] by name.
      tasks: how many tasks.
      mode: how the lanes of a device run, see `Lanes`.
      measured_examples: how many examples of a task the networks are measured on before the task.
      measure_every: as in `run_task`.
      dormant_threshold: as in `measure`.
      checkpoint: file for the state. A run resumes from the state found there, after `checkpoint.tasks` tasks.
      probe: further measurements of a lane before some tasks, see `run_lanes`.
      probe_every: number of tasks between probes, beginning with the first task.
      lanes_at_once: the most lanes that the devices hold, by default all; see `Lanes`.

    Yields:
      after each task, NumPy arrays [lanes] of what `run_task` measures, and arrays [lanes, ...] of what the probe does.

    Raises:
      ValueError: there are no lanes, the mode is unknown, or the checkpoint belongs to another run.

    Example:
      >>> from cbp_jax import data, problems
      >>> from cbp_jax.experiments.learners import make_learner, parse_method
      >>> problem = problems.online_permuted(data.load("digits"), examples_per_task=20)
      >>> method = parse_method("cbp:step_size=0.01")
      >>> learner = make_learner([method], (8,), "relu", problem.input_shape, problem.num_classes)
      >>> numbers = {name: jnp.full(2, value) for name, value in method.hyperparameters.items()}
      >>> tasks = run_tasks(learner, problem, jnp.arange(2), numbers, 3, measured_examples=20)
      >>> [measured["accuracy"].shape for measured in tasks]
      [(2,), (2,), (2,)]
    """
    go_on = lambda data, state: run_task(
        learner,
        problem,
        data,
        state,
        measured_examples=measured_examples,
        measure_every=measure_every,
        dormant_threshold=dormant_threshold,
    )
    start = lambda seed, values: init_state(learner, seed, values)
    return run_lanes(
        start,
        go_on,
        problem.data,
        seeds,
        hyperparameters,
        tasks,
        mode=mode,
        checkpoint=checkpoint,
        probe=probe,
        probe_every=probe_every,
        lanes_at_once=lanes_at_once,
    )


def run_lanes(
    start: Callable[[chex.Array, Hyperparameters], Any],
    go_on: Callable[[Any, Any], tuple[Any, dict[str, chex.Array]]],
    data: Any,
    seeds: chex.Array,
    hyperparameters: dict[str, chex.Array],
    tasks: int,
    *,
    mode: LaneMode = "auto",
    checkpoint: Checkpoint | None = None,
    begin: Callable[[Any, Any], Any] | None = None,
    finish: Callable[[Any], None] | None = None,
    probe: Callable[[Any, Any], dict[str, chex.Array]] | None = None,
    probe_every: int = 1,
    lanes_at_once: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Run tasks on all lanes.

    Args:
      start: `start(seed, hyperparameters)` returns the state of a lane before its first task; the seed is int32 [].
      go_on: runs one lane through a task, `(data, state) -> (state, measures)`.
      data: data that all lanes share.
      seeds: as in `run_tasks`, like the next arguments.
      hyperparameters: arrays [lanes] by name.
      tasks: how many tasks.
      mode: how the lanes of a device run.
      checkpoint: where the state is kept.
      begin: changes the state of one lane before each task, `(data, state) -> state`. It is a separate program, so
        that learners that differ only there share the rest, if JAX's compilation cache is on.
      finish: called after the last task with the states [lanes, ...] on the host; called again if the run was stopped
        during the call.
      probe: further measurements of one lane before some tasks, `(data, state) -> measures`. It is a separate program,
        for measurements that take long and change nothing.
      probe_every: number of tasks between probes, beginning with the first task.
      lanes_at_once: as in `run_tasks`.

    Yields:
      after each task, NumPy arrays [lanes] of measurements, including those of the probe if it ran.
    """
    lanes = Lanes(len(seeds), mode, at_once=lanes_at_once)
    data = lanes.share(data)
    first = lanes.jit(lambda _, seed, values: start(seed, values), once=True)
    prepare = None if begin is None else lanes.jit(begin, donate_lane=0, once=True)
    step = lanes.jit(go_on, donate_lane=0)
    look = None if probe is None else lanes.jit(probe)
    hyperparameters = {name: jnp.asarray(values) for name, values in hyperparameters.items()}
    state = first(data, lanes.scatter(jnp.asarray(seeds, jnp.int32)), lanes.scatter(hyperparameters))
    done = 0
    if checkpoint is not None and checkpoint.tasks:
        done = checkpoint.tasks
        state = lanes.scatter(checkpoint.restore(lanes.gather(state)))
    for task in range(done, tasks):
        found = lanes.gather(look(data, state)) if look is not None and task % probe_every == 0 else {}
        if prepare is not None:
            state = prepare(data, state)
        state, measures = zip(*step(data, state), strict=True)
        found = {**lanes.gather(measures), **found}
        if checkpoint is not None:
            checkpoint.stops.hold()  # until the state is saved
        yield found
        if checkpoint is not None:
            # The code after the last task can fail, or be killed, too.
            last = finish is not None and task + 1 == tasks
            checkpoint.save(task + 1, lambda: lanes.gather(state), now=last)  # noqa: B023
    if finish is not None:
        finish(lanes.gather(state))
