"""Streaming control: Stream Q(lambda) on a cart-pole whose physics change, with one update at each step.

The agent is that of Elsayed et al. (2024): sparse initial weights, layer normalization without parameters, leaky ReLUs,
and online normalization of observations and rewards. The problem is our own: gravity, the pole's length and the force
of a push change periodically, and left and right are swapped; observations do not reveal this. At a time limit, the
value of the last state replaces the remaining return.

Methods are those of `streaming_learners.LEARNERS`: overshooting-bounded gradient descent, SGD and Adam, all with
eligibility traces, and continual backpropagation around each of them.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, Literal

import chex
import jax.numpy as jnp

from cbp_jax import envs, nets
from cbp_jax.experiments import intervals, learners
from cbp_jax.experiments.checks import check_hidden
from cbp_jax.experiments.experiment import Experiment
from cbp_jax.experiments.lanes import Job
from cbp_jax.experiments.streaming_learners import LEARNERS
from cbp_jax.numerics.scalars import check_scalar
from cbp_jax.rl import streaming
from cbp_jax.rl.symptoms import symptoms_of

NAME = "streaming_control"

#: Measures of each interval, for each method and seed.
MEASURES: dict[str, str] = {
    "episode_return": "mean return of the episodes that ended in the interval",
    "dormant_units": "fraction of hidden units of small activation, relative to their layer's, at the end",
    "stable_rank": "stable rank of the last hidden layer over its number of units, at the end",
    "weight_magnitude": "mean absolute weight, at the end",
    "td_error": "mean squared TD error, of rewards as they are scaled",
    "replaced_units": "units replaced during the interval",
    "period": "number of changes of the physics so far, at the end",
}
_MEASURED_STEPS = 1000  # the last steps of an interval, on whose observations units are measured
_SPARSE: dict[float, Any] = {}  # one function object for all programs of a run


@dataclasses.dataclass(frozen=True)
class Settings:
    """Stream Q(lambda) on a changing cart-pole."""

    methods: tuple[str, ...] = ("obgd", "bp", "adam", "cbp_obgd", "cbp", "cbp_adam")
    """Learners to compare, optionally with settings: "obgd:kappa=3,trace_decay=0.9"."""
    seeds: int = 5
    """Number of runs of each method, with different seeds."""
    first_seed: int = 0
    """The first seed; the others follow."""
    steps: int = 400_000
    """Total number of steps, rounded up to whole intervals."""
    interval: int = 10_000
    """Number of steps between measurements."""
    episode_length: int = 500
    """Time limit of an episode, in steps."""
    change_every: int = 20_000
    """Number of steps after which the physics change, at the end of the next episode."""
    swap_actions: bool = True
    """Whether left and right are swapped in every second period."""
    gravity_range: tuple[float, float] = (5.0, 20.0)
    """Range of gravity in m/s^2, drawn log-uniformly."""
    length_range: tuple[float, float] = (0.25, 1.0)
    """Range of half the pole's length in meters, drawn log-uniformly."""
    force_range: tuple[float, float] = (5.0, 20.0)
    """Range of the force in newtons, drawn log-uniformly."""
    normalize: bool = True
    """Whether to normalize observations and rewards online."""
    discount: float = 0.99
    """Discount for each step."""
    exploration_start: float = 1.0
    """Initial fraction of random actions."""
    exploration_end: float = 0.02
    """Final fraction of random actions."""
    exploration_steps: int = 5_000
    """Number of steps in which the fraction decreases, only once: the agent is not informed of changes."""
    hidden: tuple[int, ...] = (32, 32)
    """Sizes of the hidden layers, unless a method sets its own."""
    activation: str = "leaky_relu"
    """Activation of the hidden layers, unless a method sets its own."""
    layer_norm: bool = True
    """Whether to normalize hidden layers, without parameters, unless a method sets its own normalization."""
    sparsity: float = 0.9
    """Fraction of each unit's initial weights that are 0."""
    dormant_threshold: float = 0.01
    """Largest activation of a dormant unit, relative to the mean of its layer."""
    lanes: Literal["auto", "vmap", "map"] = "auto"
    """How seeds run on one device: in parallel (vmap) or in turn (map); auto chooses by device."""


