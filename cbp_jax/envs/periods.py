"""Environments that change from period to period."""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from cbp_jax.envs.episodes import Around, strong
from cbp_jax.numerics.keys import as_key_data


class Periods(Around):
    """Base class of environments that change periodically, between two episodes.

    A period ends with the first episode that ends after `change_every` steps of the period. What changes is
    `info[self.changing]` of states, arrays that subclasses draw for each period; changes need no recompilation. States
    also have `info["period"]`, int32 [], counted from 0, and `info["period_steps"]`, int32 [].

    Args:
      env: an environment that starts episodes by itself, such as :class:`Episodes`.
      change_every: number of steps after which the environment changes.
      key: seed or key for the changes, may be traced.

    Raises:
      ValueError: `change_every` is less than 1.
    """

    changing: str

    def __init__(self, env: Any, change_every: int, key: chex.PRNGKey | int):
        if change_every < 1:
            raise ValueError(f"change_every must be at least 1, got {change_every}")
        self.env = env
        self.change_every = change_every
        self._key, self._impl = as_key_data(key)

    def drawn(self, period: chex.Numeric, key: chex.PRNGKey) -> Any:
        """Return the arrays that hold in a period, a pytree. `key` is the key of the period."""
        raise NotImplementedError

    def of_period(self, period: chex.Numeric) -> Any:
        """Return the arrays that hold in a period; its number counts from 0 and may be traced."""
        key = jax.random.wrap_key_data(self._key, impl=self._impl)
        return self.drawn(period, jax.random.fold_in(key, period))

    def reset(self, key: chex.PRNGKey) -> Any:
        """Return the initial state in the first period. The key determines where episodes start."""
        state = self.env.reset(key)
        info = {self.changing: self.of_period(0), "period": jnp.int32(0), "period_steps": jnp.int32(0)}
        return strong(state.replace(info=state.info | info))

    def step(self, state: Any, action: chex.Array) -> Any:
        """Return the state after an action."""
        old = state.info
        state = self.env.step(state, action)
        steps = old["period_steps"] + 1
        over = (steps >= self.change_every) & (state.done > 0)
        period = old["period"] + over
        info = {
            self.changing: jax.tree.map(
                lambda new, old: jnp.where(over, new, old), self.of_period(period), old[self.changing]
            ),
            "period": period,
            "period_steps": jnp.where(over, 0, steps),
        }
        return strong(state.replace(info=state.info | info))
