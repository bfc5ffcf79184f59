"""Checks of settings that many experiments share, and the seeds of a run."""

from collections.abc import Sequence
from typing import Any

MOST_STEPS = 2**31 - 1  # updates are counted in int32


def check_counts(settings: Any, *names: str) -> None:
    """Raise a ValueError if one of these settings is given and less than 1."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_first_seed(settings: Any) -> None:
    """Raise a ValueError unless all seeds are non-negative and fit into int32."""
    most = max(0, MOST_STEPS - settings.seeds)
    if not 0 <= settings.first_seed <= most:
        raise ValueError(f"first_seed must be from 0 to {most}, got {settings.first_seed}")


def seeds_of(settings: Any) -> range:
    """Return the seeds of a run."""
    return range(settings.first_seed, settings.first_seed + settings.seeds)


def check_hidden(sizes: Sequence[int]) -> None:
    """Raise a ValueError unless all hidden layers have units; a network without hidden layers is linear."""
    if any(size < 1 for size in sizes):
        raise ValueError(f"hidden must be sizes of at least 1, or none for a linear network, got {tuple(sizes)}")


def check_dataset(name: str) -> None:
    """Raise a ValueError if the name of a dataset is blank."""
    if not name.strip():
        raise ValueError(f"dataset must be a name or the path of an array file, got {name!r}")


def check_lanes_at_once(lanes: int | None) -> None:
    """Raise a ValueError if a number of lanes is given and less than 1."""
    if lanes is not None and lanes < 1:
        raise ValueError(f"lanes_at_once must be at least 1, got {lanes}")
