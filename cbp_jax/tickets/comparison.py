"""How far tickets of several tasks are of the same weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cbp_jax.tickets.dominant import as_matrix, mask_of
from cbp_jax.units.groups import leaves_by_path


class Shared(NamedTuple):
    """What two tickets share, in a matrix or in several."""

    shared: int  # weights in both
    sizes: tuple[int, int]  # weights in each
    entries: int  # weights that there are
    by_size: float  # shared by chance, if each had so many weights anywhere in the matrix
    by_marginals: float  # shared by chance, if each had so many weights in every row and in every column

    @property
    def jaccard(self) -> float:
        """Shared weights over those in either; 0 if there are none."""
        either = sum(self.sizes) - self.shared
        return self.shared / either if either else 0.0


def compare_tickets(a: Any, b: Any, *, by: Callable[[str], str] = lambda path: path) -> dict[str, Shared]:
    """How far two tickets are of the same weights, and how far chance would have them so.

    Args:
      a: a ticket, or its mask.
      b: another.
      by: of a leaf's path, under which name it is counted: by itself, or with others, as those of its layer.

    Returns:
      by name, the overlap. What is expected by chance is counted matrix by matrix: of sizes m and n among N entries,
      m n / N; with the marginals, the sum over entries of the product of both tickets' chances to be there, which are
      (in its row) (in its column) / m, at most 1. More than the latter is shared in no row or column, but in entries.

    Raises:
      ValueError: the masks are of different params.

    Example:
      >>> import jax.numpy as jnp
      >>> masks = [{"w": jnp.array([[True, True, False], [False, False, False]])}, {"w": jnp.eye(2, 3, dtype=bool)}]
      >>> compare_tickets(*masks)["w"]
      Shared(shared=1, sizes=(2, 2), entries=6, by_size=0.6666666666666666, by_marginals=1.0)
    """
    masks = [leaves_by_path(mask_of(one)) for one in (a, b)]
    shapes = [{path: np.shape(mask) for path, mask in one.items()} for one in masks]
    if shapes[0] != shapes[1]:
        raise ValueError(f"b must be of the params that a is of, {shapes[0]}, got {shapes[1]}")
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
