"""Brax's walkers on ground with changing friction (Dohare et al., Nature 2024)."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from cbp_jax.envs.episodes import Episodes, check_range, strong
from cbp_jax.envs.walker import Walker
from cbp_jax.numerics.keys import as_key_data
from cbp_jax.numerics.scalars import check_scalar


class Slippery(Walker):
    r"""A Brax environment whose friction changes at the end of episodes.

    Environments with the same key have the same frictions: that of period i, counted from 0, is log-uniform in
    `friction_range`, drawn with `fold_in(key, i)`. A period ends with the first episode that ends after `change_every`
    steps of the period, as in the paper, whose agents have one environment. With many environments, each waits for its
    own episode to end, so frictions differ for some time. With `common_clock` all change after the same step, which
    ends episodes. Friction is an array in the state, `info["friction"]`, so changes need no recompilation, and rows of
    a `vmap` may differ.

    Args:
      env: Brax's name of the environment, such as "ant", "halfcheetah", "hopper", "walker2d" or "humanoid".
      friction: a constant friction coefficient; by default friction changes.
      frictions: friction coefficients of the periods, used cyclically; by default they are drawn.
      common_clock: whether a period ends with its step `change_every`, and cuts the episode there. As at the time
        limit, the value of the last state replaces the remaining return, or 0 if `time_limit_is_terminal`. Advantages
        do not extend across the change.
      change_every: number of steps of one environment after which friction changes. If n environments share the steps
        of a run, divide the run's number by n.
      friction_range: smallest and largest friction.
      key: seed or key for the frictions, may be traced.
      **walker: `backend` and further arguments of :class:`Walker`. States are those of `Walker`, with additional
        `info["friction"]`, `info["period"]` and `info["period_steps"]`.

    Raises:
      ValueError: an argument is out of range, or the backend or the environment is not supported.
      ImportError: Brax is not installed.

    Example:
      >>> env = Slippery("ant", change_every=1000, key=0)
      >>> all(0.02 <= env.friction_of(period) <= 2 for period in range(5))
      True
      >>> env = Slippery("hopper", friction=0.5)
      >>> env.friction_of(3).item(), env.action_size
      (0.5, 3)
      >>> env = Slippery("ant", frictions=(0.02, 2.0))
      >>> [round(env.friction_of(period).item(), 2) for period in range(3)]
      [0.02, 2.0, 0.02]

    References:
      Dohare et al., `Loss of plasticity in deep continual learning
      <https://doi.org/10.1038/s41586-024-07711-7>`_, Nature 2024
    """

    def __init__(
        self,
        env: str = "ant",
        *,
        friction: chex.Numeric | None = None,
        frictions: Sequence[float] = (),
        common_clock: bool = False,
        change_every: int = 2_000_000,
        friction_range: tuple[float, float] = (0.02, 2.0),
        key: chex.PRNGKey | int = 0,
        **walker: Any,
    ):
        if friction is not None:
            check_scalar("friction", friction, at_least=0, below=math.inf)
            if len(frictions):
                raise ValueError(f"friction stays as it is if it is given, so frictions must be empty, got {frictions}")
        for each in frictions:
            check_scalar("frictions", each, at_least=0, below=math.inf)
        if change_every < 1:
            raise ValueError(f"change_every must be at least 1, got {change_every}")
        check_range("friction_range", friction_range)
        super().__init__(env, **walker)
        self.friction = friction
        self.frictions = tuple(frictions)
        self.common_clock = common_clock
        self.change_every = change_every
        self.friction_range = friction_range
        self._key, self._impl = as_key_data(key)

    def friction_of(self, period: chex.Numeric) -> chex.Array:
        """Return the friction coefficient of a period, counted from 0: float32 []."""
        if self.friction is not None:
            return jnp.asarray(self.friction, jnp.float32)
        if self.frictions:
            return jnp.asarray(self.frictions, jnp.float32)[jnp.asarray(period) % len(self.frictions)]
        key = jax.random.fold_in(jax.random.wrap_key_data(self._key, impl=self._impl), period)
        low, high = jnp.log(jnp.asarray(self.friction_range))
        return jnp.exp(jax.random.uniform(key, minval=low, maxval=high))

    def episodes(self, friction: chex.Numeric | None = None) -> Episodes:
        """Return the environment with a constant friction coefficient, by default that of its first period."""
        friction = self.friction_of(0) if friction is None else friction
        return Episodes(with_friction(self.env, friction), **self._settings)

    def reset(self, key: chex.PRNGKey) -> Any:
        """Return the initial state in the first period. The key determines the pose of the body."""
        friction = self.friction_of(0)
        state = self.episodes(friction).reset(key)
        counts = {"period": jnp.int32(0), "period_steps": jnp.int32(0)}
        return strong(state.replace(info=state.info | counts | {"friction": friction}))

    def step(self, state: Any, action: chex.Array) -> Any:
        """Return the state after an action [actions]."""
        episodes, action = self.episodes(state.info["friction"]), self.clipped(action)
        if self.friction is not None:
            return episodes.step(state, action)
        steps = state.info["period_steps"] + 1
        due = steps >= self.change_every
        state = episodes.step(state, action, cut=due & self.common_clock)
        over = due & (state.done > 0)
        period = state.info["period"] + over
        changed = {
            "period": period,
            "period_steps": jnp.where(over, 0, steps),
            "friction": jnp.where(over, self.friction_of(period), state.info["friction"]),
        }
        return strong(state.replace(info=state.info | changed))


class SlipperyAnt(Slippery):
    r"""Brax's ant on ground with changing friction; see :class:`Slippery` for the arguments.

    It differs from Gym's Ant-v3, which the paper used:

    ====================  ==============================================  =====================================
    \                     Ant-v3                                          here
    ====================  ==============================================  =====================================
    observations          111, 84 of them contact forces                  27: positions but x and y, velocities
    contact cost          5e-4 times the squared contact forces, each     none
                          clipped to [-1, 1]
    contacts              all parts with the ground                       four feet with the ground
    healthy reward, cost  1 a step; 0.5 times the squared actions         the same
    of control
    forward reward        velocity of the torso along x                   the same
    end of an episode     torso's height outside [0.2, 1] m, or not       height outside [0.2, 1] m
                          a finite number
    a step                0.05 s                                          0.05 s
    first pose            torso at 0.75 m, all joints at 0                torso at 0.55 m, ankles bent by 1 rad
    noise of the start    uniform in [-0.1, 0.1] on positions, normal     the same
                          of deviation 0.1 on velocities
    physics               MuJoCo                                          Brax's spring, or MuJoCo's MJX
    friction              of the ground and all parts                     the same
    actions               clipped to [-1, 1] by the motors, but not in    the same, or clipped in both
                          the cost of control
    ====================  ==============================================  =====================================

    Example:
      >>> env = SlipperyAnt(friction=1.0, backend="spring")
      >>> env.observation_size, env.action_size
      (27, 8)
    """

    def __init__(self, **settings: Any):
        super().__init__("ant", **settings)


def with_friction(env: Any, friction: chex.Numeric) -> Any:
    """Return a copy of a Brax environment in which every contact has this coefficient of sliding friction.

    It is set on all bodies, since a contact uses the larger of two coefficients. The coefficient may be traced, so
    changes need no recompilation.

    Args:
      env: an environment of Brax without wrappers.
      friction: coefficient, float [], >= 0, may be traced.

    Returns:
      the copy. The environment itself is not changed.

    Raises:
      ValueError: `friction` is negative or not finite, or the environment has no bodies on a ground.

    Example:
      >>> from cbp_jax.envs.walker import make_brax_env
      >>> env = make_brax_env("ant", "spring")
      >>> with_friction(env, 0.5).sys.geom_friction[:, 0].min().item(), env.sys.geom_friction[:, 0].min().item()
      (0.5, 1.0)
    """
    check_scalar("friction", friction, at_least=0, below=math.inf)
    if not hasattr(env, "sys"):
        raise ValueError(
            f"env must be one of Brax's with bodies on a ground, without a wrapper; got {type(env).__name__}"
        )
    env = copy.copy(env)
    env.sys = env.sys.tree_replace({"geom_friction": jnp.asarray(env.sys.geom_friction).at[:, 0].set(friction)})
    return env


def set_friction(state: Any, friction: chex.Numeric) -> Any:
    """Return the state of a :class:`Slippery` environment with another friction, which lasts until the period ends.

    If friction is constant, it lasts forever.

    Args:
      state: as returned by `reset` and `step`, for one environment or a batch.
      friction: coefficient, float [] or with the leading axes of the state.

    Returns:
      the state.

    Raises:
      ValueError: `friction` is negative or not finite, or has a wrong shape.

    Example:
      >>> env = SlipperyAnt(friction=1.0)
      >>> state = set_friction(env.reset(jax.random.key(0)), 0.02)
      >>> print(state.info["friction"])
      0.02
    """
    old = state.info["friction"]
    if not isinstance(friction, jax.core.Tracer) and not np.all((np.asarray(friction) >= 0) & np.isfinite(friction)):
        raise ValueError(f"friction must be in [0, inf), got {friction}")
    if jnp.ndim(friction) and jnp.shape(friction) != old.shape:
        raise ValueError(f"friction must be a number or of shape {old.shape}, got shape {jnp.shape(friction)}")
    return state.replace(info=state.info | {"friction": jnp.full_like(old, friction)})
