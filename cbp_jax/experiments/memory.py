"""Checks in advance that a run fits into memory."""

import itertools
import math
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from cbp_jax.experiments.learners import Method
from cbp_jax.training import Learner, init_state

_GIB = 2**30


def check_results(methods: int, seeds: int, tasks: int, measures: int) -> None:
    """Raise if results do not fit into this machine's memory.

    Args:
      methods: how many there are, as of what follows.
      seeds: of each method.
      tasks: of each seed.
      measures: of each task, float32.

    Raises:
      ValueError: they take more than there is.

    Example:
      >>> check_results(methods=2, seeds=30, tasks=10**12, measures=8)  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ...
      ValueError: tasks=1000000000000 and seeds=30 with 2 methods make results of 1,788,139 GiB, ...
    """
    needed, there = 4 * methods * seeds * tasks * measures, _of_host()
    if needed > there:
        raise ValueError(
            f"tasks={tasks} and seeds={seeds} with {methods} method{'s' * (methods > 1)} make results of "
            f"{needed / _GIB:,.0f} GiB, and this machine has {there / _GIB:,.0f} GiB of memory"
        )


def check_examples(measured: int, shape: Sequence[int]) -> None:
    """Raise if the examples for measurements do not fit into this machine's memory.

    Args:
      measured: how many examples.
      shape: of one, float32.

    Raises:
      ValueError: they take more than there is.
    """
    needed, there = 4 * measured * math.prod(shape), _of_host()
    if needed > there:
        raise ValueError(
            f"measured_examples={measured} takes {needed / _GIB:,.0f} GiB, and this machine has "
            f"{there / _GIB:,.0f} GiB of memory"
        )


def check_layers(sizes: Sequence[int]) -> None:
    """Raise if the weights do not fit into this machine's memory, before units are discovered.

    Args:
      sizes: of inputs, hidden layers and outputs.

    Raises:
      ValueError: they take more than there is.
    """
    needed, there = 4 * sum(map(math.prod, itertools.pairwise(sizes))), _of_host()
    if needed > there:
        raise ValueError(
            f"hidden={tuple(sizes[1:-1])} takes {needed / _GIB:,.0f} GiB for weights, and this machine has "
            f"{there / _GIB:,.0f} GiB of memory"
        )


def check_images(count: int, size: int) -> None:
    """Raise if generated images do not fit into this machine's memory.

    Args:
      count: how many.
      size: height and width, of bytes in three channels.

    Raises:
      ValueError: they take more than there is.
    """
    needed, there = 3 * count * size**2, _of_host()
    if needed > there:
        raise ValueError(
            f"{count} procedural images of {size}x{size} take {needed / _GIB:,.0f} GiB, and this machine has "
            f"{there / _GIB:,.0f} GiB of memory"
        )


def check_states(learner: Learner, methods: Sequence[Method], seeds: int, processes: int = 1) -> int:
    """Raise if the states of lanes (networks and optimizer states) do not fit into memory.

    Args:
      learner: of the methods.
      methods: that run together.
      seeds: of each.
      processes: how many share the lanes, each on a machine of its own.

    Returns:
      bytes of the state of a lane.

    Raises:
      ValueError: all lanes together need more memory than the host has, which holds waiting lanes; or a lane needs more
        memory than a device has.
    """
    numbers = {name: jnp.float32(value) for name, value in methods[0].hyperparameters.items()}
    state = jax.eval_shape(lambda: init_state(learner, 0, numbers))
    lane = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    needed, there = lane * math.ceil(len(methods) * seeds / processes), _of_host()
    if needed > there:
        raise ValueError(
            f"seeds={seeds} with {len(methods)} method{'s' * (len(methods) > 1)} that run together keep networks and "
            f"optimizers of {needed / _GIB:,.0f} GiB, and there are {there / _GIB:,.0f} GiB of memory for them"
        )
    if lane > _of_device():
        raise ValueError(
            f"method {methods[0].text!r} keeps a network and an optimizer of {lane / _GIB:,.0f} GiB, and a device has "
            f"{_of_device() / _GIB:,.0f} GiB of memory"
        )
    return lane


def lanes_that_fit(lane: int, count: int, shared: int = 0) -> int | None:
    """Estimate how many lanes fit into the devices' memory.

    Each lane is counted twice, since gradients and updates are as large as networks, and a tenth of the memory is
    reserved for measurements.

    Args:
      lane: bytes of the state of a lane.
      count: how many lanes there are.
      shared: bytes of the data, which every device holds.

    Returns:
      the number, at least one; None if all fit, which is always the case on a CPU, whose memory is the host's.
    """
    if jax.default_backend() == "cpu":
        return None
    devices = len(jax.local_devices())
    fitting = devices * max(int((0.9 * _of_device() - shared) // (2 * lane)), 1) if _of_device() < math.inf else count
    return fitting if fitting < count else None


def fewer_lanes(error: Exception, count: int, at_once: int | None) -> int:
    """Return how many lanes to try at once after an error: half of those before, if memory ran out.

    Args:
      error: of a run.
      count: how many lanes there are.
      at_once: how many were on the devices at once; None for all.

    Returns:
      the number, at least one.

    Raises:
      Exception: the error, if it has another reason, or if there was one lane.

    Example:
      >>> fewer_lanes(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), count=30, at_once=None)
      15
    """
    before = min(at_once or count, count)
    if before == 1 or "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    return before // 2


def fewer_text(at_once: int) -> str:
    """Return the message that memory ran out, and what is tried now."""
    return f"the devices' memory ran out; going on with {at_once} lane{'s' * (at_once > 1)} at once"


def peak() -> int | None:
    """Return the most bytes that were in use on a device of this process; None if devices do not report it."""
    found = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((count for count in found if count is not None), default=None)


def _of_host() -> float:
    """Return the bytes of memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # unknown on this platform
        return float("inf")


def _of_device() -> float:
    """Return the bytes of memory of the smallest device that JAX uses."""
    if jax.default_backend() == "cpu":
        return _of_host()
    return min((device.memory_stats() or {}).get("bytes_limit", math.inf) for device in jax.local_devices())
