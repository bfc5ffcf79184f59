"""Common parts of experiments with PPO agents, from settings to a web page that shows an episode."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cbp_jax import envs, nets, training
from cbp_jax.experiments import intervals, learners
from cbp_jax.experiments.lanes import Prepared
from cbp_jax.rl import ppo

#: Measures of each interval, for each method and seed.
MEASURES: dict[str, str] = {
    "episode_return": "mean return of the episodes that ended in the interval",
    "episode_length": "mean length of the same episodes, in steps",
    "forward_velocity": "mean velocity forward, in meters per second",
    "dormant_units": "fraction of the policy's hidden units of small activation, relative to their layer's, at the end",
    "stable_rank": "stable rank of the policy's last hidden layer over its number of units, at the end",
    "weight_magnitude": "mean absolute weight of the policy, at the end",
    "policy_loss": "mean of PPO's clipped surrogate loss",
    "value_loss": "mean squared error of the value",
    "entropy": "mean entropy of the policy, in nats",
    "approx_kl": "mean estimate of the divergence of the policy from that of the rollout, in nats",
    "clip_fraction": "fraction of ratios that were clipped",
    "explained_variance": "fraction of the variance of returns that values explain, mean over updates",
    "replaced_units": "units replaced during the interval",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of agents in all experiments."""

    methods: tuple[str, ...] = ("adam:step_size=1e-4",)
    """Learners to compare, optionally with settings: "adam:b1=0.99,b2=0.99"."""
    seeds: int = 30
    """Number of runs of each method, with different seeds."""
    first_seed: int = 0
    """The first seed; the others follow."""
    steps: int = 20_000_000
    """Total number of steps of all environments together, rounded up to whole intervals."""
    interval: int = 102_400
    """Number of steps between measurements; a multiple of a rollout's steps."""
    env: str = "ant"
    """Brax's name of the environment."""
    backend: str = "spring"
    """Brax's physics."""
    episode_length: int = 1000
    """Time limit of an episode, in steps."""
    time_limit_is_terminal: bool = True
    """Whether the time limit terminates episodes, as in the papers, or only truncates them."""
    clip_actions: bool = False
    """Whether actions are clipped to [-1, 1]."""
    num_envs: int = 32
    """Number of parallel environments in a rollout."""
    rollout_length: int = 64
    """Number of steps of each environment in a rollout."""
    epochs: int = 10
    """Number of epochs over a rollout."""
    minibatches: int = 16
    """Number of minibatches, and so of updates, in an epoch."""
    discount: float = 0.99
    """Discount for each step."""
    gae_lambda: float = 0.95
    """Decay of generalized advantage estimation."""
    clip: float = 0.2
    """Clipping range of PPO's probability ratios around 1."""
    hidden: tuple[int, ...] = (256, 256)
    """Sizes of the hidden layers of the policy and of the value function."""
    activation: str = "relu"
    """Activation of the hidden layers, unless a method sets its own."""
    initial_log_std: float = 0.0
    """Initial logarithm of the policy's standard deviation."""
    policy_scale: float = 1.0
    """Factor of the initial weights of the policy's output layer."""
    dormant_threshold: float = 0.01
    """Largest activation of a dormant unit, relative to the mean of its layer."""
    lanes: Literal["auto", "vmap", "map"] = "auto"
    """How seeds run on one device: in parallel (vmap) or in turn (map); auto chooses by device."""


def check(settings: Settings) -> list[learners.Method]:
    """Check settings that all experiments with agents share, like `stream.check`."""
    methods = learners.read_methods(settings.methods, activation=settings.activation)
    intervals.check(settings)
    intervals.check_rollouts(settings, ppo_settings(settings).steps)
    check_episodes(settings)
    if not math.isfinite(settings.initial_log_std):
        raise ValueError(f"initial_log_std must be finite, got {settings.initial_log_std}")
    make_network(settings, 1)
    for text, method in zip(learners.texts_of(settings.methods, methods), methods, strict=True):
        if method.normalization:
            raise ValueError(f"method {text!r}: the agent has no normalization")
        check_method(text, method)
    return methods


