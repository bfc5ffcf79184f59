"""Pooling with a derivative that is fast on a CPU.

On a CPU, XLA pools fast, but computes the derivative of maxima, `select_and_scatter_add`, and of sums over large
windows element by element, which takes ten times as long. Here the image is cut into blocks of the stride's size. Each
window begins at a block and covers one block, or a few if windows overlap. So the derivative is that of a few masked
sums over blocks, which XLA computes about as fast as it reads the image.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from cbp_jax import jaxprs

# Windows that cover more blocks than this are left to XLA, since each block adds operations to compile.
_MOST_BLOCKS = 25


def is_followed(eqn: core.JaxprEqn) -> bool:
    """Return whether `pool` can evaluate an equation.

    It can if this is pooling of floats without dilation: maxima and minima, unless very many windows overlap, and sums
    over windows that do not overlap. For sums over overlapping windows, XLA's derivative is about as fast.
    """
    if eqn.primitive.name not in jaxprs.POOLING:
        return False
    (out,) = eqn.outvars
    dilations = {*eqn.params["base_dilation"], *eqn.params["window_dilation"]}
    if dilations != {1} or 0 in out.aval.shape or not jnp.issubdtype(out.aval.dtype, jnp.floating):
        return False
    return math.prod(_Windows.of(eqn).reach) <= (1 if eqn.primitive.name == "reduce_window_sum" else _MOST_BLOCKS)


def pool(eqn: core.JaxprEqn, image: chex.Array) -> chex.Array:
    """Evaluate an equation that `is_followed`.

    Values and gradients are bit for bit those of XLA. A maximum's gradient goes to the first maximal element of its
    window, in row-major order, and is lost if that is padding, in a window of -inf. There are two differences. In a
    window with NaN the gradient goes to the first NaN. And in forward mode, where XLA may choose another of several
    maxima, the derivative is the same as in reverse mode.

    Args:
      eqn: the equation.
      image: its operand.

    Returns:
      the equation's output.
    """
    windows = _Windows.of(eqn)

    @jax.custom_jvp
    def pooled(image):
        return jaxprs.bind(eqn, [image])[0]

    @pooled.defjvp
    def derivative(primals, tangents):
        out = pooled(*primals)
        blocks = windows.blocks(*tangents, 0.0)
        if eqn.primitive.name == "reduce_window_sum":
            return out, windows.sum(blocks)
        never = -jnp.inf if eqn.primitive.name == "reduce_window_max" else jnp.inf
        return out, windows.sum(blocks, windows.first(out, windows.blocks(*primals, never)))

    return pooled(image)


@dataclasses.dataclass(frozen=True)
class _Windows:
    """Windows on an image that is cut into blocks: [blocks, stride, blocks, stride, ...], two axes for each axis.

    The positions of a window are numbered in row-major order, as if it filled its blocks. Attributes have an entry for
    each axis of the image.
    """

    shape: Sequence[int]  # of the image
    sizes: Sequence[int]
    strides: Sequence[int]
    before: Sequence[int]  # padding
    counts: Sequence[int]  # of windows

    @classmethod
    def of(cls, eqn: core.JaxprEqn) -> "_Windows":
        before = [low for low, _ in eqn.params["padding"]]
        params = eqn.params["window_dimensions"], eqn.params["window_strides"]
        return cls(eqn.invars[0].aval.shape, *params, before, eqn.outvars[0].aval.shape)

    @property
    def reach(self) -> list[int]:
        """How many blocks a window covers."""
        return [-(-size // stride) for size, stride in zip(self.sizes, self.strides, strict=True)]

    @property
    def inner(self) -> tuple[int, ...]:
        """The axes within blocks."""
        return tuple(range(1, 2 * len(self.shape), 2))

    def numbers(self) -> tuple[np.ndarray, int]:
        """Return the numbers of a window's positions [reach, stride, reach, stride, ...], and a number that no position
        has.

        Positions of its blocks outside the window have that number.
        """
        spans = [reach * stride for reach, stride in zip(self.reach, self.strides, strict=True)]
        none = math.prod(spans)
        inside = np.indices(spans, sparse=True)
        inside = math.prod(place < size for place, size in zip(inside, self.sizes, strict=True))
        numbers = np.where(inside, np.arange(none).reshape(spans), none).astype(np.min_scalar_type(none))
        return numbers.reshape(_pairs(self.reach, self.strides)), none

    def blocks(self, image: chex.Array, padding: float) -> chex.Array:
        """Pad the image and cut it into the blocks that windows cover."""
        blocks = [count + reach - 1 for count, reach in zip(self.counts, self.reach, strict=True)]
        lengths = [number * stride for number, stride in zip(blocks, self.strides, strict=True)]
        after = [n - size - low for n, size, low in zip(lengths, self.shape, self.before, strict=True)]
        pads = [(low, high, 0) for low, high in zip(self.before, after, strict=True)]
        return jax.lax.pad(image, jnp.asarray(padding, image.dtype), pads).reshape(_pairs(blocks, self.strides))

    def offsets(self) -> Iterator[tuple[list[int], tuple[slice, ...]]]:
        """Return the blocks of a window, by their offset from its first block, with their index in `numbers`."""
        for offset in itertools.product(*map(range, self.reach)):
            yield list(offset), tuple(part for start in offset for part in (slice(start, start + 1), slice(None)))

    def first(self, out: chex.Array, blocks: chex.Array) -> chex.Array:
        """Return for each window the number of the first position whose entry is the window's value."""
        numbers, none = self.numbers()
        out, found = jax.lax.expand_dims(out, self.inner), []
        for offset, place in self.offsets():
            ends = [start + count for start, count in zip(offset, self.counts, strict=True)]
            entries = jax.lax.slice(blocks, _pairs(offset, [0] * len(ends)), _pairs(ends, self.strides))
            chosen = (entries == out) | jnp.isnan(entries)
            found.append(jnp.where(chosen, numbers[place], numbers.dtype.type(none)).min(self.inner))
        return jnp.stack(found).min(0)

    def sum(self, blocks: chex.Array, chosen: chex.Array | None = None) -> chex.Array:
        """Return the sum over each window, or its entry at the position with the chosen number.

        It is written so that its transpose is fast, in which pads become slices and slices become pads: the outputs'
        gradient is padded once, and the gradient of the blocks is a sum of slices of it, in XLA's order, window by
        window.
        """
        numbers, none = self.numbers()
        margins = [reach - 1 for reach in self.reach]
        if chosen is not None and any(margins):
            pads = [(margin, margin, 0) for margin in margins]
            # The barriers prevent XLA from padding again for each slice.
            chosen = jax.lax.optimization_barrier(jax.lax.pad(chosen, chosen.dtype.type(none), pads))
        parts = []
        for offset, place in self.offsets():
            starts = [margin - start for margin, start in zip(margins, offset, strict=True)]
            if chosen is None:
                counted = numbers[place] < none
            else:
                ends = [start + size for start, size in zip(starts, blocks.shape[::2], strict=True)]
                here = jax.lax.slice(chosen, starts, ends)
                counted = jax.lax.expand_dims(here, self.inner) == numbers[place]
            part = jnp.where(counted, blocks, 0).sum(self.inner)
            pads = [(before, after, 0) for before, after in zip(starts, offset, strict=True)]
            parts.append(jax.lax.pad(part, part.dtype.type(0), pads))
        total = sum(parts[1:], parts[0])
        if any(margins):
            ends = [margin + count for margin, count in zip(margins, self.counts, strict=True)]
            total = jax.lax.slice(jax.lax.optimization_barrier(total), margins, ends)
        return total


def _pairs(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """Interleave two sequences."""
    return [number for pair in zip(first, second, strict=True) for number in pair]
