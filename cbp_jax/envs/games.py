"""MinAtar's games, with channels and actions that are shuffled periodically.

They need `pip install "cbp-jax[games]"`.
"""

from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp

from cbp_jax.envs.cartpole import State
from cbp_jax.envs.episodes import Episodes
from cbp_jax.envs.periods import Periods

GAMES = {
    "asterix": "Asterix-MinAtar",
    "breakout": "Breakout-MinAtar",
    "freeway": "Freeway-MinAtar",
    "space_invaders": "SpaceInvaders-MinAtar",
}


class Game:
    """One episode of a game of MinAtar, as gymnax implements it in JAX.

    States have Brax's fields. Observations are the game's channels of 10 x 10 pixels, each 0 or 1, flattened to float32
    [10 * 10 * channels]. The time limit is left to :class:`Episodes`.

    Args:
      game: "asterix", "breakout", "freeway" or "space_invaders".

    Raises:
      ValueError: the game is unknown.
      ImportError: gymnax is not installed.

    Example:
      >>> env = Game("breakout")
      >>> env.observation_shape, env.action_size
      ((10, 10, 4), 3)

    References:
      Young & Tian, `MinAtar: an Atari-inspired testbed <https://arxiv.org/abs/1903.03176>`_, 2019

      Lange, `gymnax <https://github.com/RobertTLange/gymnax>`_, 2022
    """

    def __init__(self, game: str = "breakout"):
        if game not in GAMES:
            raise ValueError(f"game must be one of {list(GAMES)}, got {game!r}")
        try:
            import gymnax
        except ImportError as error:
            raise ImportError('games need gymnax: pip install "cbp-jax[games]"') from error
        self.env, self.params = gymnax.make(GAMES[game])
        self.observation_shape = tuple(self.env.observation_space(self.params).shape)
        self.action_size = self.env.num_actions

    @property
    def observation_size(self) -> int:
        """Number of observations."""
        height, width, channels = self.observation_shape
        return height * width * channels

    def reset(self, key: chex.PRNGKey) -> State:
        """Return the initial state, drawn with a key."""
        key, first_key = jax.random.split(key)
        obs, state = self.env.reset_env(first_key, self.params)
        zero = jnp.zeros([])
        return State((state, jax.random.key_data(key)), _flat(obs), zero, zero)

    def step(self, state: State, action: chex.Array) -> State:
        """Return the state after an action, int []."""
        before, key_data = state.pipeline_state
        key, step_key = jax.random.split(jax.random.wrap_key_data(key_data))
        obs, after, reward, ended, _ = self.env.step_env(step_key, before, action, self.params)
        # Games write Python's numbers into states, and types must stay those of the first state.
        after = jax.tree.map(lambda new, old: jnp.asarray(new, jnp.result_type(old)), after, before)
        return state.replace(
            pipeline_state=(after, jax.random.key_data(key)),
            obs=_flat(obs),
            reward=jnp.asarray(reward, jnp.float32),
            done=jnp.where(ended, 1.0, 0.0),
        )


def _flat(obs: chex.Array) -> chex.Array:
    return obs.astype(jnp.float32).reshape(-1)


class ChangingGame(Periods):
    """Consecutive episodes of a game of MinAtar, whose observations and actions are shuffled periodically.

    Period 0 has the game's own order. In period i > 0, channels (or pixels) and actions have random orders, drawn with
    `fold_in(key, i)`. A period ends with the first episode that ends after `change_every` steps of the period.
    Observations do not reveal the order, so the agent has to learn the game again.

    Args:
      game: "asterix", "breakout", "freeway" or "space_invaders".
      change_every: number of steps after which the order changes.
      shuffle: "channels", which keeps each channel an image; "pixels", which mixes all observations, at a quarter of
        the speed, because each step draws an order of all pixels; or "" for none.
      shuffle_actions: whether to shuffle actions, too.
      key: seed or key for the orders, may be traced.
      **episodes: `episode_length`, 1000 by default, and further arguments of :class:`Episodes`. States are those of
        `Episodes`, with additional `info["order"]`, `info["period"]` and `info["period_steps"]`.

    Raises:
      ValueError: an argument is out of range or unknown.
      ImportError: gymnax is not installed.

    Example:
      >>> env = ChangingGame("breakout", change_every=1000)
      >>> env.of_period(0)["actions"].tolist()
      [0, 1, 2]
    """

    changing = "order"

    def __init__(
        self,
        game: str = "breakout",
        *,
        change_every: int = 100_000,
        shuffle: Literal["channels", "pixels", ""] = "channels",
        shuffle_actions: bool = True,
        key: chex.PRNGKey | int = 0,
        **episodes: Any,
    ):
        if shuffle not in ("channels", "pixels", ""):
            raise ValueError(f"shuffle must be 'channels', 'pixels' or '', got {shuffle!r}")
        self.game = Game(game)
        super().__init__(Episodes(self.game, **{"episode_length": 1000, **episodes}), change_every, key)
        self.shuffle = shuffle
        self.shuffle_actions = shuffle_actions

    @property
    def observation_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an observation before it is flattened."""
        return self.game.observation_shape

    def drawn(self, period: chex.Numeric, key: chex.PRNGKey) -> dict[str, chex.Array]:
        """Return the order of a period: indices `observations` [observations] and `actions` [actions]."""
        pixels_key, actions_key = jax.random.split(key)
        size, channels = self.observation_size, self.observation_shape[-1]
        observations = jnp.arange(size)
        if self.shuffle == "channels":
            order = jax.random.permutation(pixels_key, channels)
            observations = observations.reshape(-1, channels)[:, order].reshape(-1)
        elif self.shuffle == "pixels":
            observations = jax.random.permutation(pixels_key, size)
        actions = jnp.arange(self.action_size)
        if self.shuffle_actions:
            actions = jax.random.permutation(actions_key, self.action_size)
        drawn = {"observations": observations, "actions": actions}
        original = {"observations": jnp.arange(size), "actions": jnp.arange(self.action_size)}
        return jax.tree.map(lambda new, old: jnp.where(period == 0, old, new), drawn, original)

    def step(self, state: State, action: chex.Array) -> State:
        """Return the state after an action, int []. (`reset` needs no shuffling, as the first period has the game's
        order.)"""
        old = state.info["order"]
        state = super().step(state, old["actions"][action])
        final_obs = state.info["final_obs"][old["observations"]]
        return state.replace(
            obs=state.obs[state.info["order"]["observations"]], info=state.info | {"final_obs": final_obs}
        )
