"""Slippery and stationary ant (Dohare et al., Nature 2024): PPO learns to walk, and the ground changes or does not.

The preset "paper" has one environment and rollouts of 2,048 steps, as the published program; its friction changes where
the first episode ends after 2,000,000 steps. Its frictions are log-uniform as the published ones are, but other draws:
the program reads the 50 of each of its 100 seeds from a file. Those of one seed can be given: `--frictions`. More
environments can share a rollout, as in the other presets; with `common_clock` their frictions change after one step.

A method with `reset=network` or `reset=head` is trained anew after each change: see `ppo.make`. It takes a common clock
or one environment.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from cbp_jax import envs, nets, training
from cbp_jax.experiments import learners, memory, stream
from cbp_jax.experiments.experiment import Experiment
from cbp_jax.rl import ppo

#: What is measured of each interval, for each method and seed.
MEASURES: dict[str, str] = {
    "episode_return": "mean return of the episodes that ended in the interval, but those cut where friction changed",
    "episode_length": "mean length of the same episodes, in steps",
    "forward_velocity": "mean velocity forward, in metres a second",
    "friction": "mean friction coefficient over environments and steps",
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
    """PPO on an ant, or another of Brax's environments, whose friction changes."""

    methods: tuple[str, ...] = ("adam:step_size=1e-4",)
    """Learners to compare, each a name, with settings if wanted: "adam:b1=0.99,b2=0.99"."""
    seeds: int = 30
    """Number of runs of each method, seeds 0, 1, ..."""
    steps: int = 20_000_000
    """Steps of the environment in all, rounded up to whole intervals."""
    interval: int = 102_400
    """Steps of the environment in which a measurement is made; a multiple of those of a rollout."""
    env: str = "ant"
    """Brax's name of the environment."""
    backend: str = "spring"
    """Brax's physics."""
    friction: float | None = None
    """Friction coefficient that stays as it is; changing if not given."""
    frictions: tuple[float, ...] = ()
    """Friction coefficients, one after the other and again from the first; drawn if not given."""
    change_every: int = 2_000_000
    """Steps of the environment after which friction changes, where the next episode ends."""
    common_clock: bool = False
    """Whether friction changes in all environments after the same step, which ends episodes."""
    friction_range: tuple[float, float] = (0.02, 2.0)
    """Frictions that are drawn are log-uniform between these."""
    episode_length: int = 1000
    """Time limit of an episode, in steps."""
    time_limit_is_terminal: bool = True
    """Whether nothing is to be gained after the time limit, or where friction changes by the common clock, as in the
    paper, or it only cuts the episode."""
    clip_actions: bool = False
    """Whether actions are clipped to [-1, 1]."""
    num_envs: int = 32
    """Environments that a rollout goes through together."""
    rollout_length: int = 64
    """Steps of each environment in a rollout."""
    epochs: int = 10
    """How often a rollout is learned from."""
    minibatches: int = 16
    """Updates of an epoch."""
    discount: float = 0.99
    """Discount of a step."""
    gae_lambda: float = 0.95
    """Decay of generalised advantage estimation."""
    clip: float = 0.2
    """How far PPO lets ratios of probabilities go from 1."""
    normalize_observations: bool = False
    """Whether observations are normalised by their running mean and variance."""
    hidden: tuple[int, ...] = (256, 256)
    """Sizes of the hidden layers, of the policy and of the value."""
    activation: str = "relu"
    """Activation of the hidden layers, where a method does not choose one."""
    initial_log_std: float = 0.0
    """Logarithm of the policy's standard deviation at first."""
    policy_scale: float = 1.0
    """Factor of the first weights of the policy's output layer."""
    dormant_threshold: float = 0.01
    """Largest activation, over the mean of its layer, of a unit that counts as dormant."""
    lanes: Literal["auto", "vmap", "map"] = "auto"
    """How seeds run on one device: together (vmap) or in turn (map); auto chooses by device."""


