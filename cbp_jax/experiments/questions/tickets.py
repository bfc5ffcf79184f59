"""Do winning tickets vanish as plasticity is lost?

At regular intervals of a long Online Permuted stream, the current network is searched for winning tickets. It learns
the next task, a fraction of the living weights of least magnitude is pruned, the others are rewound to what they were
before the task, and so on, round after round. For comparison with each ticket, a random mask with as many weights in
each layer is trained from the same weights. All networks are trained by one learner, plain SGD by default, on the
examples of the task in the order of the stream, so that only the networks differ. The stream then continues as without
the search.

The measure of a mask is its online accuracy: the fraction of the task's examples that are classified correctly, each
before the network learns from it. Two numbers summarize the curve of accuracy against density:

    matching density    the least density at which, and at all larger ones of the curve, the ticket's accuracy is at
                        least that of the dense network less a tolerance; not less than that of the last round
    advantage           the accuracy of tickets minus that of random masks, mean over all rounds but the first

A weight belongs to the units on either side of it. Where units have ages, as in continual backpropagation, `young` is
the fraction of a ticket's weights that lie in units made since the last measurement, and `young_chance` that of random
masks of the same numbers per layer, as expected.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cbp_jax import tickets, training
from cbp_jax.experiments import learners, permuted, stream
from cbp_jax.experiments.checks import check_counts
from cbp_jax.experiments.empty_results import Curve
from cbp_jax.experiments.experiment import Experiment
from cbp_jax.experiments.questions import ticket_reports
from cbp_jax.experiments.questions.drawing import mean_of
from cbp_jax.numerics.scalars import check_scalar
from cbp_jax.problems import Problem
from cbp_jax.training.learner import stream_keys
from cbp_jax.units import UnitGroup, leaves_by_path

_RANDOM = 7  # folded into a seed's key for the optimizer, for random masks


@dataclasses.dataclass(frozen=True)
class Settings(permuted.Online):
    """Winning tickets along an Online Permuted stream."""

    methods: tuple[str, ...] = ("bp:step_size=0.01", "l2:step_size=0.003,l2=1e-3", "cbp:step_size=0.01")
    """Learners of the stream, as in `online_permuted`."""
    every: int = 25
    """Number of tasks from one search for tickets to the next; the first is before the first task."""
    rounds: int = 14
    """Number of rounds: how often a network is pruned in a search."""
    fraction: float = 0.3
    """Fraction of the living weights of each layer that a round prunes; half of this in the output layer."""
    ticket_learner: str = "bp:step_size=0.01"
    """Learner of dense networks, tickets and random masks. It must not replace units, need curvature, reset the
    network, or have settings of the network."""
    tolerance: float = 0.01
    """How much lower than the dense network's accuracy that of a matching ticket may be."""


def _curves(settings: Settings) -> Mapping[str, Curve]:
    rounds = range(settings.rounds + 1)
    meanings = {
        "density": "living weights over prunable weights",
        "ticket_accuracy": "online accuracy of the ticket on the next task",
        "random_accuracy": "online accuracy of a random mask of the same numbers per layer on the next task",
        "young": "fraction of the ticket's weights in units made since the last measurement",
        "young_chance": "the same of a random mask, expected",
    }
    return {name: Curve(meaning, "round", rounds) for name, meaning in meanings.items()}


def _smoke(dataset: str | None) -> Settings:
    return Settings(
        dataset=dataset or "digits",
        methods=("bp:step_size=0.02", "cbp:step_size=0.02,replacement_rate=0.01,maturity_threshold=20"),
        seeds=2,
        tasks=5,
        examples_per_task=150,
        measured_examples=100,
        hidden=(20, 20),
        every=2,
        rounds=3,
    )


def _laptop(dataset: str | None) -> Settings:
    # Each learner's best of six settings over 150 tasks with seeds 1000 and 1001, by mean accuracy; and
    # backpropagation at a larger step size, at which it loses more.
    methods = (
        "bp:step_size=0.003",
        "bp:step_size=0.01",
        "l2:step_size=0.003,l2=1e-3",
        "cbp:step_size=0.01,replacement_rate=1e-3",
    )
    sizes = {"seeds": 10, "first_seed": 100, "tasks": 301, "hidden": (50, 50, 50)}
    return Settings(dataset=dataset or "digits", methods=methods, **sizes)


