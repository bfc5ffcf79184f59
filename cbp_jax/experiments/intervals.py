"""Lives of agents, divided into intervals of steps, which are the tasks of results."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cbp_jax import training
from cbp_jax.experiments import learners, memory
from cbp_jax.experiments.checks import check_counts, check_first_seed, check_lanes_at_once
from cbp_jax.experiments.empty_results import empty_results
from cbp_jax.experiments.lanes import Prepared, prepare_methods, program_of
from cbp_jax.units import Units

# key -> state, and state -> state, metrics
Agent = tuple[Callable[[chex.PRNGKey], Any], Callable[[Any], tuple[Any, dict[str, chex.Array]]]]
# key of the environments, optimizer of units -> agent
MakeAgent = Callable[[chex.PRNGKey, Callable[[Units], optax.GradientTransformation]], Agent]


def num_intervals(settings: Any) -> int:
    """Return the number of intervals of a run."""
    return math.ceil(settings.steps / settings.interval)


def total(settings: Any) -> int:
    """Return the total number of intervals of all lanes, for a progress bar."""
    return len(settings.methods) * settings.seeds * num_intervals(settings)


def check(settings: Any, *counts: str) -> None:
    """Raise a ValueError if a setting that all experiments with agents share, or one of `counts`, is out of range."""
    check_counts(settings, "seeds", "steps", "interval", "episode_length", *counts)
    check_first_seed(settings)
    if settings.lanes not in ("auto", "vmap", "map"):
        raise ValueError(f"lanes must be 'auto', 'vmap' or 'map', got {settings.lanes!r}")
    if not settings.dormant_threshold >= 0:
        raise ValueError(f"dormant_threshold must not be negative, got {settings.dormant_threshold}")


def check_rollouts(settings: Any, rollout: int) -> None:
    """Raise a ValueError unless an interval is a whole number of rollouts, of `rollout` steps each."""
    if settings.interval % rollout:
        raise ValueError(f"interval must be a multiple of a rollout's {rollout} steps, got {settings.interval}")


def prepare(
    experiment: str,
    settings: Any,
    methods: Sequence[learners.Method],
    measures: Mapping[str, str],
    train: Callable[..., Iterator[dict[str, Any]]],
    lanes_at_once: int | None = None,
) -> Prepared:
    """Prepare the training of agents with all methods and seeds; see `Experiment.prepare`.

    Args:
      experiment: its name.
      settings: checked settings.
      methods: the methods to run.
      measures: names and meanings of the measures.
      train: maps methods that differ only in numbers, and then the arguments of `lanes.Train`, to the measures [lanes]
        of each interval.
      lanes_at_once: maximum number of agents on the devices at once, by default all.

    Returns:
      a function that runs it. In its results, tasks are intervals; the coordinate `step` counts the environments' steps
      up to their ends.

    Raises:
      ValueError: the results do not fit into memory, or `lanes_at_once` is out of range.
    """
    intervals = num_intervals(settings)
    memory.check_results(len(methods), settings.seeds, intervals, len(measures))
    check_lanes_at_once(lanes_at_once)
    results = empty_results(experiment, settings, methods, intervals, measures)
    results = results.assign_coords(step=("task", settings.interval * np.arange(1, intervals + 1)))
    make = lambda group: (functools.partial(train, group), program_of(group, settings, lanes_at_once))
    return prepare_methods(results, methods, make)


class _Lane(NamedTuple):
    """The state of one agent."""

    agent: Any
    key: chex.Array  # raw key data of the seed, constant
    hyperparameters: dict[str, chex.Array]  # constant


def train(
    settings: Any,
    group: list[learners.Method],
    make_agent: MakeAgent,
    attributes: Mapping[str, Any],
    updates: int,
    measure: Callable[[Any, dict[str, chex.Array]], dict[str, chex.Array]],
    seeds: np.ndarray,
    numbers: dict[str, np.ndarray],
    checkpoint: training.Checkpoint,
    lanes_at_once: int | None,
) -> Iterator[dict[str, Any]]:
    """Train agents of methods that differ only in numbers.

    Args:
      settings: of the experiment.
      group: the methods.
      make_agent: makes an agent of the key of its environments and of its optimizer.
      attributes: what optimizers need to know of the network; see `learners.make_optimizer`.
      updates: number of calls of the agent's update in an interval.
      measure: maps an agent's state at the end of an interval and its metrics [updates] to measures, in addition to the
        mean return of episodes and the number of replaced units.
      seeds: [lanes].
      numbers: the methods' numbers, [lanes] each.
      checkpoint: where states are kept.
      lanes_at_once: maximum number of agents on the devices at once; None for all.

    Returns:
      an iterator over the measures [lanes] of each interval.
    """

    def agent(key: chex.Array, hyperparameters: dict[str, chex.Array]) -> tuple[chex.PRNGKey, Agent]:
        environments, start, optimizer = jax.random.split(jax.random.wrap_key_data(key), 3)
        make = lambda units: learners.make_optimizer(group, units, attributes)(hyperparameters, optimizer)
        return start, make_agent(environments, make)

    def first(seed: chex.Array, hyperparameters: dict[str, chex.Array]) -> _Lane:
        key = jax.random.key_data(jax.random.key(seed))
        start, (init, _) = agent(key, hyperparameters)
        return _Lane(init(start), key, hyperparameters)

    def go_on(_: Any, lane: _Lane) -> tuple[_Lane, dict[str, chex.Array]]:
        _, (_, update) = agent(lane.key, lane.hyperparameters)
        state, found = jax.lax.scan(lambda state, _: update(state), lane.agent, length=updates)
        measures = {
            "episode_return": jnp.sum(found["return_sum"]) / jnp.maximum(jnp.sum(found["episodes"]), 1),
            "replaced_units": jnp.sum(found["replaced_units"]),
        }
        return lane._replace(agent=state), measures | measure(state, found)

    count = num_intervals(settings)
    how = {"mode": settings.lanes, "checkpoint": checkpoint, "lanes_at_once": lanes_at_once}
    return training.run_lanes(first, go_on, None, seeds, numbers, count, **how)