def comparison(step_size: float, *, others: bool = False) -> tuple[str, ...]:
    """The paper's learners: standard PPO, Adam tuned against forgetting its past gradients, L2, CBP; and others."""
    tuned = f"step_size={step_size},b1=0.99,b2=0.99"
    papers = (
        f"adam:step_size={step_size}",
        f"adam:{tuned}",
        f"adam:{tuned},l2=1e-3",
        f"cbp_adam:{tuned},l2=1e-4,replacement_rate=1e-4,maturity_threshold=10000",
    )
    besides = (
        f"redo_adam:{tuned},l2=1e-4,threshold=0.1,every=100",
        f"shrink_and_perturb_adam:{tuned},l2=1e-3,noise=1e-5",
        f"adaptive_upgd:step_size={step_size},sigma=1e-3",
        # Gradients as they are, unlike Adam's, are far below 1.
        f"upgd:step_size={30 * step_size},sigma=1e-3",
    )
    return papers + besides if others else papers


SMOKE = Settings(
    epochs=2,
    minibatches=4,
    episode_length=50,
    rollout_length=16,
    num_envs=8,
    methods=("adam:step_size=3e-4", "cbp_adam:step_size=3e-4,replacement_rate=1e-2,maturity_threshold=10"),
    seeds=1,
    hidden=(16, 16),
    steps=1024,
    interval=512,
    change_every=256,
)
# Of a step size that learns in a tenth of the steps, and of first actions around 0, without which some seeds learn to
# fall; see the measurements in the README.
LAPTOP = Settings(
    methods=comparison(3e-4),
    seeds=3,
    steps=1_638_400,
    interval=40_960,
    change_every=204_800,  # eight periods of five intervals
    common_clock=True,
    clip_actions=True,
    initial_log_std=-0.7,
    policy_scale=0.01,
)
STATIONARY = dataclasses.replace(LAPTOP, methods=("adam:step_size=3e-4",), seeds=5, steps=1_024_000, friction=1.0)


def _paper() -> Settings:
    return Settings(methods=comparison(1e-4, others=True), seeds=100, num_envs=1, rollout_length=2048)


def _stationary_paper() -> Settings:
    return dataclasses.replace(_paper(), seeds=30, steps=50_000_000, friction=1.0)


def total(settings: Settings) -> int:
    """How many intervals all lanes have to do, for a progress bar."""
    return len(settings.methods) * settings.seeds * num_intervals(settings)


def num_intervals(settings: Settings) -> int:
    """How many intervals a run has."""
    return math.ceil(settings.steps / settings.interval)


def check(settings: Settings) -> list[learners.Method]:
    """Checks settings, as `stream.check` does."""
    methods = stream.check_methods(settings.methods, settings.activation)
    stream.check_counts(settings, "seeds", "steps", "interval", "change_every", "episode_length")
    rollout = ppo_settings(settings).steps
    if settings.interval % rollout:
        raise ValueError(f"interval must be a multiple of a rollout's {rollout} steps, got {settings.interval}")
    _check_episodes(settings)
    if not settings.dormant_threshold >= 0:
        raise ValueError(f"dormant_threshold must not be negative, got {settings.dormant_threshold}")
    if settings.lanes not in ("auto", "vmap", "map"):
        raise ValueError(f"lanes must be 'auto', 'vmap' or 'map', got {settings.lanes!r}")
    if not math.isfinite(settings.initial_log_std):
        raise ValueError(f"initial_log_std must be finite, got {settings.initial_log_std}")
    make_network(settings, 1)
    for text, method in zip(settings.methods, methods, strict=True):
        unusable = [name for name in ("normalization", "dropout_rate") if getattr(method, name)]
        if unusable or method.curvature:
            raise ValueError(f"method {text!r}: the agent has no {', '.join(unusable) or 'curvature'}")
        if method.reset and settings.friction is not None:
            raise ValueError(
                f"method {text!r}: there is no change to reset after where friction is {settings.friction}"
            )
        if method.reset and not (settings.common_clock or settings.num_envs == 1):
            raise ValueError(
                f"method {text!r}: the {settings.num_envs} environments' frictions must change together, that it is "
                "clear when to reset; set common_clock"
            )
    return methods


