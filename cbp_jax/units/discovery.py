"""Finds the units of a network in its jaxpr."""

from collections.abc import Callable
from typing import Any

from cbp_jax.units import build, collection, tracing, walk


def discover_units(apply_fn: Callable[..., Any], params: Any, *example_inputs: Any) -> collection.Units:
    """Finds the groups of units that can be replaced in a network.

    The function is traced, not run. A unit is whatever a kernel makes along its free axis: its *incoming* weights
    are that column, and its *outgoing* weights are the rows of the kernels that contract the array it ends up
    in, however many elementwise maps, poolings, dropouts, transposes and reshapes lie between.

    Args:
      apply_fn: `apply_fn(params, *inputs) -> outputs`, any function that JAX can trace: `flax_model.apply`, a
        function that merges an NNX graph, bare JAX.
      params: pytree of arrays (or of `jax.ShapeDtypeStruct`).
      *example_inputs: arrays (or `jax.ShapeDtypeStruct`) of the shapes that the network takes.

    Returns:
      the groups in forward order, a tuple of `UnitGroup` that prints as a table. Its `left_out` names each layer
      that is no group, with the reason: the output layer, or a construct that is not understood.

    Raises:
      ValueError: there is no group; the message names what was left out and why.

    Example:
      >>> import jax.numpy as jnp
      >>> def apply(params, x):
      ...   return jnp.maximum(x @ params["w1"] + params["b1"], 0) @ params["w2"]
      >>> params = {"w1": jnp.ones((4, 3)), "b1": jnp.zeros(3), "w2": jnp.ones((3, 2))}
      >>> print(discover_units(apply, params, jnp.ones((1, 4))))
      group  size  kind   incoming  bias  outgoing
      w1        3  dense  w1        b1    w2
      left out: w2 (2 units): it is part of the network's output
    """
    if not callable(apply_fn):
        raise TypeError(f"apply_fn must be a function of (params, *inputs); found {type(apply_fn).__name__}")
    return build.build(walk.Walk(tracing.trace_network(apply_fn, params, *example_inputs)))
