"""Continual MinAtar: PQN (Gallici et al., ICLR 2025) plays a game whose channels and actions are shuffled periodically.

The agent and its settings are those of its public program for MinAtar, except that the network has dense layers only, a
run has fewer steps, and the step size and exploration do not decay over the run: after a change there is as much to
learn as at the start, and the agent is not informed of it. The problem is our own; the games are gymnax's.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Literal

import chex
import jax.numpy as jnp

from cbp_jax import envs, nets
from cbp_jax.experiments import agents, intervals, learners
from cbp_jax.experiments.checks import check_hidden
from cbp_jax.experiments.experiment import Experiment
from cbp_jax.experiments.lanes import Job
from cbp_jax.rl import pqn
from cbp_jax.rl.streaming import Exploration

NAME = "continual_minatar"

#: Measures of each interval, for each method and seed.
MEASURES: dict[str, str] = {
    "episode_return": "mean return of the episodes that ended in the interval",
    "episode_length": "mean length of the same episodes, in steps",
    "dormant_units": "fraction of hidden units of small activation, relative to their layer's, at the end",
    "stable_rank": "stable rank of the last hidden layer over its number of units, at the end",
    "weight_magnitude": "mean absolute weight, at the end",
    "td_error": "mean squared difference of values and their targets",
    "value": "mean value of the actions taken",
    "replaced_units": "units replaced during the interval",
    "period": "mean number of changes so far, over environments, at the end",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """PQN on a game of MinAtar that changes periodically."""

    methods: tuple[str, ...] = (
        "adam:step_size=5e-4",
        "shrink_and_perturb_adam:step_size=5e-4",
        "redo_adam:step_size=5e-4",
        "cbp_adam:step_size=5e-4",
    )
    """Learners to compare, optionally with settings: "adam:b1=0.99,b2=0.99"."""
    seeds: int = 5
    """Number of runs of each method, with different seeds."""
    first_seed: int = 0
    """The first seed; the others follow."""
    game: str = "breakout"
    """The game: "asterix", "breakout", "freeway" or "space_invaders"."""
    steps: int = 4_194_304
    """Total number of steps of all environments together, rounded up to whole intervals."""
    interval: int = 65_536
    """Number of steps between measurements; a multiple of a rollout's steps."""
    change_every: int = 524_288
    """Number of steps after which channels and actions are shuffled, in each environment at the end of an episode."""
    shuffle: Literal["channels", "pixels", ""] = "channels"
    """What is shuffled in observations: "channels", "pixels", or "" for nothing."""
    shuffle_actions: bool = True
    """Whether actions are shuffled."""
    episode_length: int = 1000
    """Time limit of an episode, in steps."""
    num_envs: int = 64
    """Number of parallel environments in a rollout."""
    rollout_length: int = 32
    """Number of steps of each environment in a rollout."""
    epochs: int = 2
    """Number of epochs over a rollout."""
    minibatches: int = 16
    """Number of minibatches, and so of updates, in an epoch."""
    discount: float = 0.99
    """Discount for each step."""
    trace_decay: float = 0.65
    """Lambda of Q(lambda)."""
    max_grad_norm: float | None = 10.0
    """Maximum norm of gradients, by clipping."""
    exploration_start: float = 1.0
    """Initial fraction of random actions."""
    exploration_end: float = 0.05
    """Final fraction of random actions."""
    exploration_steps: int = 131_072
    """Number of steps in which the fraction decreases, only once: the agent is not informed of changes."""
    hidden: tuple[int, ...] = (128, 128)
    """Sizes of the hidden layers, unless a method sets its own."""
    activation: str = "relu"
    """Activation of the hidden layers, unless a method sets its own."""
    layer_norm: bool = True
    """Whether to normalize hidden layers, unless a method sets its own normalization."""
    dormant_threshold: float = 0.01
    """Largest activation of a dormant unit, relative to the mean of its layer."""
    lanes: Literal["auto", "vmap", "map"] = "auto"
    """How seeds run on one device: in parallel (vmap) or in turn (map); auto chooses by device."""


