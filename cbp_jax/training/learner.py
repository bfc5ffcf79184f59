"""The learner, and the state of one lane."""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from cbp_jax.nets import online_norm
from cbp_jax.units import Features, UnitGroup

# Collections of a network's variables that are not trained by gradients.
INJECTION = "injection"  # frozen heads
STATISTICS = ("batch_stats", online_norm.COLLECTION, INJECTION)

Hyperparameters = dict[str, chex.Numeric]


class Learner(NamedTuple):
    """A network and its optimizer, as functions of keys and of hyperparameters, which may be traced."""

    init: Callable[[chex.PRNGKey], optax.Params]  # key -> params
    predict: Callable[[optax.Params, chex.Array], tuple[chex.Array, Features]]  # params, x -> logits, features
    train: Callable[[optax.Params, chex.Array, chex.PRNGKey], tuple[chex.Array, Features]]  # the same in training
    optimizer: Callable[[Hyperparameters, chex.PRNGKey], optax.GradientTransformation]
    units: tuple[UnitGroup, ...]
    # optimizer, key, number of the task, params, state of the optimizer -> params, state; before each task
    begin_task: Callable[..., tuple[optax.Params, optax.OptState]] | None = None
    batch_stats: bool = False  # whether outputs of `train` are (logits, new running statistics), see `run_increment`
    curvature: bool = False  # whether the optimizer needs the diagonal of the Hessian, from HesScale
    reference: int = 0  # how many earlier batches the optimizer gets with each update, as `reference`
    scheduled: str = "step_size"  # the hyperparameter that schedules multiply


class TrainState(NamedTuple):
    """State needed to resume one lane."""

    params: optax.Params
    opt_state: optax.OptState
    key: chex.Array  # raw key data of the seed, constant
    hyperparameters: Hyperparameters  # constant
    task: chex.Array  # int32 [], the next task


class _Keys(NamedTuple):
    """Random streams of a seed: learners with the same seed see the same tasks and start from the same weights."""

    params: chex.PRNGKey
    problem: chex.PRNGKey
    optimizer: chex.PRNGKey
    dropout: chex.PRNGKey


def stream_keys(data: chex.Array) -> _Keys:
    """Return the random streams of a seed, from its raw key data."""
    return _Keys(*jax.random.split(jax.random.wrap_key_data(data), len(_Keys._fields)))


def init_state(learner: Learner, seed: chex.Array, hyperparameters: Hyperparameters) -> TrainState:
    """Return the state of one lane before its first task.

    Args:
      learner: the learner that is trained.
      seed: int32 [].
      hyperparameters: scalars by name, for the learner's optimizer.

    Returns:
      the state.
    """
    key = jax.random.key_data(jax.random.key(seed))
    params = learner.init(stream_keys(key).params)
    opt_state = learner.optimizer(hyperparameters, stream_keys(key).optimizer).init(params)
    return TrainState(params, opt_state, key, hyperparameters, jnp.zeros([], jnp.int32))


def begin_task(
    learner: Learner, tx: optax.GradientTransformation, state: TrainState
) -> tuple[optax.Params, optax.OptState]:
    """Return parameters and optimizer state after the learner's changes at the start of a task."""
    if learner.begin_task is None:
        return state.params, state.opt_state
    key = jax.random.fold_in(stream_keys(state.key).params, state.task)
    return learner.begin_task(tx, key, state.task, state.params, state.opt_state)


def weights_of(tree: optax.Params) -> optax.Params:
    """Return the trained variables of a network: all but statistics."""
    if isinstance(tree, dict):
        return {name: leaves for name, leaves in tree.items() if name not in STATISTICS}
    return tree
