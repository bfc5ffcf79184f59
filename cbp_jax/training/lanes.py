"""Runs one function for many seeds and hyperparameters at once: lanes on one or more devices."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from cbp_jax.numerics.compilation import RUNS_ONCE

LaneMode = Literal["auto", "vmap", "map"]


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Keep BLAS to one thread while lanes run; each has a core of its own.

    JAX takes decompositions on a CPU from SciPy, whose OpenBLAS has a thread for every core. Idle threads wait in a
    busy loop. On a quiet machine that doubles the time of a run with small tasks; next to other processes the run takes
    six to seventeen times as long (`benchmarks/host_devices.py`). Without threadpoolctl nothing is changed.

    Example:
      >>> with one_blas_thread():
      ...   pass
    """
    try:
        import scipy.linalg.cython_lapack  # noqa: F401  so that its library is there to be kept
        import threadpoolctl
    except ImportError:
        yield
        return
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        yield


class Lanes:
    """Lanes are the rows of batched arguments; every device takes an equal share of them.

    On accelerators the rows of a device run together under `vmap`. On a CPU, a batch of matrix-vector products takes
    longer than the same products one after another. There each device runs one row at a time, and all host devices work
    at once (`jax.config.update("jax_num_cpu_devices", n)` makes n of them).

    Args:
      count: number of lanes.
      mode: "vmap", "map" (in turn), or "auto", which is "map" on a CPU and "vmap" elsewhere.
      devices: the devices to use, by default all of this process, as many as there are lanes; with "vmap" on a CPU only
        one, because batched decompositions on several host devices wait for each other forever.
      at_once: the most lanes that are on the devices at once, by default all. The others wait in the host's memory, and
        every call moves them there and back.

    Raises:
      ValueError: no lanes, none at once, or an unknown mode.

    Example:
      >>> import jax.numpy as jnp
      >>> lanes = Lanes(3)
      >>> step = lanes.jit(lambda shared, lane: shared * lane)
      >>> lanes.gather(step(lanes.share(jnp.float32(2)), lanes.scatter(jnp.arange(3.0)))).tolist()
      [0.0, 2.0, 4.0]
    """

    def __init__(
        self,
        count: int,
        mode: LaneMode = "auto",
        devices: Sequence[jax.Device] | None = None,
        at_once: int | None = None,
    ):
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        if mode not in ("auto", "vmap", "map"):
            raise ValueError(f"mode must be 'auto', 'vmap' or 'map', got {mode!r}")
        if at_once is not None and at_once < 1:
            raise ValueError(f"at_once must be at least 1, got {at_once}")
        at_once = min(at_once or count, count)
        on_cpu = (jax.local_devices() if devices is None else devices)[0].platform == "cpu"
        self.mode = mode if mode != "auto" else "map" if on_cpu else "vmap"
        if devices is None:
            devices = jax.local_devices()[: 1 if on_cpu and self.mode == "vmap" else None]
        devices = list(devices)[:at_once]
        self.count = count
        self.mesh = jax.sharding.Mesh(np.asarray(devices), ("lane",))
        self._waiting = at_once < count
        # The lanes of one call; not a `lax.map` over all, as XLA runs the insides of loops on one thread. Batches are
        # of one size, which is one program.
        batches = -(-count // at_once)
        self._chunk = -(-count // (batches * len(devices))) * len(devices) if self.mode == "vmap" else len(devices)
        if self._waiting:
            self._chunk = min(self._chunk, at_once // len(devices) * len(devices))
        self._padded = count + -count % self._chunk

    def _sharding(self, *axes: str) -> jax.sharding.NamedSharding:
        return jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec(*axes))

    @property
    def of_a_call(self) -> int:
        """Number of lanes that run in one call of a compiled function."""
        return min(self._chunk, self.count)

    @property
    def calls(self) -> int:
        """Number of calls that it takes to run all lanes."""
        return self._padded // self._chunk

    def share(self, tree: Any) -> Any:
        """Copy arrays that all lanes read to every device, once."""
        return jax.device_put(tree, self._sharding())

    def scatter(self, tree: Any) -> tuple[Any, ...]:
        """Spread arrays [count, ...] over the devices: one tree for each call that it takes to run all lanes.

        Where the devices, or the lanes of a batch, do not divide the lanes, the last lane is repeated.

        Raises:
          ValueError: an array has another number of rows.
        """
        for array in jax.tree.leaves(tree):
            if array.shape[:1] != (self.count,):
                raise ValueError(f"arrays must have {self.count} rows, one for each lane, got shape {array.shape}")
        rows = np.minimum(np.arange(self._padded), self.count - 1).reshape(-1, self._chunk)
        chunks = [jax.tree.map(lambda array: array[chunk], tree) for chunk in rows]  # noqa: B023
        return tuple(jax.device_get(chunk) if self._waiting else self._put(chunk) for chunk in chunks)

    def _put(self, chunk: Any) -> Any:
        return jax.device_put(chunk, self._sharding("lane"))

    def gather(self, chunks: tuple[Any, ...]) -> Any:
        """Return the arrays [count, ...] of all lanes, on the host."""
        return jax.tree.map(lambda *parts: np.concatenate([np.asarray(p) for p in parts])[: self.count], *chunks)

    def jit(
        self, function: Callable[..., Any], donate_lane: int | None = None, *, once: bool = False
    ) -> Callable[..., Any]:
        """Compile `function(shared, *lane_args)` to act on all lanes.

        Args:
          function: takes what all lanes share, then arguments of one lane; returns a pytree of one lane's results.
          donate_lane: which of the lane arguments, counted from 0, may be overwritten by the results.
          once: whether it is called so seldom that quick compilation matters more than speed.

        Returns:
          a function of what `share` returned, and of arguments as `scatter` returns them; it returns results likewise.
        """

        def local(shared, *lane_args):
            if self.mode == "vmap":
                return jax.vmap(lambda args: function(shared, *args))(lane_args)
            results = function(shared, *jax.tree.map(lambda array: array[0], lane_args))
            return jax.tree.map(lambda array: jnp.asarray(array)[None], results)

        spec = jax.sharding.PartitionSpec

        def chunk(shared, *lane_args):
            return jax.shard_map(
                local,
                mesh=self.mesh,
                in_specs=(spec(), *(spec("lane") for _ in lane_args)),
                out_specs=spec("lane"),
                check_vma=False,
            )(shared, *lane_args)

        compiled = jax.jit(
            chunk,
            donate_argnums=() if donate_lane is None else 1 + donate_lane,
            compiler_options=RUNS_ONCE if once and self.mesh.devices.flat[0].platform == "cpu" else None,
        )
        if self._waiting:
            call = lambda shared, *args: jax.device_get(compiled(shared, *map(self._put, args)))
        else:
            call = compiled
        return lambda shared, *lane_args: tuple(call(shared, *args) for args in zip(*lane_args, strict=True))
