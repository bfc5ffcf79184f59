"""Slippery and stationary ant (Dohare et al., Nature 2024): PPO learns to walk on changing or constant ground.

The preset "paper" has one environment and rollouts of 2,048 steps, like the published program. Friction changes at the
end of the first episode after 2,000,000 steps. Frictions are log-uniform like the published ones, but other draws: the
program reads 50 frictions for each of its 100 seeds from a file. To use those of one seed, pass `--frictions`. Several
environments can share a rollout, as in the other presets. With `common_clock` their frictions change at the same step.

A method with `reset=network` or `reset=head` is reinitialized after each change: see `ppo.make`. It requires a common
clock or a single environment.
"""

import dataclasses
import functools

import chex

from cbp_jax import envs
from cbp_jax.experiments import agents, intervals, learners
from cbp_jax.experiments.checks import check_counts
from cbp_jax.experiments.experiment import Experiment

#: Measures of each interval, for each method and seed. Episodes cut by a change of friction are not counted.
MEASURES: dict[str, str] = agents.MEASURES | {"friction": "mean friction coefficient over environments and steps"}


@dataclasses.dataclass(frozen=True)
class Settings(agents.Settings):
    """PPO on an ant, or another of Brax's environments, whose friction changes."""

    friction: float | None = None
    """Constant friction coefficient; by default friction changes."""
    frictions: tuple[float, ...] = ()
    """Friction coefficients to use cyclically; drawn if not given."""
    change_every: int = 2_000_000
    """Number of steps of the environment after which friction changes, at the end of the next episode."""
    common_clock: bool = False
    """Whether friction changes in all environments at the same step, which ends episodes like the time limit."""
    friction_range: tuple[float, float] = (0.02, 2.0)
    """Range of drawn frictions, which are log-uniform."""
    normalize_observations: bool = False
    """Whether to normalize observations by their mean and variance in all earlier rollouts."""


def comparison(step_size: float, *, others: bool = False) -> tuple[str, ...]:
    """Return the paper's learners: standard PPO, PPO with tuned Adam (equal betas), L2, CBP; and others."""
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
        # Raw gradients, unlike Adam's updates, are far below 1.
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
# With a step size that learns in a tenth of the steps, and initial actions near 0, without which some seeds learn to
# fall.
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
# Plasticity is lost in an hour on one core here: two very different frictions alternate, networks are small, and the
# step size is larger. The last two learners differ only in continual backpropagation.
_TUNED = "step_size=1e-3,b1=0.99,b2=0.99"
ALTERNATING = dataclasses.replace(
    LAPTOP,
    methods=(
        "adam:step_size=1e-3",
        f"adam:{_TUNED}",
        f"adam:{_TUNED},l2=1e-4",
        f"cbp_adam:{_TUNED},l2=1e-4,replacement_rate=3e-4,maturity_threshold=1000",
    ),
    seeds=8,
    steps=921_600,
    interval=51_200,
    frictions=(0.05, 1.5),
    change_every=153_600,
    hidden=(64, 64),
)
STATIONARY = dataclasses.replace(LAPTOP, methods=("adam:step_size=3e-4",), seeds=5, steps=1_024_000, friction=1.0)


def _paper() -> Settings:
    return Settings(methods=comparison(1e-4, others=True), seeds=100, num_envs=1, rollout_length=2048)


def _stationary_paper() -> Settings:
    return dataclasses.replace(_paper(), seeds=30, steps=50_000_000, friction=1.0)


def check(settings: Settings) -> list[learners.Method]:
    """Check settings, as `stream.check` does."""
    methods = agents.check(settings)
    check_counts(settings, "change_every")
    episode = settings.num_envs * settings.episode_length
    if settings.common_clock and settings.friction is None:
        if settings.change_every < episode:
            raise ValueError(
                f"change_every must be at least num_envs * episode_length = {episode} with common_clock, so that an "
                f"episode ends before it is cut; got {settings.change_every}"
            )
        if settings.change_every % settings.interval:  # a cut splits an interval into two parts
            agents.check_episodes(settings, parts=2)
    for text, method in zip(learners.texts_of(settings.methods, methods), methods, strict=True):
        if method.reset and settings.friction is not None:
            raise ValueError(
                f"method {text!r}: there is no change to reset after where friction is {settings.friction}"
            )
        if method.reset and not (settings.common_clock or settings.num_envs == 1):
            raise ValueError(
                f"method {text!r}: the {settings.num_envs} environments' frictions must change together, so that it is "
                "clear when to reset; set common_clock"
            )
    return methods


def make_env(settings: Settings, key: chex.PRNGKey | int = 0) -> envs.Slippery:
    """Return the environment of a run. The key determines its frictions."""
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


PARTS = agents.Parts(check, make_env, agents.make_network, MEASURES)

slippery_ant = Experiment(
    name="slippery_ant",
    about="Slippery ant (Dohare et al., Nature 2024): PPO learns to walk while the friction of the ground changes.",
    Settings=Settings,
    presets={"smoke": lambda: SMOKE, "laptop": lambda: LAPTOP, "alternating": lambda: ALTERNATING, "paper": _paper},
    check=check,
    total=intervals.total,
    job=functools.partial(agents.job, "slippery_ant", PARTS),
)
stationary_ant = Experiment(
    name="stationary_ant",
    about="Stationary ant (Dohare et al., Nature 2024): PPO learns to walk, and collapses although nothing changes.",
    Settings=Settings,
    presets={
        "smoke": lambda: dataclasses.replace(SMOKE, friction=1.0),
        "laptop": lambda: STATIONARY,
        "paper": _stationary_paper,
    },
    check=check,
    total=intervals.total,
    job=functools.partial(agents.job, "stationary_ant", PARTS),
)
