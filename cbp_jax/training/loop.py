"""Trains a learner on a stream of tasks, online: one compiled scan per task, all lanes at once."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from cbp_jax import curvature, metrics
from cbp_jax.nets import online_norm
from cbp_jax.problems import Problem
from cbp_jax.replacement import replaced_units
from cbp_jax.training.checkpoint import Checkpoint
from cbp_jax.training.lanes import Lanes
from cbp_jax.units import Features, UnitGroup, reset_batch_stats

# Collections of a network's variables that are learned by no gradient.
STATISTICS = ("batch_stats", online_norm.COLLECTION)

Hyperparameters = dict[str, chex.Numeric]


class Learner(NamedTuple):
    """A network and how it learns, as functions of keys and of hyperparameters that may be traced."""

    init: Callable[[chex.PRNGKey], optax.Params]  # key -> params
    predict: Callable[[optax.Params, chex.Array], tuple[chex.Array, Features]]  # params, x -> logits, features
    train: Callable[[optax.Params, chex.Array, chex.PRNGKey], tuple[chex.Array, Features]]  # the same with dropout
    optimizer: Callable[[Hyperparameters, chex.PRNGKey], optax.GradientTransformation]
    units: tuple[UnitGroup, ...]
    # optimizer, key, number of the task, params, state of the optimizer -> params, state; before each task
    begin_task: Callable[..., tuple[optax.Params, optax.OptState]] | None = None
    batch_stats: bool = False  # whether outputs of `train` are (logits, new running statistics), see `run_increment`
    curvature: bool = False  # whether the optimizer wants the diagonal of the Hessian, from HesScale
    scheduled: str = "step_size"  # the hyperparameter that a schedule multiplies


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


def stream_keys(data: chex.Array) -> _Keys:
    """The streams of a seed, from its raw key data."""
    return _Keys(*jax.random.split(jax.random.wrap_key_data(data), len(_Keys._fields)))


def init_state(learner: Learner, seed: chex.Array, hyperparameters: Hyperparameters) -> TrainState:
    """The state of one lane before its first task.

    Args:
      learner: what is trained.
      seed: int32 [].
      hyperparameters: scalars by name, as the learner's optimizer takes them.

    Returns:
      the state.
    """
    key = jax.random.key_data(jax.random.key(seed))
    params = learner.init(stream_keys(key).params)
    opt_state = learner.optimizer(hyperparameters, stream_keys(key).optimizer).init(params)
    return TrainState(params, opt_state, key, hyperparameters, jnp.zeros([], jnp.int32))


def measure(
    learner: Learner,
    params: optax.Params,
    x: chex.Array,
    *,
    matrices: bool = False,
    dormant_threshold: float | None = None,
) -> dict[str, chex.Array]:
    """The symptoms of lost plasticity, on examples x [examples, ...].

    Args:
      learner: whose network it is.
      params: its parameters.
      x: examples.
      matrices: whether to measure the weights too.
      dormant_threshold: largest score of a unit that counts as dormant, see `metrics.dormant_fraction`; by default
        they are not counted.

    Returns:
      scalars: `dead_units`, `weight_magnitude`, and `effective_rank` and `stable_rank`, each over the number of
      units of a hidden layer and averaged over layers. With `matrices` also `weight_rank`, over the largest possible,
      `weight_l1` and `weight_l2`; with a threshold `dormant_units`.
    """
    _, features = learner.predict(params, x)
    weights = weights_of(params)
    layers = [metrics.ranks(h.reshape(-1, h.shape[-1])) for h in jax.tree.leaves(features)]
    widths = [h.shape[-1] for h in jax.tree.leaves(features)]
    measures = {
        "dead_units": metrics.dead_fraction(features),
        "weight_magnitude": metrics.weight_magnitude(weights),
        "effective_rank": sum(rank.effective / n for rank, n in zip(layers, widths, strict=True)) / len(layers),
        "stable_rank": sum(rank.stable / n for rank, n in zip(layers, widths, strict=True)) / len(layers),
    }
    if dormant_threshold is not None:
        measures["dormant_units"] = metrics.dormant_fraction(features, dormant_threshold)
    if matrices:
        measures["weight_rank"] = metrics.weight_rank(weights)
        measures["weight_l1"] = optax.tree.norm(weights, ord=1)
        measures["weight_l2"] = optax.tree.norm(weights)
    return measures


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
    """Measures a network on the task to come and trains it on that task, one lane.

    Args:
      learner: what is trained.
      problem: the stream of tasks.
      data: `problem.data`, an argument so that lanes share it.
      state: the lane's.
      measured_examples: how many examples of the task the network is measured on before the task.
      measure_every: every so many steps plasticity and gradients are measured, which takes another forward pass;
        at most the steps of a task. By default they are not.
      dormant_threshold: as in `measure`.

    Returns:
      the state after the task; scalars: `loss`, and `accuracy` where the task is a classification, means over the
      task's examples, each taken before learning from it, `replaced_units`, those of `measure`, and `test_accuracy`
      and `test_loss` after the task, where the problem has test examples (of a classification). With `measure_every`
      also means over the steps measured: `plasticity`, of each example by the loss before and after
      the update, and of the gradients `gradient_l0`, the fraction that is not 0, `gradient_l1` and `gradient_l2`.

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
    losses_of = _LOSSES[problem.loss]

    def loss_fn(params, x, y, key):
        outputs, features, statistics = in_training(learner, params, x, key)
        losses = losses_of(outputs, y)
        return jnp.mean(losses), (features, outputs, losses, statistics)

    def step(carry, number, measured=False):
        params, opt_state, totals = carry
        x, y = problem.batch(data, task, number)
        key = jax.random.fold_in(task_key, number)
        extra = {}
        if learner.curvature:
            outputs_of = lambda params, x: in_training(learner, params, x, key)[0]
            extra["hessian_diag"] = curvature.hesscale(outputs_of, params, x, y, problem.loss)[2]
        (loss, (features, outputs, losses, statistics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            params, x, y, key
        )
        updates, opt_state = tx.update(grads, opt_state, params, features=features, **extra)
        params = with_statistics(learner, optax.apply_updates(params, updates), opt_state, statistics)
        found = {"loss": loss, "replaced_units": replaced_units(opt_state)}
        if problem.loss == "softmax_cross_entropy":
            found["accuracy"] = jnp.mean(jnp.argmax(outputs, -1) == y, dtype=jnp.float32)
        if measured:
            after = losses_of(in_training(learner, params, x, key)[0], y)
            grads = weights_of(grads)
            found["plasticity"] = jnp.mean(metrics.plasticity(losses, after))
            nonzero = sum(jnp.count_nonzero(g) for g in jax.tree.leaves(grads))
            found["gradient_l0"] = nonzero / optax.tree.size(grads)
            found["gradient_l1"] = optax.tree.norm(grads, ord=1)
            found["gradient_l2"] = optax.tree.norm(grads)
        totals = totals | {name: totals[name] + value for name, value in found.items()}
        return (params, opt_state, totals), None

    def plain_then_measured(carry, numbers):
        carry, _ = jax.lax.scan(step, carry, numbers[:-1])
        return step(carry, numbers[-1], measured=True)

    steps, every = problem.steps_per_task, measure_every or problem.steps_per_task
    params, opt_state = state.params, state.opt_state
    if learner.begin_task is not None:
        task_params_key = jax.random.fold_in(keys.params, state.task)
        params, opt_state = learner.begin_task(tx, task_params_key, state.task, params, opt_state)
    names = ["loss", "replaced_units"] + (["accuracy"] if problem.loss == "softmax_cross_entropy" else [])
    if measure_every is not None:
        names += ["plasticity", "gradient_l0", "gradient_l1", "gradient_l2"]
    carry = (params, opt_state, {name: jnp.zeros([]) for name in names})
    numbers = jnp.arange(steps)
    if measure_every is not None:
        whole = steps // every * every
        carry, _ = jax.lax.scan(plain_then_measured, carry, numbers[:whole].reshape(-1, every))
        numbers = numbers[whole:]
    if numbers.size:
        carry, _ = jax.lax.scan(step, carry, numbers)
    params, opt_state, totals = carry
    for name, total in totals.items():
        count = steps if name in ("accuracy", "loss") else 1 if name == "replaced_units" else steps // every
        measures[name] = total / count
    if problem.test is not None:
        x, y = problem.test(data, task)
        outputs, _ = learner.predict(params, x)
        measures["test_loss"] = jnp.mean(losses_of(outputs, y))
        if problem.loss == "softmax_cross_entropy":
            measures["test_accuracy"] = jnp.mean(jnp.argmax(outputs, -1) == y, dtype=jnp.float32)
    return state._replace(params=params, opt_state=opt_state, task=state.task + 1), measures


# Of each example, [batch].
_LOSSES: dict[str, Callable[[chex.Array, chex.Array], chex.Array]] = {
    "softmax_cross_entropy": optax.softmax_cross_entropy_with_integer_labels,
    "squared_error": lambda outputs, targets: jnp.sum(optax.squared_error(outputs, targets), -1),
}


def in_training(
    learner: Learner, params: optax.Params, x: chex.Array, key: chex.PRNGKey
) -> tuple[chex.Array, Features, Any]:
    """Outputs, features, and new running statistics, or None where the network has none."""
    outputs, features = learner.train(params, x, key)
    outputs, statistics = outputs if learner.batch_stats else (outputs, None)
    return outputs, features, statistics


def with_statistics(learner: Learner, params: optax.Params, opt_state: optax.OptState, statistics: Any) -> optax.Params:
    """Parameters with new running statistics in place of what an optimizer made; those of replaced units restart."""
    if not learner.batch_stats:
        return params
    found = optax.tree_utils.tree_get_all_with_path(opt_state, "replaced")
    if found:
        statistics = reset_batch_stats(statistics, learner.units, found[0][1])
    return {**params, **statistics}


def weights_of(tree: optax.Params) -> optax.Params:
    """What is learned of a network's variables: all but statistics."""
    if isinstance(tree, dict):
        return {name: leaves for name, leaves in tree.items() if name not in STATISTICS}
    return tree


def run_tasks(
    learner: Learner,
    problem: Problem,
    seeds: chex.Array,
    hyperparameters: dict[str, chex.Array],
    tasks: int,
    *,
    mode: str = "auto",
    measured_examples: int = 2000,
    measure_every: int | None = None,
    dormant_threshold: float | None = None,
    checkpoint: Checkpoint | None = None,
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
      measure_every: as in `run_task`.
      dormant_threshold: as in `measure`.
      checkpoint: where the state is kept. A run goes on from the state found there, after `checkpoint.tasks` tasks.

    Yields:
      after each task, NumPy arrays [lanes] of what `run_task` measures.

    Raises:
      ValueError: there are no lanes, the mode is unknown, the checkpoint is of another run.

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
    return run_lanes(start, go_on, problem.data, seeds, hyperparameters, tasks, mode=mode, checkpoint=checkpoint)


def run_lanes(
    start: Callable[[chex.Array, Hyperparameters], Any],
    go_on: Callable[[Any, Any], tuple[Any, dict[str, chex.Array]]],
    data: Any,
    seeds: chex.Array,
    hyperparameters: dict[str, chex.Array],
    tasks: int,
    *,
    mode: str = "auto",
    checkpoint: Checkpoint | None = None,
    finish: Callable[[Any], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Runs task after task on all lanes.

    Args:
      start: the state of a lane before its first task, of its seed, int32 [], and hyperparameters.
      go_on: what one lane does in a task, `(data, state) -> (state, measures)`.
      data: what all lanes share.
      seeds: as in `run_tasks`, like what follows.
      hyperparameters: arrays [lanes] by name.
      tasks: how many tasks.
      mode: how the lanes of a device run.
      checkpoint: where the state is kept.
      finish: called after the last task with the states [lanes, ...], on the host; again, where the run was stopped
        before it came back.

    Yields:
      after each task, NumPy arrays [lanes] of what was measured.
    """
    lanes = Lanes(len(seeds), mode)
    data = lanes.share(data)
    first = lanes.jit(lambda _, seed, values: start(seed, values))
    step = lanes.jit(go_on, donate_lane=0)
    hyperparameters = {name: jnp.asarray(values) for name, values in hyperparameters.items()}
    state = first(data, lanes.scatter(jnp.asarray(seeds, jnp.int32)), lanes.scatter(hyperparameters))
    done = 0
    if checkpoint is not None and checkpoint.tasks:
        done = checkpoint.tasks
        state = lanes.scatter(checkpoint.restore(lanes.gather(state)))
    for task in range(done, tasks):
        state, measures = zip(*step(data, state), strict=True)
        yield lanes.gather(measures)
        if checkpoint is not None:
            # What comes after the last task can fail, or be killed, as well.
            last = finish is not None and task + 1 == tasks
            checkpoint.save(task + 1, lambda: lanes.gather(state), now=last)  # noqa: B023
    if finish is not None:
        finish(lanes.gather(state))
