"""Overlap of the tickets of several tasks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cbp_jax.tickets.dominant import as_matrix, mask_of
from cbp_jax.units.groups import leaves_by_path


class Shared(NamedTuple):
    """Overlap of two tickets, in one matrix or several."""

    shared: int  # weights in both
    sizes: tuple[int, int]  # weights in each
    entries: int  # all weights
    by_size: float  # expected overlap by chance, given the sizes
    by_marginals: float  # expected overlap by chance, given the sizes of every row and every column

    @property
    def jaccard(self) -> float:
        """Jaccard index: shared weights over weights in either; 0 if there are none."""
        either = sum(self.sizes) - self.shared
        return self.shared / either if either else 0.0


def compare_tickets(a: Any, b: Any, *, by: Callable[[str], str] = lambda path: path) -> dict[str, Shared]:
    """Compute the overlap of two tickets, and the overlap expected by chance.

    Args:
      a: a ticket, or its mask.
      b: another ticket, or its mask.
      by: maps a leaf's path to the name under which it is counted, by itself or together with others, such as those of
        its layer.

    Returns:
      by name, the overlap. The expected overlap is computed for each matrix: m n / N for sizes m and n among N entries;
      with marginals, the sum over entries of the product of both tickets' probabilities. A ticket of m weights has an
      entry with the probability (number of its weights in that row) (number in that column) / m, at most 1. Overlap
      beyond the latter is not explained by shared rows or columns.

    Raises:
      ValueError: the masks belong to different params.

    Example:
      >>> import jax.numpy as jnp
      >>> masks = [{"w": jnp.array([[True, True, False], [False, False, False]])}, {"w": jnp.eye(2, 3, dtype=bool)}]
      >>> compare_tickets(*masks)["w"]
      Shared(shared=1, sizes=(2, 2), entries=6, by_size=0.6666666666666666, by_marginals=1.0)
    """
    masks = [leaves_by_path(mask_of(one)) for one in (a, b)]
    shapes = [{path: np.shape(mask) for path, mask in one.items()} for one in masks]
    if shapes[0] != shapes[1]:
        raise ValueError(f"a and b must be tickets of the same params, got the shapes {shapes[0]} and {shapes[1]}")
    found: dict[str, Shared] = {}
    for path in masks[0]:
        pair = [as_matrix(path, np.asarray(one[path], bool)) for one in masks]
        sizes = (int(np.count_nonzero(pair[0])), int(np.count_nonzero(pair[1])))
        chances = [
            np.minimum(np.outer(mask.sum(1), mask.sum(0)) / max(size, 1), 1.0)
            for mask, size in zip(pair, sizes, strict=True)
        ]
        own = Shared(
            int(np.count_nonzero(pair[0] & pair[1])),
            sizes,
            pair[0].size,
            sizes[0] * sizes[1] / pair[0].size,
            float(np.vdot(*chances)),
        )
        found[by(path)] = _added(found[by(path)], own) if by(path) in found else own
    return found


def _added(a: Shared, b: Shared) -> Shared:
    sizes = a.sizes[0] + b.sizes[0], a.sizes[1] + b.sizes[1]
    return Shared(
        a.shared + b.shared, sizes, a.entries + b.entries, a.by_size + b.by_size, a.by_marginals + b.by_marginals
    )