def check_method(text: str, method: learners.Method) -> None:
    """Raise a ValueError if a method needs something that no agent has. The message names the method by `text`."""
    if method.dropout_rate or method.curvature:
        raise ValueError(f"method {text!r}: the agent has no {'dropout_rate' if method.dropout_rate else 'curvature'}")
    if method.reference:
        raise ValueError(f"method {text!r}: the agent keeps no earlier examples for a reference batch")
    if method.inject_at is not None:
        raise ValueError(f"method {text!r}: heads are injected before tasks of a stream, and an agent has none")
    if method.reset_every:
        raise ValueError(
            f"method {text!r}: an agent is reset where friction changes; periodic resets are not supported"
        )


def check_episodes(settings: Settings, parts: int = 1) -> None:
    """Raise a ValueError unless an episode fits into an interval, or into each of `parts` parts of it."""
    needed = parts * settings.num_envs * settings.episode_length
    if settings.interval < needed:
        raise ValueError(
            f"interval must be at least {f'{parts} * ' * (parts > 1)}num_envs * episode_length = {needed}, so that an "
            f"episode ends in it; got {settings.interval}"
        )


class Parts(NamedTuple):
    """What distinguishes experiments with agents.

    Attributes:
      check: checks settings and returns the methods.
      make_env: maps settings and a key to the environment of a run.
      make_network: maps settings, the number of actions and the attributes set by a method to the network.
      measures: names and meanings of the measures.
    """

    check: Callable[[Any], list[learners.Method]]
    make_env: Callable[[Any, chex.PRNGKey | int], Any]
    make_network: Callable[[Any, int, Mapping[str, Any]], nn.Module]
    measures: Mapping[str, str]


def job(
    experiment: str, parts: Parts, settings: Settings, *, annealed: bool = False, lanes_at_once: int | None = None
) -> Prepared:
    """Prepare the training of agents with all methods and seeds.

    All methods with the same seed start from the same weights in the same environments. Results are written as
    intervals end, and the state every half minute: a killed run resumes from there, with the same results. When a
    method has finished, a web page is written that shows an episode of its first seed's agent.

    Args:
      experiment: its name.
      parts: what distinguishes it.
      settings: what to run.
      annealed: whether the step size decreases linearly, from the method's value in the first rollout to this value
        divided by the number of rollouts in the last.
      lanes_at_once: maximum number of agents on the devices at once, by default all.

    Returns:
      a function that runs it. In its results, tasks are intervals of steps; the coordinate `step` counts the
      environment's steps up to their ends.

    Raises:
      ValueError: a setting is out of range or unknown.
      ImportError: Brax is not installed.
    """
    methods = parts.check(settings)
    parts.make_env(settings, 0)  # so that its errors are raised before anything is written
    train = functools.partial(_train, parts, settings, annealed)
    return intervals.prepare(experiment, settings, methods, parts.measures, train, lanes_at_once)


class _Lane(NamedTuple):
    """The state of one agent."""

    agent: ppo.State
    key: chex.Array  # raw key data of the seed, constant
    hyperparameters: dict[str, chex.Array]  # constant
    rollouts: chex.Array | None = None  # int32 [], so far, if the step size depends on it


