"""Renders an episode as a web page."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np

from cbp_jax.envs.walker import Walker, brax


def episode(
    env: Walker,
    policy: Callable[[chex.Array], chex.Array],
    key: chex.PRNGKey,
    *,
    friction: chex.Numeric | None = None,
) -> tuple[Any, float]:
    """Run one episode.

    Args:
      env: a single environment.
      policy: maps an observation [observations] to an action [actions].
      key: key for the initial state.
      friction: friction coefficient, if the environment is :class:`Slippery`; by default that of its first period.

    Returns:
      poses of the bodies, Brax's pipeline states with leading axis [steps], on the host; and the episode's return.

    Raises:
      ValueError: `friction` is negative or not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> env = Walker("ant")
      >>> still = lambda obs: jnp.zeros(env.action_size)
      >>> poses, total = episode(env, still, jax.random.key(0))  # doctest: +SKIP
      >>> path = save_html(env, poses, "ant.html")  # doctest: +SKIP
    """
    episodes = env.episodes() if friction is None else env.episodes(friction)

    @jax.jit
    def go_through(key):
        def step(state, _):
            after = episodes.step(state, env.clipped(policy(state.obs)))
            return after, (state.pipeline_state, after.done, after.info["episode_return"])

        return jax.lax.scan(step, episodes.reset(key), length=episodes.episode_length)[1]

    poses, dones, returns = jax.device_get(go_through(key))
    steps = int(np.argmax(dones > 0)) + 1
    return jax.tree.map(lambda x: x[:steps], poses), float(returns[steps - 1])


def save_html(env: Walker, poses: Any, path: str | Path) -> Path:
    """Write a page that shows an episode in a browser, with Brax's viewer, which the page loads from the internet.

    Args:
      env: the environment.
      poses: as `episode` returns them.
      path: of the page.

    Returns:
      the path. See :func:`episode` for an example.
    """
    steps = len(jax.tree.leaves(poses)[0])
    frames = [jax.tree.map(lambda x, i=i: x[i], poses) for i in range(steps)]
    system = env.env.sys.tree_replace({"opt.timestep": env.env.dt})
    path = Path(path)
    path.write_text(brax("io.html").render(system, frames, height="100vh", colab=False))
    return path
