"""Policy collapse (Elsayed & Mahmood, ICLR 2024, Figure 8): PPO on Brax's walkers.

Like the published program, a run uses one environment: `--env` is "ant", "halfcheetah", "hopper", "walker2d" or
"humanoid". The preset "paper" has that program's settings, and 30 seeds:

- one environment with 488 rollouts of 2,048 steps, as many as fit into 1,000,000 steps; actions clipped; observations
  and rewards normalized online and clipped to [-10, 10]; the time limit of 1,000 steps terminates episodes, since the
  program does not distinguish truncation from termination;
- two tanh networks of 64 and 64 units with orthogonal initialization of gain sqrt(2), 0.01 for the policy's output and
  1 for the value's; biases and log-stds start at 0;
- 10 epochs of 32 minibatches, with advantages normalized in each minibatch; values clipped like ratios; gradients
  clipped to norm 0.5; a step size that decreases linearly from 3e-4 to 0; Adam's eps of 1e-5. The program's "value
  coefficient" of 0.5 multiplies half the squared error, so `value_coefficient` is 0.25;
- adaptive UPGD with weight decay 1e-3, sigma 1e-3, a decay rate of utilities of 0.999, and a factor of 2 on its step,
  which is not in the paper's algorithm. Early steps differ: the program divides bias-corrected utilities by an
  uncorrected maximum, so its early gates are nearly binary.

Continual backpropagation is not in the figure; here it is added, around Adam with the same step size. Another
difference is the physics: the program runs Gymnasium's v4 environments in MuJoCo, and Brax has its own versions of them
with its own physics. Its humanoid does not observe contact forces.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import chex
import jax

from cbp_jax import envs, nets
from cbp_jax.experiments import agents, intervals, learners
from cbp_jax.experiments.experiment import Experiment
from cbp_jax.experiments.lanes import Job

ENVIRONMENTS = ("ant", "halfcheetah", "hopper", "walker2d", "humanoid")
_GAIN = math.sqrt(2)
_ORTHOGONAL = jax.nn.initializers.orthogonal(_GAIN)  # one object for all runs, so that compiled programs can be shared

METHODS = (
    "adam:step_size=3e-4,eps=1e-5",
    "adaptive_upgd:step_size=3e-4,eps=1e-5,weight_decay=1e-3,sigma=1e-3,factor=2",
    "cbp_adam:step_size=3e-4,eps=1e-5,replacement_rate=1e-4,maturity_threshold=10000",
)


@dataclasses.dataclass(frozen=True)
class Settings(agents.Settings):
    """PPO with the settings of the program of Elsayed & Mahmood (ICLR 2024)."""

    methods: tuple[str, ...] = METHODS
    """Learners to compare, optionally with settings: "adam:b1=0.99,b2=0.99"."""
    steps: int = 999_424
    """Total number of steps of the environment, rounded up to whole intervals."""
    interval: int = 16_384
    """Number of steps of the environment between measurements; a multiple of a rollout's steps."""
    clip_actions: bool = True
    """Whether actions are clipped to [-1, 1]."""
    num_envs: int = 1
    """Number of parallel environments in a rollout."""
    rollout_length: int = 2048
    """Number of steps of each environment in a rollout."""
    minibatches: int = 32
    """Number of minibatches, and so of updates, in an epoch."""
    clip_values: bool = True
    """Whether to clip values around those of the rollout, like ratios."""
    value_coefficient: float = 0.25
    """Coefficient of the value's squared error."""
    max_grad_norm: float | None = 0.5
    """Maximum norm of gradients, by clipping."""
    advantages_in: str = "minibatch"
    """Where advantages are normalized: rollout or minibatch."""
    normalize: bool = True
    """Whether to normalize observations and rewards online."""
    anneal: bool = True
    """Whether the step size decreases linearly, to 0 after the last rollout."""
    hidden: tuple[int, ...] = (64, 64)
    """Sizes of the hidden layers of the policy and of the value function."""
    activation: str = "tanh"
    """Activation of the hidden layers, unless a method sets its own."""
    policy_scale: float = 0.01
    """Gain of the initial weights of the policy's output layer."""
    value_scale: float = 1.0
    """Gain of the initial weights of the value's output layer."""


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
    """Check settings, as `stream.check` does."""
    if settings.env not in ENVIRONMENTS:
        raise ValueError(f"env must be one of {ENVIRONMENTS}, got {settings.env!r}")
    methods = agents.check(settings)
    make_network(settings, 1)
    for text, method in zip(learners.texts_of(settings.methods, methods), methods, strict=True):
        if method.reset:
            raise ValueError(f"method {text!r}: there is no change to reset after")
        if settings.anneal and not method.scheduled:
            raise ValueError(f"method {text!r}: it has no step size to anneal; set anneal to false")
    return methods


def make_env(settings: Settings, key: chex.PRNGKey | int = 0) -> envs.Walker | envs.Normalized:
    """Return the environment of a run, which is not random."""
    walker = envs.Walker(
        settings.env,
        backend=settings.backend,
        clip_actions=settings.clip_actions,
        episode_length=settings.episode_length,
        time_limit_is_terminal=settings.time_limit_is_terminal,
    )
    return envs.Normalized(walker, discount=settings.discount) if settings.normalize else walker


def make_network(settings: Settings, action_size: int, options: Mapping[str, Any] = {}) -> nets.ActorCritic:
    """Return the network of a run, with the attributes set by a method."""
    return agents.make_network(settings, action_size, options).clone(
        kernel_init=_ORTHOGONAL,
        policy_scale=settings.policy_scale / _GAIN,
        value_scale=settings.value_scale / _GAIN,
    )


PARTS = agents.Parts(check, make_env, make_network, agents.MEASURES)


def job(settings: Settings, *, lanes_at_once: int | None = None) -> Job:
    """Prepare the training of agents; see `agents.job`."""
    return agents.job("policy_collapse", PARTS, settings, annealed=settings.anneal, lanes_at_once=lanes_at_once)


policy_collapse = Experiment(
    name="policy_collapse",
    about="Policy collapse (Elsayed & Mahmood, ICLR 2024): a long run of PPO on a Brax walker.",
    Settings=Settings,
    presets={"smoke": lambda: SMOKE, "laptop": lambda: LAPTOP, "paper": lambda: Settings(seeds=30)},
    check=check,
    total=intervals.total,
    job=job,
)
