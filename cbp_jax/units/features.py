"""Captures what the units computed, from any apply function."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from cbp_jax.units import discovery, groups, tracing

# Activations of each group, [..., units] or [..., positions, units]; several arrays where its kernels read
# several.
Features = dict[str, chex.Array | tuple[chex.Array, ...]]


def with_features(
    apply_fn: Callable[..., Any], units: Iterable[groups.UnitGroup]
) -> Callable[..., tuple[Any, Features]]:
    """Makes a network return the activations of its units as well.

    The activation of a unit is what its outgoing weights see: after the nonlinearity, pooling and dropout.
    Under `jit`, outputs and gradients are bit for bit those of `apply_fn`. (Outside of it, layers that are jitted on
    their own are evaluated operation by operation here, which rounds differently.)

    Args:
      apply_fn: `apply_fn(params, *inputs, **kwargs) -> outputs`.
      units: groups of `discover_units`, or written by hand.

    Returns:
      a function of the same arguments that returns `(outputs, features)`. `features` maps the name of each group
      to an array [..., units] (leading axes: batch and positions). Where each position of a unit has outgoing
      weights of its own, as from a convolution to a dense layer, it is [batch, positions, units]. Keyword
      arguments are not traced.

    Raises:
      ValueError: when called, if a group's outgoing kernel is not applied by this function exactly once, along the
        axes that the group says.

    Example:
      >>> import jax.numpy as jnp
      >>> def apply(params, x):
      ...   return jnp.maximum(x @ params["w1"], 0) @ params["w2"]
      >>> params = {"w1": jnp.ones((4, 3)), "w2": jnp.ones((3, 2))}
      >>> units = discovery.discover_units(apply, params, jnp.ones((1, 4)))
      >>> output, features = with_features(apply, units)(params, jnp.ones((5, 4)))
      >>> output.shape, features["w1"].shape
      ((5, 2), (5, 3))
    """
    units = tuple(units)

    @functools.wraps(apply_fn)
    def apply(params: Any, *inputs: Any, **kwargs: Any) -> tuple[Any, Features]:
        trace = tracing.trace_network(functools.partial(apply_fn, **kwargs), params, *inputs)
        contractions = discovery.Walk(trace).contractions
        wanted = [(group, consumer.kernel) for group in units for consumer in group.operands()]
        read = []
        for group, kernel in wanted:
            found = [item for item in contractions if item.path == kernel.path]
            if len(found) != 1 or found[0].in_axes != kernel.axes:
                applied = f"{len(found)} times" if len(found) != 1 else f"along axes {found[0].in_axes}"
                raise ValueError(
                    f"group {group.name!r} is read by {kernel.path!r} along axes {kernel.axes}, once; the network "
                    f"applies that kernel {applied}"
                )
            read += found
        leaves = jax.tree.leaves((params, *inputs))
        outputs, operands = tracing.evaluate(trace.jaxpr, leaves, keep=[item.operand for item in read])
        arrays: dict[str, list[chex.Array]] = {group.name: [] for group in units}
        for (group, kernel), contraction, operand in zip(wanted, read, operands, strict=True):
            arrays[group.name].append(_per_unit(operand, contraction.operand_axes, kernel))
        features = {name: found[0] if len(found) == 1 else tuple(found) for name, found in arrays.items()}
        return jax.tree.unflatten(jax.tree.structure(trace.out_tree), outputs), features

    return apply


def _per_unit(operand: chex.Array, axes: tuple[int, ...], kernel: groups.ParamSlice) -> chex.Array:
    """Brings the axes that a kernel contracts to the end, as [units] or [positions, units]."""
    if axes != tuple(range(operand.ndim - len(axes), operand.ndim)):
        operand = jnp.moveaxis(operand, axes, range(-len(axes), 0))
    shape = operand.shape[: operand.ndim - len(axes)]
    index = kernel.index if kernel.positions > 1 else kernel.index[0]
    if kernel.is_whole:
        return operand.reshape(*shape, *index.shape)
    return operand.reshape(*shape, kernel.rows)[..., index]