SMOKE = Settings(
    methods=("obgd", "cbp_obgd:replacement_rate=1e-2,maturity_threshold=100"),
    seeds=1,
    steps=4_000,
    interval=1_000,
    episode_length=200,
    change_every=2_000,
    exploration_steps=1_000,
    hidden=(16, 16),
)
LAPTOP = Settings(
    methods=(
        "obgd",
        "bp:step_size=1e-3",
        "adam:step_size=1e-4",
        "cbp_obgd:replacement_rate=1e-4,maturity_threshold=1000",
        "cbp:step_size=1e-3,replacement_rate=1e-4,maturity_threshold=1000",
        "cbp_adam:step_size=1e-4,replacement_rate=1e-4,maturity_threshold=1000",
    )
)


def check(settings: Settings) -> list[learners.Method]:
    """Check settings, as `stream.check` does."""
    intervals.check(settings, "exploration_steps")
    check_hidden(settings.hidden)
    if settings.interval < settings.episode_length:
        raise ValueError(
            f"interval must be at least episode_length = {settings.episode_length}, so that an episode ends in it; got "
            f"{settings.interval}"
        )
    methods = learners.read_methods(settings.methods, activation=settings.activation, known=LEARNERS)
    for method in methods:
        if type(method) not in LEARNERS.values():
            raise ValueError(f"method {method.text!r} must be of {list(LEARNERS)}")
        if method.normalization == "online" or method.dropout_rate or method.curvature or method.reset:
            raise ValueError(
                f"method {method.text!r}: the agent has no online normalization, dropout, curvature or resets"
            )
    check_scalar("discount", settings.discount, at_least=0, at_most=1)
    exploration(settings)
    make_env(settings)
    make_network(settings)
    return methods


def exploration(settings: Settings) -> streaming.Exploration:
    """Return the schedule of random actions."""
    return streaming.Exploration(settings.exploration_start, settings.exploration_end, steps=settings.exploration_steps)


def make_env(settings: Settings, key: chex.PRNGKey | int = 0) -> envs.ChangingCartPole | envs.Normalized:
    """Return the environment of a run. The key determines its physics."""
    ranges = {name: getattr(settings, name) for name in ("gravity_range", "length_range", "force_range")}
    env = envs.ChangingCartPole(
        change_every=settings.change_every,
        swap_actions=settings.swap_actions,
        key=key,
        episode_length=settings.episode_length,
        **ranges,
    )
    if not settings.normalize:
        return env
    return envs.Normalized(env, discount=settings.discount, bound=math.inf, unbiased=True)


def make_network(settings: Settings, method: learners.Method | None = None) -> nets.MLP:
    """Return the network of a run, with the attributes set by a method."""
    own = {} if method is None else method.network
    return nets.MLP(
        own.get("hidden", settings.hidden),
        envs.CartPole.action_size,
        own.get("activation", settings.activation),
        kernel_init=_SPARSE.setdefault(settings.sparsity, nets.sparse(settings.sparsity)),
        normalization=own.get("normalization", "bare_layer" if settings.layer_norm else None),
    )


def job(settings: Settings) -> Job:
    """Prepare the training of agents with all methods and seeds; see `intervals.prepare`.

    All methods with the same seed start from the same weights, and have the same physics.
    """
    train = functools.partial(_train, settings)
    return intervals.prepare(NAME, settings, check(settings), MEASURES, train)


def _train(settings: Settings, group: list[learners.Method], *lanes: Any) -> Iterator[dict[str, Any]]:
    """Return an iterator over the measures [lanes] of each interval, for methods that differ only in numbers."""
    network = make_network(settings, group[0])

    def make_agent(key: chex.PRNGKey, optimizer: Any) -> intervals.Agent:
        env = make_env(settings, key)
        return streaming.make_q(env, network, optimizer, exploration(settings), discount=settings.discount)

    def measure(state: streaming.State, found: dict[str, chex.Array]) -> dict[str, chex.Array]:
        obs, threshold = found["obs"][-_MEASURED_STEPS:], settings.dormant_threshold
        return {
            "td_error": jnp.mean(jnp.square(found["td_error"])),
            "period": state.env_state.info["period"],
            **symptoms_of(network.apply, state.params, obs, dormant_threshold=threshold),
        }

    attributes = {"kernel_init": network.kernel_init, "discount": settings.discount}
    return intervals.train(settings, group, make_agent, attributes, settings.interval, measure, *lanes)


streaming_control = Experiment(
    name=NAME,
    about="Streaming control (after Elsayed et al. 2024): Stream Q(lambda) on a cart-pole whose physics change.",
    Settings=Settings,
    presets={"smoke": lambda: SMOKE, "laptop": lambda: LAPTOP},
    check=check,
    total=intervals.total,
    job=job,
)
