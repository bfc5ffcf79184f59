"""Keeps arrays sharded as the parameters are."""

from collections.abc import Callable
from typing import Any

import chex
import jax

shard_alike: Callable[[Any, Any], Any] | None
try:
    from jax.experimental.shard_alike import shard_alike
except ImportError:  # jax 0.11 has none
    shard_alike = None


def sharded_alike(tree: Any, like: Any) -> Any:
    """Ask the compiler to shard arrays as others are; their values stay.

    Where a program leaves the sharding of results to XLA, it may spread them over more devices than the parameters that
    they update. This keeps it from doing so. Nothing is asked where there is one device, outside of compiled programs,
    inside of `shard_map`, where every device has its own, and with jax 0.11, which cannot be asked: there
    `jax.jit(..., out_shardings=...)` says it.

    Args:
      tree: pytree of arrays.
      like: of the same structure and shapes.

    Returns:
      the tree.

    Example:
      >>> import jax.numpy as jnp
      >>> jax.jit(sharded_alike)({"w": jnp.ones(2)}, {"w": jnp.zeros(2)})["w"].tolist()
      [1.0, 1.0]
    """
    if shard_alike is None or jax.device_count() == 1 or jax.sharding.get_abstract_mesh().manual_axes:
        return tree

    def alike(array: chex.Array, other: chex.Array) -> chex.Array:
        if not (isinstance(array, jax.core.Tracer) and isinstance(other, jax.core.Tracer)):
            return array
        return shard_alike(array, other)[0]

    return jax.tree.map(alike, tree, like)


def check_axes(params: Any) -> None:
    """Refuse params that are sharded over explicit axes, along which only some operations are defined.

    Args:
      params: pytree of arrays.

    Raises:
      ValueError: some leaf is.

    Example:
      >>> import jax.numpy as jnp
      >>> mesh = jax.make_mesh((1,), ("model",))  # whose axes are explicit by default
      >>> rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model"))
      >>> check_axes({"w": jax.device_put(jnp.ones(2), rows)})
      Traceback (most recent call last):
      ...
      ValueError: params must be sharded over axes of type Auto; ['w'] is over explicit ones, ...
    """
    explicit = jax.sharding.AxisType.Explicit
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        sharding = getattr(jax.typeof(leaf), "sharding", None)
        if sharding is None or sharding.mesh.empty:
            continue
        types = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))
        over = [name for axes in sharding.spec if axes for name in (axes if isinstance(axes, tuple) else (axes,))]
        if any(types[name] == explicit for name in over):
            raise ValueError(
                f"params must be sharded over axes of type Auto; {jax.tree_util.keystr(path)} is over explicit ones, "
                f"PartitionSpec{tuple(sharding.spec)}. Make the mesh by jax.sharding.Mesh, or by jax.make_mesh(..., "
                "axis_types=(jax.sharding.AxisType.Auto, ...))"
            )
