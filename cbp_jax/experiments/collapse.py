"""Policy collapse (Elsayed & Mahmood, ICLR 2024, Figure 8): PPO on Brax's walkers.

One run is of one environment, as with the published program: `--env` is "ant", "halfcheetah", "hopper", "walker2d" or
"humanoid". The preset "paper" has that program's settings, and 30 seeds, as the figure:

- one environment with rollouts of 2,048 steps, 488 of them, which is what it does of 1,000,000 steps; actions clipped;
  observations and rewards normalized step by step and clipped to [-10, 10]; the time limit of 1,000 steps counts as an
  end, as the program tells no cut from an end;
- two tanh networks of 64 and 64 units that start orthogonal, with gain sqrt(2), 0.01 for the policy's output and 1 for
  the value's; biases and log-stds start at 0;
- 10 epochs of 32 minibatches, each with its own normalization of advantages; values clipped as ratios are; gradients of
  a norm of at most 0.5; a step size that falls linearly from 3e-4 to 0; Adam's eps of 1e-5. The program's "value
  coefficient" of 0.5 is of half the squared error, so that `value_coefficient` is 0.25;
- adaptive UPGD with weight decay 1e-3, sigma 1e-3 and a decay of utilities of 0.999, and a factor of 2 on its step that
  the paper's algorithm has not. Its start differs: the program divides utilities, corrected for the start of their
  mean, by a maximum that is not, so that its early gates are nearly binary.

Continual backpropagation is not in the figure; it stands beside Adam with the same step size. What differs from the
program besides is the physics: it runs MuJoCo by Gymnasium's v4 environments, of which Brax's are versions with physics
of their own; the humanoid shows no contact forces.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import chex
import jax

from cbp_jax import envs, nets
from cbp_jax.experiments import agents, learners, stream
from cbp_jax.experiments.experiment import Experiment

ENVIRONMENTS = ("ant", "halfcheetah", "hopper", "walker2d", "humanoid")
_GAIN = math.sqrt(2)
_ORTHOGONAL = jax.nn.initializers.orthogonal(_GAIN)  # one for all runs, by which replacements know it again

METHODS = (
    "adam:step_size=3e-4,eps=1e-5",
    "adaptive_upgd:step_size=3e-4,eps=1e-5,weight_decay=1e-3,sigma=1e-3,factor=2",
    "cbp_adam:step_size=3e-4,eps=1e-5,replacement_rate=1e-4,maturity_threshold=10000",
)


@dataclasses.dataclass(frozen=True)
class Settings(agents.Settings):
    """PPO as the program of Elsayed & Mahmood (ICLR 2024) has it."""

    methods: tuple[str, ...] = METHODS
    """Learners to compare, each a name, with settings if wanted: "adam:b1=0.99,b2=0.99"."""
    steps: int = 999_424
    """Steps of the environment in all, rounded up to whole intervals."""
    interval: int = 16_384
    """Steps of the environment in which a measurement is made; a multiple of those of a rollout."""
    clip_actions: bool = True
    """Whether actions are clipped to [-1, 1]."""
    num_envs: int = 1
    """Environments that a rollout goes through together."""
    rollout_length: int = 2048
    """Steps of each environment in a rollout."""
    minibatches: int = 32
    """Updates of an epoch."""
    clip_values: bool = True
    """Whether values are clipped as ratios are, around those of the rollout."""
    value_coefficient: float = 0.25
    """Coefficient of the value's squared error."""
    max_grad_norm: float | None = 0.5
    """What a gradient's norm is brought down to where it is larger."""
    advantages_in: str = "minibatch"
    """What advantages are normalized in: rollout or minibatch."""
    normalize: bool = True
    """Whether observations and rewards are normalized, at each step by all before."""
    anneal: bool = True
    """Whether the step size falls linearly, to 0 after the last rollout."""
    hidden: tuple[int, ...] = (64, 64)
    """Sizes of the hidden layers, of the policy and of the value."""
    activation: str = "tanh"
    """Activation of the hidden layers, where a method does not choose one."""
    policy_scale: float = 0.01
    """Gain of the first weights of the policy's output layer."""
    value_scale: float = 1.0
    """Gain of the first weights of the value's output layer."""


SMOKE = Settings(
    methods=(METHODS[0], "cbp_adam:step_size=3e-4,eps=1e-5,replacement_rate=1e-2,maturity_threshold=10"),
    seeds=1,
    steps=1024,
    interval=512,
    episode_length=50,
    num_envs=4,
    rollout_length=32,
    epochs=2,
    minibatches=4,
    hidden=(16, 16),
)
LAPTOP = Settings(seeds=3, steps=409_600, interval=20_480)


def check(settings: Settings) -> list[learners.Method]:
    """Checks settings, as `stream.check` does."""
    if settings.env not in ENVIRONMENTS:
        raise ValueError(f"env must be one of {ENVIRONMENTS}, got {settings.env!r}")
    methods = agents.check(settings)
    make_network(settings, 1)
    for text, method in zip(stream.texts(settings, methods), methods, strict=True):
        if method.reset:
            raise ValueError(f"method {text!r}: there is no change to reset after")
        if settings.anneal and not method.scheduled:
            raise ValueError(f"method {text!r}: it has no step size to anneal; set anneal to false")
    return methods


def make_env(settings: Settings, key: chex.PRNGKey | int = 0) -> envs.Walker | envs.Normalized:
    """The environment of a run, which draws nothing."""
    walker = envs.Walker(
        settings.env,
        backend=settings.backend,
        clip_actions=settings.clip_actions,
        episode_length=settings.episode_length,
        time_limit_is_terminal=settings.time_limit_is_terminal,
    )
    return envs.Normalized(walker, discount=settings.discount) if settings.normalize else walker


def make_network(settings: Settings, action_size: int, options: Mapping[str, Any] = {}) -> nets.ActorCritic:
    """The network of a run, of the attributes that a method chooses."""
    return agents.make_network(settings, action_size, options).clone(
        kernel_init=_ORTHOGONAL,
        policy_scale=settings.policy_scale / _GAIN,
        value_scale=settings.value_scale / _GAIN,
    )


PARTS = agents.Parts(check, make_env, make_network, agents.MEASURES)


def job(settings: Settings, *, lanes_at_once: int | None = None) -> stream.Job:
    """Prepares what trains agents; see `agents.job`."""
    return agents.job("policy_collapse", PARTS, settings, annealed=settings.anneal, lanes_at_once=lanes_at_once)


policy_collapse = Experiment(
    name="policy_collapse",
    about="Policy collapse (Elsayed & Mahmood, ICLR 2024): PPO on a walker of Brax, for long.",
    Settings=Settings,
    presets={"smoke": lambda: SMOKE, "laptop": lambda: LAPTOP, "paper": lambda: Settings(seeds=30)},
    check=check,
    total=agents.total,
    job=job,
)
