"""Trains a learner on a stream of tasks, online: one compiled scan per task, all lanes at once."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from cbp_jax import metrics
from cbp_jax.problems import Problem
from cbp_jax.training.lanes import Lanes
from cbp_jax.units import Features, UnitGroup

Hyperparameters = dict[str, chex.Numeric]


class Learner(NamedTuple):
    """A network and how it learns, as functions of keys and of hyperparameters that may be traced."""

    init: Callable[[chex.PRNGKey], optax.Params]  # key -> params
    predict: Callable[[optax.Params, chex.Array], tuple[chex.Array, Features]]  # params, x -> logits, features
    train: Callable[[optax.Params, chex.Array, chex.PRNGKey], tuple[chex.Array, Features]]  # the same with dropout
    optimizer: Callable[[Hyperparameters, chex.PRNGKey], optax.GradientTransformation]
    units: tuple[UnitGroup, ...]


class TrainState(NamedTuple):
    """All that a run needs to go on, one lane."""

    params: optax.Params
    opt_state: optax.OptState
    key: chex.Array  # raw key data of the seed, constant
    hyperparameters: Hyperparameters  # constant
    task: chex.Array  # int32 [], the next task


class _Keys(NamedTuple):
    """Streams of a seed: learners with the same seed see the same tasks and start from the same weights."""

    params: chex.PRNGKey
    problem: chex.PRNGKey
    optimizer: chex.PRNGKey
    dropout: chex.PRNGKey


def _keys(data: chex.Array) -> _Keys:
    return _Keys(*jax.random.split(jax.random.wrap_key_data(data), len(_Keys._fields)))


def init_state(learner: Learner, seed: chex.Array, hyperparameters: Hyperparameters) -> TrainState:
    """The state of one lane before its first task.

    Args:
      learner: what is trained.
      seed: int32 [].
      hyperparameters: scalars by name, as the learner's optimizer takes them.
    """
    key = jax.random.key_data(jax.random.key(seed))
    params = learner.init(_keys(key).params)
    opt_state = learner.optimizer(hyperparameters, _keys(key).optimizer).init(params)
    return TrainState(params, opt_state, key, hyperparameters, jnp.zeros([], jnp.int32))


def measure(learner: Learner, params: optax.Params, x: chex.Array) -> dict[str, chex.Array]:
    """The symptoms of lost plasticity, on examples x [examples, ...].

    Returns:
      scalars: `dead_units`, `weight_magnitude`, and `effective_rank` and `stable_rank`, each over the number of
      units of a hidden layer and averaged over layers.
    """
    _, features = learner.predict(params, x)
    layers = [metrics.ranks(h.reshape(-1, h.shape[-1])) for h in jax.tree.leaves(features)]
    widths = [h.shape[-1] for h in jax.tree.leaves(features)]
    return {
        "dead_units": metrics.dead_fraction(features),
        "weight_magnitude": metrics.weight_magnitude(params),
        "effective_rank": sum(rank.effective / n for rank, n in zip(layers, widths, strict=True)) / len(layers),
        "stable_rank": sum(rank.stable / n for rank, n in zip(layers, widths, strict=True)) / len(layers),
    }


def run_task(
    learner: Learner, problem: Problem, data: Any, state: TrainState, *, measured_examples: int = 2000
) -> tuple[TrainState, dict[str, chex.Array]]:
    """Measures a network on the task to come and trains it on that task, one lane.

    Args:
      learner: what is trained.
      problem: the stream of tasks.
      data: `problem.data`, an argument so that lanes share it.
      state: the lane's.
      measured_examples: how many examples of the task the network is measured on before the task.

    Returns:
      the state after the task; scalars: `accuracy` and `loss`, means over the task's examples, each taken before
      learning from it, `replaced_units`, and those of `measure`.
    """
    keys = _keys(state.key)
    task = problem.make_task(data, keys.problem, state.task)
    measures = measure(learner, state.params, problem.evaluation(data, task, measured_examples)[0])
    tx = optax.with_extra_args_support(learner.optimizer(state.hyperparameters, keys.optimizer))
    task_key = jax.random.fold_in(keys.dropout, state.task)

    def loss_fn(params, x, y, step):
        logits, features = learner.train(params, x, jax.random.fold_in(task_key, step))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        correct = jnp.mean(jnp.argmax(logits, -1) == y, dtype=jnp.float32)
        return jnp.mean(losses), (features, correct)

    def step(carry, number):
        params, opt_state, totals = carry
        x, y = problem.batch(data, task, number)
        (loss, (features, correct)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, x, y, number)
        updates, opt_state = tx.update(grads, opt_state, params, features=features)
        params = optax.apply_updates(params, updates)
        totals = jax.tree.map(jnp.add, totals, (correct, loss, _replaced(opt_state)))
        return (params, opt_state, totals), None

    totals = (jnp.zeros([]), jnp.zeros([]), jnp.zeros([]))
    carry = (state.params, state.opt_state, totals)
    (params, opt_state, totals), _ = jax.lax.scan(step, carry, jnp.arange(problem.steps_per_task))
    measures["accuracy"] = totals[0] / problem.steps_per_task
    measures["loss"] = totals[1] / problem.steps_per_task
    measures["replaced_units"] = totals[2]
    return state._replace(params=params, opt_state=opt_state, task=state.task + 1), measures


def _replaced(opt_state: optax.OptState) -> chex.Array:
    """How many units the last update replaced, whatever the optimizer state is nested in."""
    masks = optax.tree_utils.tree_get_all_with_path(opt_state, "replaced")
    return sum(
        (jnp.sum(mask, dtype=jnp.float32) for mask in jax.tree.leaves([found for _, found in masks])),
        jnp.zeros([]),
    )


def run_tasks(
    learner: Learner,
    problem: Problem,
    seeds: chex.Array,
    hyperparameters: dict[str, chex.Array],
    tasks: int,
    *,
    mode: str = "auto",
    measured_examples: int = 2000,
) -> Iterator[dict[str, Any]]:
    """Trains all lanes on a stream of tasks.

    Args:
      learner: what is trained.
      problem: the stream of tasks.
      seeds: int [lanes], the seed of each lane.
      hyperparameters: arrays [lanes] by name.
      tasks: how many tasks.
      mode: how the lanes of a device run, see `Lanes`.
      measured_examples: how many examples of a task the networks are measured on before the task.

    Yields:
      after each task, NumPy arrays [lanes] of what `run_task` measures.
    """
    lanes = Lanes(len(seeds), mode)
    data = lanes.share(problem.data)
    start = lanes.jit(lambda _, seed, values: init_state(learner, seed, values))
    go_on = lanes.jit(
        lambda data, state: run_task(learner, problem, data, state, measured_examples=measured_examples),
        donate_lane=0,
    )
    hyperparameters = {name: jnp.asarray(values) for name, values in hyperparameters.items()}
    state = start(data, lanes.scatter(jnp.asarray(seeds, jnp.int32)), lanes.scatter(hyperparameters))
    for _ in range(tasks):
        state, measures = zip(*go_on(data, state), strict=True)
        yield lanes.gather(measures)