def _check_episodes(settings: Settings) -> None:
    """Raises a ValueError unless an episode ends by itself in every interval."""
    episode = settings.num_envs * settings.episode_length
    clock = settings.common_clock and settings.friction is None
    if clock and settings.change_every < episode:
        raise ValueError(
            f"change_every must be at least num_envs * episode_length = {episode} with common_clock, so that an "
            f"episode ends before it is cut; got {settings.change_every}"
        )
    # A cut in an interval leaves a part of it before and a part after, of which one has to be as long as an episode.
    parts = 2 if clock and settings.change_every % settings.interval else 1
    if settings.interval < parts * episode:
        raise ValueError(
            f"interval must be at least {'2 * ' * (parts - 1)}num_envs * episode_length = {parts * episode}, so that "
            f"an episode ends in it; got {settings.interval}"
        )


def job(experiment: str, settings: Settings) -> stream.Job:
    """Prepares what trains agents with all methods and all seeds.

    All methods with the same seed start from the same weights and meet the same frictions. Results are written as
    intervals end, and the state every half minute: a run that is killed goes on from there as if nothing had been. When
    a method is done, a page is written that shows an episode of its first seed's agent.

    Args:
      experiment: its name.
      settings: what to run.

    Returns:
      what runs it. In its results, tasks are intervals of steps; the coordinate `step` counts the environment's steps
      up to their ends.

    Raises:
      ValueError: a setting is out of range or unknown.
      ImportError: Brax is not installed.
    """
    methods = check(settings)
    make_env(settings)  # an error of its should come before anything is written
    intervals = num_intervals(settings)
    memory.check_results(len(methods), settings.seeds, intervals, len(MEASURES))

    def run(out: Path, progress: stream.Progress | None = None) -> Any:
        results = stream.empty_results(experiment, settings, methods, intervals, MEASURES)
        results = results.assign_coords(step=("task", settings.interval * np.arange(1, intervals + 1)))
        make = lambda group: functools.partial(_train, settings, group, intervals, Path(out))
        return stream.prepare_methods(results, methods, make)(out, progress)

    return run


class _Lane(NamedTuple):
    """The state of one agent."""

    agent: ppo.State
    key: chex.Array  # raw key data of the seed, constant
    hyperparameters: dict[str, chex.Array]  # constant


def _train(
    settings: Settings,
    group: list[learners.Method],
    intervals: int,
    out: Path,
    seeds: np.ndarray,
    numbers: dict[str, np.ndarray],
    checkpoint: training.Checkpoint,
) -> Iterator[dict[str, Any]]:
    """Measures [lanes] of each interval, of methods that differ in their numbers alone."""
    given = group[0].network
    rules = ppo_settings(settings)
    updates = settings.interval // rules.steps

    def agent(key: chex.Array, hyperparameters: dict[str, chex.Array]):
        frictions, start, optimizer = jax.random.split(jax.random.wrap_key_data(key), 3)
        env = make_env(settings, frictions)
        network = make_network(settings, env.action_size, given)
        attributes = {"kernel_init": network.kernel_init}
        make = lambda units: learners.make_optimizer(group, units, attributes)(hyperparameters, optimizer)
        init, update = ppo.make(env, network, make, rules, reset=group[0].reset)
        return network, start, init, update

    def first(seed: chex.Array, hyperparameters: dict[str, chex.Array]) -> _Lane:
        key = jax.random.key_data(jax.random.key(seed))
        _, start, init, _ = agent(key, hyperparameters)
        return _Lane(init(start), key, hyperparameters)

    def go_on(_: Any, lane: _Lane) -> tuple[_Lane, dict[str, chex.Array]]:
        network, _, _, update = agent(lane.key, lane.hyperparameters)
        state, found = jax.lax.scan(lambda state, _: update(state), lane.agent, length=updates)
        episodes = jnp.maximum(jnp.sum(found["episodes"]), 1)
        measures = {name: jnp.mean(found[name]) for name in MEASURES if name in found}
        measures |= {
            "episode_return": jnp.sum(found["return_sum"]) / episodes,
            "episode_length": jnp.sum(found["length_sum"]) / episodes,
            "forward_velocity": jnp.mean(found.get("x_velocity", jnp.nan)),  # which not every environment measures
            "replaced_units": jnp.sum(found["replaced_units"]),
        }
        measures |= ppo.measure(
            network,
            state,
            normalize_observations=settings.normalize_observations,
            dormant_threshold=settings.dormant_threshold,
        )
        return lane._replace(agent=state), measures

    def finish(lanes: _Lane) -> None:
        for number, method in enumerate(group):  # the first seed of each
            state = jax.tree.map(lambda x, row=number * settings.seeds: x[row], lanes.agent)
            save_episode(settings, method, state, out / f"episode-{_file_name(method.label)}.html")

    return training.run_lanes(
        first, go_on, None, seeds, numbers, intervals, mode=settings.lanes, checkpoint=checkpoint, finish=finish
    )


