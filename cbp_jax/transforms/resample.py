"""Fresh weights for a few units at a time, distributed as the initializer would fill the whole kernel."""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np

Initializer = Callable[[chex.PRNGKey, tuple[int, ...], jnp.dtype], chex.Array]


def sample_rows(
    initializer: Initializer,
    key: chex.PRNGKey,
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    axes: tuple[int, ...],
    count: int,
) -> chex.Array:
    """Draws `count` rows along `axes` of a kernel of the given shape.

    Random bits are dear, so that only the rows wanted are drawn. An initializer that scales by fans would take the
    number drawn for the kernel's own; the scale that it uses for the full kernel is put back.

    Args:
      initializer: a `jax.nn.initializers` function of (key, shape, dtype).
      key: a typed key.
      shape: the full kernel's.
      dtype: the kernel's.
      axes: axes of the kernel that enumerate rows, flattened in this order.
      count: how many rows.

    Returns:
      array [other axes of the kernel in order..., count].
    """
    rows = int(np.prod([shape[axis] for axis in axes]))
    scale = _row_scale(initializer, shape, axes[0], count) if len(axes) == 1 and count < rows else None
    if scale is None:  # its entries depend on the full shape in other ways, as orthogonal ones do
        fresh = initializer(key, shape, dtype)
    else:
        drawn = initializer(key, (*shape[: axes[0]], count, *shape[axes[0] + 1 :]), dtype)
        fresh = drawn if scale == 1 else (drawn * scale).astype(dtype)
    others = [axis for axis in range(len(shape)) if axis not in axes]
    fresh = fresh.transpose(*others, *axes).reshape(*(shape[axis] for axis in others), -1)
    return fresh[..., :count]


@functools.lru_cache(maxsize=256)
def _row_scale(initializer: Initializer, shape: tuple[int, ...], axis: int, count: int) -> float | None:
    """By how much entries of a draw of `count` rows must be scaled to have the full kernel's distribution.

    JAX's generator gives entry i of a draw bits that depend on the key and i alone. The same key therefore gives the
    same entries in both shapes, up to the scale, for every initializer that treats entries alike. None for others.
    """
    with jax.ensure_compile_time_eval():
        key = jax.random.key(0, impl="threefry2x32")
        few = initializer(key, (*shape[:axis], count, *shape[axis + 1 :]), jnp.float32).ravel()
        full = initializer(key, shape, jnp.float32).ravel()[: few.size]
        few, full = np.asarray(few, np.float64), np.asarray(full, np.float64)
    norm = float(few @ few)
    scale = float(few @ full) / norm if norm > 0 else 1.0
    if not np.allclose(full, scale * few, rtol=1e-4, atol=1e-7 * np.abs(full).max(initial=0)):
        return None
    return 1.0 if np.isclose(scale, 1, rtol=1e-6) else scale
