"""A network as one flat jaxpr, whose parameters are known by path."""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
from jax.extend import core

from cbp_jax import factored, jaxprs
from cbp_jax.units import groups
from cbp_jax.units.values import LeftOutKind, Reason


class Trace(NamedTuple):
    """A traced apply function."""

    jaxpr: core.ClosedJaxpr  # flat: remaining calls contain no contraction, or cannot be inlined
    param_paths: dict[core.Var, str]  # the jaxpr's inputs that are parameters or part of the network's state
    states: frozenset[core.Var]  # inputs that are not parameters: presumably running statistics
    out_tree: Any  # tree of the outputs' ShapeDtypeStructs

    def with_data(self, paths: Collection[str]) -> "Trace":
        """Return the same network, with the leaves at these paths treated as data instead of state."""
        data = {var for var in self.states if self.param_paths[var] in paths}
        named = {var: path for var, path in self.param_paths.items() if var not in data}
        return self._replace(param_paths=named, states=self.states - data)


def trace_network(apply_fn: Callable[..., Any], params: Any, *inputs: Any) -> Trace:
    """Trace `apply_fn(params, *inputs)` and inline the calls that hold kernels."""
    leaves = groups.leaves_by_path(params)
    for path, leaf in leaves.items():
        if not isinstance(leaf, int | float | complex) and not hasattr(leaf, "dtype"):
            raise TypeError(
                f"params must be a tree of arrays; params[{path!r}] is {leaf!r}. For an Equinox model, pass the first "
                "part of eqx.partition(model, eqx.is_inexact_array), and let apply_fn eqx.combine it with the second"
            )
    closed, out_tree = jaxprs.trace(apply_fn, params, *inputs)
    if factored.multiplies_parameters(closed, len(leaves)):  # adapters, whose columns are units
        closed, out_tree = jaxprs.trace(factored.apply_in_factors(apply_fn), params, *inputs)
    paths = list(leaves)
    named = dict(zip(closed.jaxpr.invars, paths, strict=False))
    states = {var for var, path in named.items() if path.startswith(f"{groups.STATISTICS}/")}
    # An input that is a tree of named arrays may be running statistics. Plain arrays are data, and so are arrays that
    # cannot be statistics: masks, token ids, keys.
    others = [groups.join_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(inputs)]
    for var, path in zip(closed.jaxpr.invars[len(paths) :], others, strict=True):
        name = path.partition("/")[2]
        if name and name not in named.values() and jax.numpy.issubdtype(var.aval.dtype, jax.numpy.floating):
            named[var] = name
            states.add(var)
    return Trace(closed, named, frozenset(states), out_tree)


def not_followed(primitive: str, what: str) -> Reason:
    """Return the reason for not following something that happens in a primitive (`what`, as "it is used in"), with
    advice for loops."""
    text = f"{what} `{primitive}`, which is not followed"
    if primitive in jaxprs.LOOPS:
        return Reason(LeftOutKind.LOOP, f"{text}: what a loop computes cannot be seen from outside; unroll it")
    return Reason(LeftOutKind.NOT_FOLLOWED, text)