SMOKE = Settings(
    methods=("adam:step_size=5e-4", "cbp_adam:step_size=5e-4,replacement_rate=1e-2,maturity_threshold=10"),
    seeds=1,
    steps=4_096,
    interval=1_024,
    change_every=2_048,
    episode_length=50,
    num_envs=8,
    rollout_length=16,
    minibatches=2,
    exploration_steps=1_024,
    hidden=(16, 16),
)


def check(settings: Settings) -> list[learners.Method]:
    """Check settings, as `stream.check` does."""
    intervals.check(settings, "change_every")
    check_hidden(settings.hidden)
    intervals.check_rollouts(settings, pqn_settings(settings).steps)
    if settings.change_every < settings.num_envs:
        raise ValueError(
            f"change_every must be at least num_envs = {settings.num_envs}, a step of each environment, got "
            f"{settings.change_every}"
        )
    agents.check_episodes(settings)
    methods = learners.read_methods(settings.methods, activation=settings.activation)
    for text, method in zip(learners.texts_of(settings.methods, methods), methods, strict=True):
        if method.normalization == "online" or method.reset:
            raise ValueError(f"method {text!r}: the agent has no online normalization or resets")
        agents.check_method(text, method)
    exploration(settings)
    make_network(settings, 1)
    make_env(settings)
    return methods


def pqn_settings(settings: Settings) -> pqn.Settings:
    """Return the settings of PQN."""
    names = [field.name for field in dataclasses.fields(pqn.Settings)]
    return pqn.Settings(**{name: getattr(settings, name) for name in names})


def exploration(settings: Settings) -> Exploration:
    """Return the schedule of random actions."""
    return Exploration(settings.exploration_start, settings.exploration_end, steps=settings.exploration_steps)


def make_env(settings: Settings, key: chex.PRNGKey | int = 0) -> envs.ChangingGame:
    """Return the environment of a run. The key determines its orders."""
    return envs.ChangingGame(
        settings.game,
        change_every=settings.change_every // settings.num_envs,
        shuffle=settings.shuffle,
        shuffle_actions=settings.shuffle_actions,
        key=key,
        episode_length=settings.episode_length,
    )


def make_network(settings: Settings, action_size: int, method: learners.Method | None = None) -> nets.MLP:
    """Return the network of a run, with the attributes set by a method."""
    own = {} if method is None else method.network
    return nets.MLP(
        own.get("hidden", settings.hidden),
        action_size,
        own.get("activation", settings.activation),
        normalization=own.get("normalization", "layer" if settings.layer_norm else None),
    )


def job(settings: Settings) -> Job:
    """Prepare the training of agents with all methods and seeds; see `intervals.prepare`.

    All methods with the same seed start from the same weights, and have the same orders of channels and actions.
    """
    train = functools.partial(_train, settings)
    return intervals.prepare(NAME, settings, check(settings), MEASURES, train)


def _train(settings: Settings, group: list[learners.Method], *lanes: Any) -> Iterator[dict[str, Any]]:
    """Return an iterator over the measures [lanes] of each interval, for methods that differ only in numbers."""
    rules = pqn_settings(settings)
    network = make_network(settings, make_env(settings).action_size, group[0])

    def make_agent(key: chex.PRNGKey, optimizer: Any) -> intervals.Agent:
        return pqn.make(make_env(settings, key), network, optimizer, rules, exploration(settings))

    def measure(state: pqn.State, found: dict[str, chex.Array]) -> dict[str, chex.Array]:
        return {
            "episode_length": jnp.sum(found["length_sum"]) / jnp.maximum(jnp.sum(found["episodes"]), 1),
            "td_error": jnp.mean(found["td_error"]),
            "value": jnp.mean(found["value"]),
            "period": jnp.mean(state.env_state.info["period"].astype(jnp.float32)),
            **pqn.measure(network, state, dormant_threshold=settings.dormant_threshold),
        }

    attributes, updates = {"kernel_init": network.kernel_init}, settings.interval // rules.steps
    return intervals.train(settings, group, make_agent, attributes, updates, measure, *lanes)


continual_minatar = Experiment(
    name=NAME,
    about="Continual MinAtar: PQN (Gallici et al., ICLR 2025) plays a game whose channels and actions are shuffled.",
    Settings=Settings,
    presets={"smoke": lambda: SMOKE, "laptop": lambda: Settings(seeds=3)},
    check=check,
    total=intervals.total,
    job=job,
)
