"""Runs one function for many seeds and hyperparameters at once: lanes on one or more devices."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

LaneMode = Literal["auto", "vmap", "map"]


class Lanes:
    """Lanes are the rows of batched arguments; every device takes an equal share of them.

    On accelerators the rows of a device run together under `vmap`. On a CPU batches of matrix-vector products are
    slower than one after the other, so that there they run in turn under `lax.map`, on all host devices at once
    (`jax.config.update("jax_num_cpu_devices", n)` makes n of them).

    Args:
      count: number of lanes.
      mode: "vmap", "map", or "auto", which is "map" on a CPU and "vmap" elsewhere.
      devices: the devices to use, by default all of the default backend, as many as there are lanes.

    Raises:
      ValueError: no lanes, or an unknown mode.

    Example:
      >>> import jax.numpy as jnp
      >>> lanes = Lanes(3)
      >>> step = lanes.jit(lambda shared, lane: shared * lane)
      >>> lanes.gather(step(lanes.share(jnp.float32(2)), lanes.scatter(jnp.arange(3.0)))).tolist()
      [0.0, 2.0, 4.0]
    """

    def __init__(self, count: int, mode: LaneMode = "auto", devices: Sequence[jax.Device] | None = None):
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        if mode not in ("auto", "vmap", "map"):
            raise ValueError(f"mode must be 'auto', 'vmap' or 'map', got {mode!r}")
        devices = list(jax.devices() if devices is None else devices)[:count]
        self.count = count
        self.mode = mode if mode != "auto" else "map" if devices[0].platform == "cpu" else "vmap"
        self.mesh = jax.sharding.Mesh(np.asarray(devices), ("lane",))
        self._padding = -count % len(devices)

    def _sharding(self, *axes: str) -> jax.sharding.NamedSharding:
        return jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec(*axes))

    def share(self, tree: Any) -> Any:
        """Puts arrays that all lanes read on every device, once."""
        return jax.device_put(tree, self._sharding())

    def scatter(self, tree: Any) -> Any:
        """Spreads arrays [count, ...] over the devices, the last lane repeated where they do not divide it."""

        def pad(array):
            return jnp.concatenate([array, jnp.repeat(array[-1:], self._padding, 0)]) if self._padding else array

        return jax.device_put(jax.tree.map(pad, tree), self._sharding("lane"))

    def gather(self, tree: Any) -> Any:
        """The arrays [count, ...] of all lanes, on the host."""
        return jax.tree.map(lambda array: np.asarray(array)[: self.count], tree)

    def jit(self, function: Callable[..., Any], donate_lane: int | None = None) -> Callable[..., Any]:
        """Compiles `function(shared, *lane_args)` to act on all lanes.

        Args:
          function: takes what all lanes share, then arguments of one lane; returns a pytree of one lane's results.
          donate_lane: which of the lane arguments, counted from 0, may be overwritten by the results.

        Returns:
          a function of `share(...)` and arguments [lanes, ...] that returns [lanes, ...].
        """

        def local(shared, *lane_args):
            if self.mode == "vmap":
                return jax.vmap(lambda args: function(shared, *args))(lane_args)
            return jax.lax.map(lambda args: function(shared, *args), lane_args)

        spec = jax.sharding.PartitionSpec

        def mapped(shared, *lane_args):
            return jax.shard_map(
                local,
                mesh=self.mesh,
                in_specs=(spec(), *(spec("lane") for _ in lane_args)),
                out_specs=spec("lane"),
                check_vma=False,
            )(shared, *lane_args)

        return jax.jit(mapped, donate_argnums=() if donate_lane is None else 1 + donate_lane)
