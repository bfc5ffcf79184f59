"""Running means and variances."""

from typing import NamedTuple

import chex
import jax.numpy as jnp


class Statistics(NamedTuple):
    """Running statistics of arrays of one shape."""

    count: chex.Array  # float32 []
    mean: chex.Array  # float32 [...]
    squares: chex.Array  # float32 [...], sum of squared distances from the mean

    @property
    def variance(self) -> chex.Array:
        """The variance; 0 if nothing has been seen."""
        return self.squares / jnp.maximum(self.count, jnp.finfo(jnp.float32).tiny)

    @property
    def unbiased_variance(self) -> chex.Array:
        """The unbiased variance; 1 if fewer than two arrays have been seen."""
        return jnp.where(self.count < 2, 1, self.squares / jnp.maximum(self.count - 1, 1))


def unseen(shape: tuple[int, ...], prior: float = 0.0) -> Statistics:
    """Return statistics before anything is seen.

    Args:
      shape: of the arrays.
      prior: how many arrays of mean 0 and variance 1 to assume as already seen; may be a fraction.

    Example:
      >>> unseen((), prior=1e-4).variance.item()
      1.0
    """
    mean = jnp.zeros(shape)
    return Statistics(jnp.asarray(prior, mean.dtype), mean, jnp.full(shape, prior, mean.dtype))


def counted(statistics: Statistics, seen: chex.Array) -> Statistics:
    """Add arrays to the statistics, by Chan's parallel algorithm.

    Args:
      statistics: the statistics so far.
      seen: new arrays, [number, ...].

    Example:
      >>> found = counted(counted(unseen(()), jnp.array([1.0, 2.0])), jnp.array([6.0]))
      >>> found.count.item(), found.mean.item(), round(found.variance.item(), 4)
      (3.0, 3.0, 4.6667)
    """
    number = len(seen)
    count = statistics.count + number
    mean, apart = jnp.mean(seen, 0), jnp.mean(seen, 0) - statistics.mean
    squares = jnp.sum(jnp.square(seen - mean), 0) + jnp.square(apart) * statistics.count * number / count
    return Statistics(count, statistics.mean + apart * number / count, statistics.squares + squares)
