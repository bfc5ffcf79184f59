"""Changes of an encoder by a task: rank, sparsity, location, and overlap between two tasks."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from cbp_jax.lora import Adapter
from cbp_jax.lora.adapter import changes, sizes_of
from cbp_jax.tickets import compare_tickets, dominant_ticket

# Entries smaller than this fraction of their kernel's largest entry count as zero.
_SMALL = 0.01


class Change(NamedTuple):
    """The change of some kernels, as matrices [in, out], by one task.

    If it is not finite, as where a lane diverged, its numbers are NaN, and it has neither directions nor a ticket.
    """

    rank: float  # the effective rank (Roy & Vetterli 2007), mean over kernels
    sparsity: float  # the fraction of entries below a hundredth of the largest of their kernel
    reads: dict[str, np.ndarray]  # by kernel, orthonormal columns [in, rank]: the input directions that it reads
    ticket: dict[str, np.ndarray]  # by kernel, bool [in, out], the largest entries of all kernels together


_NOT_FINITE = Change(float("nan"), float("nan"), {}, {})


def change_of_adapter(after: Adapter, before: Adapter | None, density: float) -> Change:
    """Return the change made by an adapter, or from one of its states to another.

    Args:
      after: the adapter, arrays on the host.
      before: an earlier state to compare with, if any.
      density: the fraction of entries in the ticket.

    Returns:
      the change. It is a low-rank product, whose singular values are computed by QR decompositions of its factors.
    """
    states = [(1.0, after)] + ([(-1.0, before)] if before is not None else [])
    whole = [changes(one) for _, one in states]
    dense, reads, singular = {}, {}, {}
    for path in after.factors:
        shape = matrix_shape(after, path)
        matrices = [np.asarray(one[path], np.float32).reshape(shape) for one in whole]
        dense[path] = matrices[0] - matrices[1] if before is not None else matrices[0]
        if not np.isfinite(dense[path]).all():
            return _NOT_FINITE
        a = np.concatenate([sign * _factor(one, path, "lora_A", (shape[0], -1)) for sign, one in states], 1)
        b = np.concatenate([one.scaling * _factor(one, path, "lora_B", (-1, shape[1])) for _, one in states])
        (q, left), (_, right) = np.linalg.qr(a), np.linalg.qr(b.T)
        basis, singular[path], _ = np.linalg.svd(left @ right.T)
        reads[path] = (q @ basis)[:, : after.rank]
    return _change(dense, reads, singular, density)


def change_of_kernels(
    after: Mapping[str, Any],
    before: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, int]],
    rank: int,
    density: float,
) -> Change:
    """Return the change between two states of kernels.

    Args:
      after, before: kernels by path.
      shapes: shapes of the kernels to compare, as matrices [in, out].
      rank: number of leading input directions to keep for comparisons.
      density: the fraction of entries in the ticket.
    """
    dense, reads, singular = {}, {}, {}
    for path, shape in shapes.items():
        dense[path] = (np.asarray(after[path], np.float32) - np.asarray(before[path], np.float32)).reshape(shape)
        if not np.isfinite(dense[path]).all():
            return _NOT_FINITE
        basis, singular[path], _ = np.linalg.svd(dense[path], full_matrices=False)
        reads[path] = basis[:, :rank]
    return _change(dense, reads, singular, density)


def matrix_shape(adapter: Adapter, path: str) -> tuple[int, int]:
    """Return the shape of a kernel as a matrix [in, out]."""
    _, inside, outside = sizes_of(adapter, path)
    return int(np.prod(inside)), int(np.prod(outside))


def overlap_of_subspaces(change: Change, other: Change) -> float:
    """Return the mean squared cosine between the input directions of two changes, averaged over kernels: in [0, 1]; NaN
    if one is not finite."""
    if not (change.reads and other.reads):
        return float("nan")
    found = []
    for path, basis in change.reads.items():
        there = other.reads[path]
        found.append(np.square(basis.T @ there).sum() / min(basis.shape[1], there.shape[1]))
    return float(np.mean(found))


def collisions(change: Change, other: Change) -> float:
    """Return the number of weights that two tasks change, divided by the number expected by chance for tickets of their
    sizes; NaN if a change is not finite."""
    if not (change.ticket and other.ticket):
        return float("nan")
    (both,) = compare_tickets(change.ticket, other.ticket, by=lambda path: "").values()
    return both.shared / both.by_size if both.by_size else float("nan")


def _factor(adapter: Adapter, path: str, name: str, shape: tuple[int, int]) -> np.ndarray:
    return np.asarray(adapter.factors[path][name], np.float32).reshape(shape)


def _change(
    dense: dict[str, np.ndarray], reads: dict[str, np.ndarray], singular: dict[str, np.ndarray], density: float
) -> Change:
    zeros = {path: np.zeros_like(matrix) for path, matrix in dense.items()}
    ticket = dominant_ticket(zeros, dense, keep=density).mask
    small = sum(np.count_nonzero(np.abs(m) <= _SMALL * np.abs(m).max()) for m in dense.values())
    return Change(
        float(np.mean([_effective_rank(values) for values in singular.values()])),
        small / sum(matrix.size for matrix in dense.values()),
        reads,
        {path: np.asarray(mask) for path, mask in ticket.items()},
    )


def _effective_rank(values: np.ndarray) -> float:
    total = values.sum(dtype=np.float64)
    if not total > 0:
        return 0.0
    p = values[values > 0] / total
    return float(np.exp(-(p * np.log(p)).sum()))