def save_episode(settings: Settings, method: learners.Method, state: ppo.State, path: Path) -> Path:
    """Writes a page that shows an agent: an episode of its mean actions, at the friction that it trained on last.

    Args:
      settings: of the run.
      method: what trained the agent.
      state: the agent's.
      path: of the page.

    Returns:
      the path.
    """
    env = make_env(settings)
    network = make_network(settings, env.action_size, method.network)
    statistics = state.statistics if settings.normalize_observations else None
    policy = lambda obs: ppo.act(network, state.params, obs, statistics=statistics)
    poses, _ = envs.episode(env, policy, jax.random.key(0), friction=state.env_state.info["friction"][0])
    return envs.save_html(env, poses, path)


def _file_name(label: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", label).strip("_")


def make_env(settings: Settings, key: chex.PRNGKey | int = 0) -> envs.Slippery:
    """The environment of a run, of a key for its frictions."""
    return envs.Slippery(
        settings.env,
        friction=settings.friction,
        frictions=settings.frictions,
        common_clock=settings.common_clock,
        change_every=max(1, settings.change_every // settings.num_envs),  # of each environment
        friction_range=settings.friction_range,
        key=key,
        backend=settings.backend,
        clip_actions=settings.clip_actions,
        episode_length=settings.episode_length,
        time_limit_is_terminal=settings.time_limit_is_terminal,
    )


def make_network(settings: Settings, action_size: int, options: Mapping[str, Any] = {}) -> nets.ActorCritic:
    """The network of a run, of the attributes that a method chooses."""
    return nets.ActorCritic(
        action_size,
        settings.hidden,
        options.get("activation", settings.activation),
        initial_log_std=settings.initial_log_std,
        policy_scale=settings.policy_scale,
    )


def ppo_settings(settings: Settings) -> ppo.Settings:
    """Those of the settings that are PPO's."""
    names = [field.name for field in dataclasses.fields(ppo.Settings) if hasattr(settings, field.name)]
    return ppo.Settings(**{name: getattr(settings, name) for name in names})


slippery_ant = Experiment(
    name="slippery_ant",
    about="Slippery ant (Dohare et al., Nature 2024): PPO learns to walk while the friction of the ground changes.",
    Settings=Settings,
    presets={"smoke": lambda: SMOKE, "laptop": lambda: LAPTOP, "paper": _paper},
    check=check,
    total=total,
    job=functools.partial(job, "slippery_ant"),
)
stationary_ant = Experiment(
    name="stationary_ant",
    about="Stationary ant (Dohare et al., Nature 2024): PPO learns to walk, and collapses though nothing changes.",
    Settings=Settings,
    presets={
        "smoke": lambda: dataclasses.replace(SMOKE, friction=1.0),
        "laptop": lambda: STATIONARY,
        "paper": _stationary_paper,
    },
    check=check,
    total=total,
    job=functools.partial(job, "stationary_ant"),
)
