"""Selects exactly k smallest numbers of many, on the device and without sorting.

The k-th smallest number is found bit by bit, from the highest: each bit takes one counting pass. On a CPU that is 20
times as fast as sorting; on an accelerator it is not slower. `k` may be traced.
"""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np


@jax.jit  # so that outside of jit the loops are compiled once for each shape
def without_least(
    scores: Sequence[chex.Array], living: Sequence[chex.Array], count: chex.Array
) -> tuple[chex.Array, ...]:
    """Remove the entries of smallest score from masks.

    Args:
      scores: arrays of real numbers, of one dtype. NaN counts as infinite.
      living: bool arrays of the same shapes, the entries among which to choose.
      count: int32 [], how many to remove from all arrays together, at most as many as live. May be traced.

    Returns:
      bool arrays, `living` without exactly `count` entries: those of smallest score and, of equal scores, those that
      come first, array by array in C order.

    Example:
      >>> scores, living = jnp.array([3.0, 1.0, 1.0, 0.0, 1.0]), jnp.array([True, True, True, False, True])
      >>> (left,) = without_least([scores], [living], 2)
      >>> left.tolist()
      [True, False, False, False, True]
    """
    keys = [_ordered(score) for score in scores]
    largest = _kth_smallest(keys, living, count)
    below = [alive & (key < largest) for key, alive in zip(keys, living, strict=True)]
    equal = [alive & (key == largest) for key, alive in zip(keys, living, strict=True)]
    # Of equal scores, as many as are still needed, by position.
    places = _positions(scores)
    missing = jnp.asarray(count, jnp.int32) - _total(below)
    last = _kth_smallest(places, equal, missing, bits=max(1, sum(score.size for score in scores).bit_length()))
    out = [
        less | (tie & (place <= last) & (missing > 0)) for less, tie, place in zip(below, equal, places, strict=True)
    ]
    return tuple(alive & ~gone for alive, gone in zip(living, out, strict=True))


def _kth_smallest(
    keys: Sequence[chex.Array], among: Sequence[chex.Array], k: chex.Array, bits: int | None = None
) -> chex.Array:
    """Return the largest number with fewer than `k` keys below it: the k-th smallest key, and 0 for k = 0."""
    dtype = keys[0].dtype
    bits = dtype.itemsize * 8 if bits is None else bits

    def set_bit(place: chex.Array, found: chex.Array) -> chex.Array:
        trial = found | (jnp.ones([], dtype) << (bits - 1 - place).astype(dtype))
        fewer = _total([alive & (key < trial) for key, alive in zip(keys, among, strict=True)]) < k
        return jnp.where(fewer, trial, found)

    return jax.lax.fori_loop(0, bits, set_bit, jnp.zeros([], dtype))


def _total(masks: Sequence[chex.Array]) -> chex.Array:
    return sum(jnp.sum(mask, dtype=jnp.int32) for mask in masks)


def _ordered(score: chex.Array) -> chex.Array:
    """Return unsigned integers ordered like the scores, and equal for equal scores."""
    if score.dtype == bool or jnp.issubdtype(score.dtype, jnp.unsignedinteger):
        return score.astype(jnp.uint32) if score.dtype.itemsize < 4 else score
    if not jnp.issubdtype(score.dtype, jnp.floating):
        score = score.astype(jnp.int32) if score.dtype.itemsize < 4 else score
        bits = jax.lax.bitcast_convert_type(score, f"uint{8 * score.dtype.itemsize}")
        return bits ^ bits.dtype.type(1 << (8 * bits.dtype.itemsize - 1))
    score = score.astype(jnp.float32) if score.dtype.itemsize < 4 else score
    score = jnp.where(jnp.isnan(score), jnp.inf, score)
    score = jnp.where(score == 0, jnp.zeros_like(score), score)  # zeros of both signs are equal
    bits = jax.lax.bitcast_convert_type(score, f"uint{8 * score.dtype.itemsize}")
    sign = bits.dtype.type(1 << (8 * bits.dtype.itemsize - 1))
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _positions(arrays: Sequence[chex.Array]) -> list[chex.Array]:
    """Return each entry's index among the entries of all arrays, uint32."""
    starts = np.cumsum([0, *(array.size for array in arrays)])[:-1]
    return [
        (jnp.arange(array.size, dtype=jnp.uint32) + np.uint32(start)).reshape(array.shape)
        for array, start in zip(arrays, starts, strict=True)
    ]
