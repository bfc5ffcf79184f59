"""Search spaces: values of a grid, and ranges to draw from."""

import dataclasses
import itertools
import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class LogUniform:
    """Log-uniformly distributed numbers, rounded to three digits.

    Attributes:
      low: smallest number, above 0.
      high: largest number.

    Example:
      >>> LogUniform(1e-3, 1e-1).draw(np.random.default_rng(0), 3)
      [0.0188, 0.00346, 0.00121]
    """

    low: float
    high: float

    def __post_init__(self):
        if not 0 < self.low < self.high < math.inf:
            raise ValueError(f"low and high must be finite and 0 < low < high, got {self.low} and {self.high}")

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"

    def draw(self, rng: np.random.Generator, count: int) -> list[float]:
        """Draw numbers of the range."""
        drawn = np.exp(rng.uniform(np.log(self.low), np.log(self.high), count))
        return [min(max(float(f"{value:.3g}"), self.low), self.high) for value in drawn]


# By setting, the values to try, or a range to draw from.
Space = Mapping[str, tuple[Any, ...] | LogUniform]


def told(space: Space) -> str:
    """Return a space in words.

    Example:
      >>> told({"step_size": LogUniform(1e-4, 1e-1), "order": (1, 2)})
      'step_size 0.0001 to 0.1, order 1 or 2'
    """
    values = lambda of: str(of) if isinstance(of, LogUniform) else " or ".join(map(str, of))
    return ", ".join(f"{name} {values(of)}" for name, of in space.items())


def check_space(space: Any, what: str) -> Space:
    """Return the space. Raises a ValueError that names its owner if it is not a space.

    Example:
      >>> check_space({"step_size": 0.1}, "my_module:my_factory")
      Traceback (most recent call last):
      ...
      ValueError: my_module:my_factory: space must have a LogUniform or a tuple of values for each setting, got \
{'step_size': 0.1}
    """
    allowed = LogUniform | tuple
    if not isinstance(space, Mapping) or not all(isinstance(values, allowed) for values in space.values()):
        raise ValueError(f"{what}: space must have a LogUniform or a tuple of values for each setting, got {space!r}")
    return space


def configurations(space: Space, count: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """Return the configurations of a search.

    If all settings have lists of values, these are all combinations, a grid. If one has a range, configurations are
    drawn: numbers from ranges, and values from lists with equal probability. The draws of a setting depend only on the
    seed, its name and its range, so that methods that share a setting try the same numbers.

    Args:
      space: by setting, its values or its range. An empty space has one configuration, without settings.
      count: number of configurations. For a grid it must be the grid's size; if configurations are drawn, it is
        required.
      seed: seed of the draws.

    Returns:
      settings by name, for each configuration.

    Raises:
      ValueError: a setting has no values or duplicate values, or the count is less than 1 or does not fit.

    Example:
      >>> configurations({"step_size": (0.1, 0.01), "l2": (0.0, 1e-3)}, count=4)[1]
      {'step_size': 0.1, 'l2': 0.001}
      >>> [len(configurations({"step_size": LogUniform(1e-4, 1e-1)}, count)) for count in (1, 5)]
      [1, 5]
    """
    if count is not None and count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    ranges = [name for name, values in space.items() if isinstance(values, LogUniform)]
    for name, values in space.items():
        if name not in ranges and (not values or len(set(values)) < len(values)):
            raise ValueError(f"space: {name} must have values that all differ, got {values}")
    if not ranges:
        grid = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
        if space and count not in (None, len(grid)):
            raise ValueError(f"count must be the {len(grid)} combinations of the values of {list(space)}, got {count}")
        return grid
    if count is None:
        raise ValueError(f"count must be given, as {', '.join(ranges)} are drawn from ranges")
    columns = {}
    for name, values in space.items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        drawn = (
            values.draw(rng, count) if name in ranges else [values[i] for i in rng.integers(len(values), size=count)]
        )
        columns[name] = drawn
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
