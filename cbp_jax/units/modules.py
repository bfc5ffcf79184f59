"""NNX modules as functions of their parameters."""

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Pure(NamedTuple):
    """A function of a module, turned into a function of its parameters and the rest of its state."""

    function: Callable[..., Any]  # (params, rest, *inputs) -> (output, new rest)
    params: Any  # State of the module's `nnx.Param`s
    rest: Any  # State of all its other variables: running statistics, counts and keys of random streams


def is_module(value: Any) -> bool:
    """Return whether something is an NNX module."""
    nnx = sys.modules.get("flax.nnx")  # if it was never imported, there is no module
    return nnx is not None and isinstance(value, nnx.Module)


def pure(function: Callable[..., Any], module: Any) -> Pure:
    """Turn a function of a module into a function of its parameters and the rest of its state, which it may change."""
    from flax import nnx

    graphdef, params, rest = nnx.split(module, nnx.Param, ...)

    @functools.wraps(function)
    def run(params: Any, rest: Any, *inputs: Any) -> tuple[Any, Any]:
        copy = nnx.merge(graphdef, params, rest)
        output = function(copy, *inputs)
        return output, nnx.split(copy, nnx.Param, ...)[2]

    return Pure(run, params, rest)


def update(module: Any, rest: Any) -> None:
    """Write the state after a run back into the module."""
    from flax import nnx

    if jax.tree.leaves(rest):
        nnx.update(module, rest)
