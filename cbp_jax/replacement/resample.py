"""Fresh weights for a few units at a time, with the distribution that the initializer gives to the whole kernel."""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np

from cbp_jax.numerics.compilation import RUNS_ONCE

Initializer = Callable[[chex.PRNGKey, tuple[int, ...], jnp.dtype], chex.Array]


@functools.cache
def he_uniform(ndim: int, axes: tuple[int, ...]) -> Initializer:
    """Return He et al.'s uniform initializer for a kernel whose units lie along `axes`; all other axes are inputs."""
    others = tuple(axis for axis in range(ndim) if axis not in axes)
    return jax.nn.initializers.he_uniform(in_axis=others, out_axis=axes)


def sample_units(
    initializer: Initializer,
    key: chex.PRNGKey,
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    axes: tuple[int, ...],
    positions: int,
    count: int,
) -> chex.Array:
    """Draw the rows along `axes` of a kernel of the given shape that belong to `count` units.

    Generating random bits is expensive, so only the requested rows are drawn. An initializer that scales by the fan-in
    would use the fan-in of the few rows; the scale of the full kernel is restored. The i-th unit's weights do not
    depend on how many units are drawn.

    Args:
      initializer: a `jax.nn.initializers` function of (key, shape, dtype).
      key: a typed key.
      shape: the full kernel's.
      dtype: the kernel's.
      axes: axes of the kernel that enumerate rows, flattened in this order.
      positions: rows of a unit.
      count: how many units.

    Returns:
      array [other axes of the kernel in order..., positions * count], position by position.
    """
    others = [axis for axis in range(len(shape)) if axis not in axes]

    def rows_last(fresh):
        return fresh.transpose(*others, *axes).reshape(*(shape[axis] for axis in others), -1)

    drawn = tuple(positions if axis == axes[-1] else 1 if axis in axes else size for axis, size in enumerate(shape))
    scale = _row_scale(initializer, shape, drawn)
    if scale is None:  # its entries depend on the full shape in other ways, as for orthogonal matrices
        fresh = rows_last(initializer(key, shape, dtype))[..., : count * positions]
        fresh = jnp.swapaxes(fresh.reshape(*fresh.shape[:-1], count, positions), -1, -2)
    else:

        def draw(number):
            return rows_last(initializer(jax.random.fold_in(key, number), drawn, dtype))

        fresh = jnp.moveaxis(jax.vmap(draw)(jnp.arange(count)), 0, -1)
        fresh = fresh if scale == 1 else (fresh * scale).astype(dtype)
    return fresh.reshape(*fresh.shape[:-2], -1)


@functools.lru_cache(maxsize=256)
def _row_scale(initializer: Initializer, shape: tuple[int, ...], drawn: tuple[int, ...]) -> float | None:
    """Return the factor by which entries drawn in the shape `drawn` are scaled to have the full kernel's distribution.

    JAX's generator gives entry i of a draw bits that depend on the key and i alone. For every initializer that treats
    entries alike, the same key therefore gives the same entries in both shapes, up to the scale. Returns None for other
    initializers.
    """
    size = int(np.prod(drawn))

    @functools.partial(jax.jit, compiler_options=RUNS_ONCE)
    def both(key):
        return [initializer(key, of, jnp.float32).ravel()[:size] for of in (drawn, shape)]

    with jax.ensure_compile_time_eval():
        try:
            found = both(jax.random.key(0, impl="threefry2x32"))
        except ValueError:  # e.g. `delta_orthogonal`, which requires at least as many columns as rows
            return None
    few, full = (np.asarray(values, np.float64) for values in found)
    norm = float(few @ few)
    scale = float(few @ full) / norm if norm > 0 else 1.0
    if not np.allclose(full, scale * few, rtol=1e-4, atol=1e-7 * np.abs(full).max(initial=0)):
        return None
    return 1.0 if np.isclose(scale, 1, rtol=1e-6) else scale