def _train(
    parts: Parts,
    settings: Settings,
    annealed: bool,
    group: list[learners.Method],
    seeds: np.ndarray,
    numbers: dict[str, np.ndarray],
    checkpoint: training.Checkpoint,
    lanes_at_once: int | None,
) -> Iterator[dict[str, Any]]:
    """Yield the measures [lanes] of each interval, for methods that differ only in numbers."""
    network = parts.make_network(settings, parts.make_env(settings, 0).action_size, group[0].network)
    rules = ppo_settings(settings)
    rollouts = settings.interval // rules.steps
    count = intervals.num_intervals(settings)

    def agent(key: chex.Array, hyperparameters: dict[str, chex.Array]):
        environments, start, optimizer = jax.random.split(jax.random.wrap_key_data(key), 3)
        env = parts.make_env(settings, environments)
        attributes = {"kernel_init": network.kernel_init}
        make = lambda units: learners.make_optimizer(group, units, attributes)(hyperparameters, optimizer)
        init, update = ppo.make(env, network, make, rules, reset=group[0].reset)
        return start, init, update

    def first(seed: chex.Array, hyperparameters: dict[str, chex.Array]) -> _Lane:
        key = jax.random.key_data(jax.random.key(seed))
        start, init, _ = agent(key, hyperparameters)
        return _Lane(init(start), key, hyperparameters, jnp.int32(0) if annealed else None)

    def go_on(_: Any, lane: _Lane) -> tuple[_Lane, dict[str, chex.Array]]:
        update = None if annealed else agent(lane.key, lane.hyperparameters)[-1]

        def one(lane, _):
            if not annealed:
                state, found = update(lane.agent)
                return lane._replace(agent=state), found
            scale, name = 1 - lane.rollouts / (count * rollouts), group[0].scheduled
            numbers = lane.hyperparameters | {name: scale * lane.hyperparameters[name]}
            state, found = agent(lane.key, numbers)[-1](lane.agent)
            return lane._replace(agent=state, rollouts=lane.rollouts + 1), found

        lane, found = jax.lax.scan(one, lane, length=rollouts)
        episodes = jnp.maximum(jnp.sum(found["episodes"]), 1)
        measures = {name: jnp.mean(found[name]) for name in parts.measures if name in found}
        measures |= {
            "episode_return": jnp.sum(found["return_sum"]) / episodes,
            "episode_length": jnp.sum(found["length_sum"]) / episodes,
            "forward_velocity": jnp.mean(found.get("x_velocity", jnp.nan)),  # not every environment measures it
            "replaced_units": jnp.sum(found["replaced_units"]),
        }
        measures |= ppo.measure(
            network,
            lane.agent,
            normalize_observations=rules.normalize_observations,
            dormant_threshold=settings.dormant_threshold,
        )
        return lane, measures

    def finish(lanes: _Lane) -> None:
        for method in group:  # the first seed of each method, if it is among these lanes
            if (method.label, settings.first_seed) not in checkpoint.lanes:
                continue
            row = checkpoint.lanes.index((method.label, settings.first_seed))
            state = jax.tree.map(lambda x, row=row: x[row], lanes.agent)
            save_episode(
                parts, settings, method, state, checkpoint.path.parent / f"episode-{_file_name(method.label)}.html"
            )

    how = {"mode": settings.lanes, "checkpoint": checkpoint, "finish": finish, "lanes_at_once": lanes_at_once}
    return training.run_lanes(first, go_on, None, seeds, numbers, count, **how)


def save_episode(parts: Parts, settings: Settings, method: learners.Method, state: ppo.State, path: Path) -> Path:
    """Write a web page that shows an episode of an agent, with its mean actions and the last friction of its training.

    Args:
      parts: what distinguishes the experiment.
      settings: the settings of the run.
      method: the method that trained the agent.
      state: state of the agent.
      path: the path of the page.

    Returns:
      the path.
    """
    env = parts.make_env(settings, 0)
    network = parts.make_network(settings, env.action_size, method.network)
    info = jax.tree.map(lambda x: x[0], state.env_state.info)  # of the first environment
    walker, view = (env.env, env.view) if isinstance(env, envs.Normalized) else (env, lambda obs, _: obs)
    statistics = state.statistics if ppo_settings(settings).normalize_observations else None
    policy = lambda obs: ppo.act(network, state.params, view(obs, info.get("seen")), statistics=statistics)
    poses, _ = envs.episode(walker, policy, jax.random.key(0), friction=info.get("friction"))
    return envs.save_html(walker, poses, path)


def _file_name(label: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", label).strip("_")


def make_network(settings: Settings, action_size: int, options: Mapping[str, Any] = {}) -> nets.ActorCritic:
    """Return the network of a run, with the attributes set by a method."""
    return nets.ActorCritic(
        action_size,
        options.get("hidden", settings.hidden),
        options.get("activation", settings.activation),
        initial_log_std=settings.initial_log_std,
        policy_scale=settings.policy_scale,
    )


def ppo_settings(settings: Settings) -> ppo.Settings:
    """Return the settings of PPO."""
    names = [field.name for field in dataclasses.fields(ppo.Settings) if hasattr(settings, field.name)]
    return ppo.Settings(**{name: getattr(settings, name) for name in names})