def check(settings: Settings) -> list[learners.Method]:
    """Check settings before anything is computed.

    Returns:
      the methods.

    Raises:
      ValueError: a setting is out of range or unknown.
    """
    methods = stream.check(settings)
    check_counts(settings, "every", "rounds")
    if settings.every > settings.tasks:
        raise ValueError(f"every must be at most tasks = {settings.tasks}, got {settings.every}")
    check_scalar("fraction", settings.fraction, at_least=0, below=1)
    check_scalar("tolerance", settings.tolerance, at_least=0, below=1)
    if not settings.fraction > 0:
        raise ValueError(f"fraction must be above 0, got {settings.fraction}")
    _ticket_method(settings)
    for method in methods:
        if method.normalization == "online":
            raise ValueError(f"method {method.text!r}: running statistics do not fit a ticket's rewound weights")
    return methods


def _ticket_method(settings: Settings) -> learners.Method:
    (method,) = learners.read_methods([settings.ticket_learner])
    if method.needs_units or method.curvature or method.reset or method.network:
        raise ValueError(
            "ticket_learner must need no units and no curvature, and have no reset and no settings of the network, "
            f"such as 'bp'; got {settings.ticket_learner!r}"
        )
    return method


def _train(settings: Settings) -> Callable[..., Iterator[dict[str, Any]]]:
    """Return a function that trains on a stream, and seeks tickets before some of its tasks."""
    method = _ticket_method(settings)

    def train(learner: training.Learner, problem: Problem, *args: Any, **kwargs: Any) -> Iterator[dict[str, Any]]:
        probe = functools.partial(
            find_tickets,
            learner,
            problem,
            trainer=method,
            rounds=settings.rounds,
            fraction=settings.fraction,
            young_below=settings.every * problem.steps_per_task,
        )
        return training.run_tasks(learner, problem, *args, **kwargs, probe=probe, probe_every=settings.every)

    return train


def find_tickets(
    learner: training.Learner,
    problem: Problem,
    data: Any,
    state: training.TrainState,
    *,
    trainer: learners.Method,
    rounds: int,
    fraction: float,
    young_below: int,
) -> dict[str, chex.Array]:
    """Seek tickets in the current network, on its next task; one lane.

    Args:
      learner: learner of the stream.
      problem: the stream.
      data: data of the problem.
      state: state of the lane before the task.
      trainer: the method that trains the networks.
      rounds: number of prunings.
      fraction: fraction of the living weights of a layer to prune in a round; half of it in the output layer.
      young_below: units of a smaller age, in updates, are young.

    Returns:
      arrays [rounds + 1], whose first entry is for the dense network: `density`; `ticket_accuracy` and
      `random_accuracy`, NaN for networks that diverge; and, if units have ages, `young` and `young_chance`, NaN before
      the first task.
    """
    optimizer = learners.make_optimizer([trainer], learner.units, {})
    numbers = {name: jnp.float32(value) for name, value in trainer.hyperparameters.items()}
    key = jax.random.fold_in(jax.random.fold_in(stream_keys(state.key).optimizer, _RANDOM), state.task)
    rates = dict.fromkeys(training.output_layers(learner.units), 0.5)
    ages = optax.tree_utils.tree_get_all_with_path(state.opt_state, "age")
    young = young_weights(learner.units, ages[0][1], state.params, young_below) if ages else None

    def train(mask: tickets.Mask) -> tuple[optax.Params, chex.Array]:
        make = lambda numbers, key: tickets.masked(optimizer(numbers, key), mask)
        params = tickets.apply_mask(state.params, mask)
        start = state._replace(params=params, opt_state=make(numbers, key).init(params), hyperparameters=numbers)
        alone = learner._replace(optimizer=make, begin_task=None, curvature=False)
        # Measures before the task are not used, so the compiler removes them.
        after, measured = training.run_task(alone, problem, data, start, measured_examples=1)
        diverged = ~jnp.isfinite(measured["loss"])
        return after.params, jnp.where(diverged, jnp.nan, measured["accuracy"])

    def one_round(mask: tickets.Mask, number: chex.Array) -> tuple[tickets.Mask, dict[str, chex.Array]]:
        other = tickets.random_mask_like(mask, jax.random.fold_in(key, number))
        both = jax.tree.map(lambda *leaves: jnp.stack(leaves), mask, other)
        trained, accuracy = jax.lax.map(train, both)
        found = {"density": tickets.density(mask), "ticket_accuracy": accuracy[0], "random_accuracy": accuracy[1]}
        if young is not None:
            shares = young_shares(mask, young)
            found |= {name: jnp.where(state.task > 0, share, jnp.nan) for name, share in shares.items()}
        return tickets.prune(jax.tree.map(lambda leaf: leaf[0], trained), mask, fraction, rates=rates), found

    whole = tickets.full_mask(state.params, select=lambda path, leaf: path in learner.units.kernels)
    return jax.lax.scan(one_round, whole, jnp.arange(rounds + 1))[1]


