"""Brax's environments with bodies on a ground, by name."""

import contextlib
import importlib
import io
import warnings
from types import ModuleType
from typing import Any

import chex
import jax.numpy as jnp

from cbp_jax.envs.episodes import Around, Episodes

#: Backends whose sliding friction follows Coulomb's law, with the solver settings that this needs.
BACKENDS = ("spring", "mjx")
_REFUSED = {
    "positional": "its gaits hardly respond to friction",
    "generalized": "with its few solver iterations the ground is nearly frictionless below a coefficient of 0.3",
}
# Brax's defaults, 1 and 4 iterations, do not resolve friction.
_MJX = {"opt.iterations": 10, "opt.ls_iterations": 20, "opt.disableflags": 0}


class Walker(Around):
    """Consecutive episodes of a Brax environment.

    Args:
      env: Brax's name of the environment, such as "ant", "halfcheetah", "hopper", "walker2d" or "humanoid".
      backend: Brax's physics: "spring", or "mjx" with 10 solver iterations and 20 line search iterations, which is
        closer to MuJoCo and several times slower.
      clip_actions: whether to clip actions to [-1, 1] before the environment gets them. The ant's motors clip actions
        in any case; the difference is the control cost, which otherwise grows with the unclipped action.
      **episodes: `episode_length`, `time_limit_is_terminal` and `random_reset` of :class:`Episodes`. States are those
        of `Episodes`.

    Raises:
      ValueError: an argument is out of range, or the backend or the environment is not supported.
      ImportError: Brax is not installed.

    Example:
      >>> env = Walker("hopper", episode_length=100)
      >>> env.observation_size, env.action_size
      (11, 3)
    """

    def __init__(self, env: str = "ant", *, backend: str = "spring", clip_actions: bool = False, **episodes: Any):
        if backend not in BACKENDS:
            reason = f": {_REFUSED[backend]}" if backend in _REFUSED else ""
            raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}{reason}")
        self.env = make_brax_env(env, backend)
        if not hasattr(self.env, "sys"):
            raise ValueError(f"env must be an environment with bodies on a ground, got {env!r}")
        if backend == "mjx":
            self.env.sys = self.env.sys.tree_replace(_MJX)
        self.clip_actions = clip_actions
        self._settings = episodes
        Episodes(self.env, **episodes)  # checks them

    def episodes(self) -> Episodes:
        """Return the environment without clipping."""
        return Episodes(self.env, **self._settings)

    def clipped(self, action: chex.Array) -> chex.Array:
        """Return the action that reaches the body."""
        return jnp.clip(action, -1, 1) if self.clip_actions else action

    def reset(self, key: chex.PRNGKey) -> Any:
        """Return the initial state. The key determines the pose of the body."""
        return self.episodes().reset(key)

    def step(self, state: Any, action: chex.Array) -> Any:
        """Return the state after an action [actions]."""
        return self.episodes().step(state, self.clipped(action))


def make_brax_env(name: str, backend: str) -> Any:
    """Return a Brax environment by name.

    Raises:
      ValueError: there is no such environment, or it does not support the backend.
      ImportError: Brax is not installed.
    """
    envs = brax("envs")
    if name not in envs._envs:
        raise ValueError(f"env must be one of {sorted(envs._envs)}, got {name!r}")
    with warnings.catch_warnings():
        # Brax warns at every loading of a model that development continues in MuJoCo's own environments.
        warnings.simplefilter("ignore")
        try:
            return envs.get_environment(name, backend=backend)
        except ValueError as error:
            raise ValueError(f"env must be one that Brax has with backend {backend!r}, got {name!r}") from error


def brax(module: str) -> ModuleType:
    """Import a module of Brax, or say how to install it."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # MuJoCo prints which of its optional parts are missing
            return importlib.import_module(f"brax.{module}")
    except ImportError as error:
        raise ImportError('environments need brax: pip install "cbp-jax[rl]"') from error
