"""Captures the activations of units, from any apply function."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from cbp_jax import jaxprs
from cbp_jax.units import groups, modules, tracing, walk
from cbp_jax.units.values import Contraction

# Activations of each group, [..., units] or [..., positions, units]; a tuple if its kernels read several arrays.
Features = dict[str, chex.Array | tuple[chex.Array, ...]]


def with_features(
    apply_fn: Callable[..., Any], units: Iterable[groups.UnitGroup]
) -> Callable[..., tuple[Any, Features]]:
    """Make a network return the activations of its units as well.

    The activation of a unit is what its outgoing weights see: after the nonlinearity, pooling and dropout.
    Under `jit`, outputs and gradients are bit for bit those of `apply_fn`. (Without `jit`, layers that are jitted
    themselves are evaluated operation by operation here, which rounds differently. So do low-rank changes of kernels,
    which are applied factor by factor; see `cbp_jax.lora.factored`.)

    Args:
      apply_fn: `apply_fn(params, *inputs, **kwargs) -> outputs`. If `params` is an `nnx.Module`, as in the loss of
        `nnx.grad`, its other state (running statistics, random streams) is updated as usual.
      units: groups of units, from `discover_units` or written by hand.

    Returns:
      a function of the same arguments that returns `(outputs, features)`. `features` maps the name of each group
      to an array [..., units], with batch and positions as leading axes. If each position of a unit has its own
      outgoing weights, as from a convolution to a dense layer, it is [batch, positions, units]. If a kernel is applied
      several times, the activations that it reads are stacked along a new leading axis, or concatenated along the batch
      if their shapes differ. Keyword arguments are not traced.

    Raises:
      ValueError: when called, if the function does not apply a group's outgoing kernel along the axes in the group.

    Example:
      >>> import jax.numpy as jnp
      >>> def apply(params, x):
      ...   return jnp.maximum(x @ params["w1"], 0) @ params["w2"]
      >>> params = {"w1": jnp.ones((4, 3)), "w2": jnp.ones((3, 2))}
      >>> import cbp_jax
      >>> units = cbp_jax.discover_units(apply, params, jnp.ones((1, 4)))
      >>> output, features = with_features(apply, units)(params, jnp.ones((5, 4)))
      >>> output.shape, features["w1"].shape
      ((5, 2), (5, 3))
    """
    units = tuple(units)

    @functools.wraps(apply_fn)
    def apply(params: Any, *inputs: Any, **kwargs: Any) -> tuple[Any, Features]:
        function: Callable[..., Any] = functools.partial(apply_fn, **kwargs)
        if modules.is_module(params):
            function, state, rest = modules.pure(function, params)
            (outputs, rest), features = run(function, state, rest, *inputs)
            modules.update(params, rest)
            return outputs, features
        return run(function, params, *inputs)

    def run(function: Callable[..., Any], params: Any, *inputs: Any) -> tuple[Any, Features]:
        trace = tracing.trace_network(function, params, *inputs)
        contractions = walk.walk(trace).contractions
        wanted = [(group, consumer.kernel) for group in units for consumer in group.operands()]
        read: list[list[Contraction]] = []
        for group, kernel in wanted:
            found = [item for item in contractions if item.path == kernel.path]
            if not found or any(item.in_axes != kernel.axes for item in found):
                applied = f"applies it along axes {found[0].in_axes}" if found else "does not apply that kernel"
                raise ValueError(
                    f"group {group.name!r} is read by {kernel.path!r} along axes {kernel.axes}, "
                    f"but the network {applied}"
                )
            read.append([item for item in found if item.reads(kernel.index)])
        leaves = jax.tree.leaves((params, *inputs))
        keep = dict.fromkeys(item.operand for found in read for item in found)
        outputs, operands = jaxprs.evaluate(trace.jaxpr, leaves, list(keep))
        arrays: dict[str, list[chex.Array]] = {group.name: [] for group in units}
        for (group, kernel), found in zip(wanted, read, strict=True):
            arrays[group.name].append(
                _join([_per_unit(_of_passes(operands[item.operand], item), item, kernel) for item in found], kernel)
            )
        features = {name: found[0] if len(found) == 1 else tuple(found) for name, found in arrays.items()}
        return jax.tree.unflatten(jax.tree.structure(trace.out_tree), outputs), features

    return apply


def _of_passes(operands: chex.Array, use: Contraction) -> chex.Array:
    """Select what a kernel read, in one pass or in all, from what the passes of scans read, [passes..., operand's
    shape]."""
    return (
        operands[tuple(slice(None) if number is None else number for number in use.passes)] if use.passes else operands
    )


def _per_unit(operand: chex.Array, use: Contraction, kernel: groups.ParamSlice) -> chex.Array:
    """Move the axes that a kernel contracts to the end, as [units] or [positions, units]."""
    axes = tuple(axis + use.passes.count(None) for axis in use.operand_axes)
    if axes != tuple(range(operand.ndim - len(axes), operand.ndim)):
        operand = jnp.moveaxis(operand, axes, range(-len(axes), 0))
    shape = operand.shape[: operand.ndim - len(axes)]
    index = kernel.index if kernel.positions > 1 else kernel.index[0]
    operand = operand.reshape(*shape, -1)
    if use.operand_rows is None:
        return operand.reshape(*shape, *index.shape) if kernel.is_whole else operand[..., index]
    channels = use.operand_rows[kernel.index]
    if not (channels == channels[0]).all():
        return operand[..., use.operand_rows[index]]
    # A grouped convolution reads a channel by several rows: they share its activation, which XLA does not copy.
    read = operand if np.array_equal(channels[0], np.arange(operand.shape[-1])) else operand[..., channels[0]]
    return jnp.broadcast_to(jnp.expand_dims(read, -2), (*shape, *channels.shape)) if kernel.positions > 1 else read


def _join(arrays: list[chex.Array], kernel: groups.ParamSlice) -> chex.Array:
    """Return the activations that several applications of one kernel read."""
    if len(arrays) == 1:
        return arrays[0]
    if len({array.shape for array in arrays}) == 1:
        return jnp.stack(arrays)
    trailing = 1 if kernel.positions == 1 else 2
    return jnp.concatenate([array.reshape(-1, *array.shape[array.ndim - trailing :]) for array in arrays])