def young_weights(
    units: Sequence[UnitGroup], ages: Mapping[str, chex.Array], params: optax.Params, below: int
) -> dict[str, chex.Array]:
    """Return which weights lie in young units: those that write or read one.

    Args:
      units: the units of the network.
      ages: for each group, int32 [units].
      params: the params of the network.
      below: units of a smaller age are young.

    Returns:
      bool arrays of the kernels' shapes, by path; kernels without units are missing.
    """
    leaves = leaves_by_path(params)
    found: dict[str, chex.Array] = {}
    for group in units:
        for part in (*group.incoming, *(consumer.kernel for consumer in group.outgoing)):
            mask = jnp.broadcast_to(part.mask(ages[group.name] < below, leaves[part.path]), leaves[part.path].shape)
            found[part.path] = found[part.path] | mask if part.path in found else mask
    return found


def young_shares(mask: tickets.Mask, young: Mapping[str, chex.Array]) -> dict[str, chex.Array]:
    """Return the fraction of a mask's living weights that lie in young units, and that of random masks.

    Args:
      mask: mask of a ticket.
      young: output of `young_weights`.

    Returns:
      float32 scalars: `young`, and `young_chance`, the expectation for masks with as many weights in each array at
      random.
    """
    there = expected = alive = jnp.float32(0)
    count = lambda leaf: jnp.sum(leaf, dtype=jnp.int32).astype(jnp.float32)
    for path, living in tickets.masks.prunable(mask).items():
        alive += count(living)
        if path in young:
            there += count(living & young[path])
            expected += count(living) * count(young[path]) / living.size
    return {"young": there / alive, "young_chance": expected / alive}


def matching_round(accuracy: np.ndarray, tolerance: float) -> np.ndarray:
    """Return the last round before the first whose ticket is worse than the dense network.

    Args:
      accuracy: [..., rounds], where the first is that of the dense network.
      tolerance: how much lower than the dense network's accuracy that of a ticket may be.

    Returns:
      int [...].

    Example:
      >>> int(matching_round(np.array([0.9, 0.91, 0.8, 0.9]), 0.01))
      1
    """
    enough = accuracy >= accuracy[..., :1] - tolerance
    return np.maximum(enough.cumprod(-1).sum(-1) - 1, 0)


def measured(results: Any) -> dict[str, dict[str, np.ndarray]]:
    """Return the values that tables and pictures show, by name and method, [seeds, measurements].

    Args:
      results: results of a run, finished or not.

    Returns:
      `log_density`, the logarithm of the matching density; `advantage`; `dense_accuracy`, and `best_accuracy`, that of
      the best ticket; `young`, the ratio of `young` to `young_chance` at the matching density; and `effective_rank` and
      `dead_units` before the same tasks.
    """
    settings = json.loads(results.attrs["settings"])
    tasks = slice(0, None, settings["every"])
    found: dict[str, dict[str, np.ndarray]] = {}
    for method in results.method.values.tolist():
        at = lambda name, method=method: ticket_reports.values_of(results, name, method)[:, tasks]
        ticket, random = at("ticket_accuracy"), at("random_accuracy")
        chosen = matching_round(ticket, settings["tolerance"])[..., None]
        pick = lambda name, at=at, chosen=chosen: np.take_along_axis(at(name), chosen, -1)[..., 0]
        chance = pick("young_chance")
        values = {
            "log_density": np.log(pick("density")),
            "advantage": mean_of((ticket - random)[..., 1:]),
            "dense_accuracy": ticket[..., 0],
            "best_accuracy": np.fmax.reduce(ticket, -1),  # of those that did not diverge
            "young": pick("young") / np.where(chance > 0, chance, np.nan),
            "effective_rank": at("effective_rank"),
            "dead_units": at("dead_units"),
        }
        for name, array in values.items():
            found.setdefault(name, {})[method] = array
    return found


question_tickets = Experiment(
    name="question_tickets",
    about="Do winning tickets vanish as plasticity is lost? Tickets of the current network, along a stream.",
    Settings=Settings,
    presets={"smoke": _smoke, "laptop": _laptop},
    problem=permuted.online_permuted.problem,
    network=permuted.online_permuted.network,
    train=_train,
    curves=_curves,
    check=check,
    plot=lambda results, out, formats=("png",): ticket_reports.plot(results, measured(results), out, formats),
    summary=lambda results: ticket_reports.summary(results, measured(results)),
)
