"""A network as one flat jaxpr, and its evaluation with some intermediate values kept."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from cbp_jax.units import groups

# Calls whose body can stand in place of the call.
_INLINED = frozenset({"jit", "pjit", "closed_call", "core_call"})
_REMAT = frozenset({"remat", "remat2", "checkpoint"})
_LOOPS = frozenset({"scan", "while"})
CONTRACTIONS = frozenset({"dot_general", "conv_general_dilated"})


class Trace(NamedTuple):
    """A traced apply function."""

    jaxpr: core.ClosedJaxpr  # flat: what is left of calls holds no contraction or cannot be inlined
    param_paths: dict[core.Var, str]  # the jaxpr's inputs that are parameters or part of the network's state
    states: frozenset[core.Var]  # those of them that are no parameters: running statistics, as far as is known
    out_tree: Any  # tree of the outputs' ShapeDtypeStructs

    def with_data(self, paths: Collection[str]) -> "Trace":
        """The same network, of whose state the leaves at these paths are data."""
        data = {var for var in self.states if self.param_paths[var] in paths}
        named = {var: path for var, path in self.param_paths.items() if var not in data}
        return self._replace(param_paths=named, states=self.states - data)


def trace_network(apply_fn: Callable[..., Any], params: Any, *inputs: Any) -> Trace:
    """Traces `apply_fn(params, *inputs)` and inlines the calls that hold kernels."""
    closed, out_tree = jax.make_jaxpr(apply_fn, return_shape=True)(params, *inputs)
    leaves = jax.tree.leaves((params, *inputs))
    if any(eqn.primitive.name in _INLINED | _REMAT and _holds_contraction(eqn) for eqn in closed.jaxpr.eqns):
        # Traced anew, each call has a body of its own.
        closed = jax.make_jaxpr(lambda *args: evaluate(closed, args)[0])(*leaves)
    paths = list(groups.leaves_by_path(params))
    named = dict(zip(closed.jaxpr.invars, paths, strict=False))
    states = {var for var, path in named.items() if path.startswith(f"{groups.STATISTICS}/")}
    # An input that is a tree of named arrays may be running statistics; plain arrays are data, and so is what cannot be
    # a statistic: masks, numbers of tokens, keys.
    others = [groups.join_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(inputs)]
    for var, path in zip(closed.jaxpr.invars[len(paths) :], others, strict=True):
        name = path.partition("/")[2]
        if name and name not in named.values() and jax.numpy.issubdtype(var.aval.dtype, jax.numpy.floating):
            named[var] = name
            states.add(var)
    return Trace(closed, named, frozenset(states), out_tree)


def evaluate(
    closed: core.ClosedJaxpr, args: Sequence[Any], keep: Collection[core.Var] = ()
) -> tuple[list[Any], dict[core.Var, Any]]:
    """Evaluates a jaxpr, inlining calls that hold contractions.

    All other equations are bound as they stand, `custom_jvp` included, so that derivatives are unchanged. What is
    rematerialised stays so, but for the values to keep.

    Args:
      closed: the jaxpr with its constants.
      args: a value for each of its inputs.
      keep: variables of the jaxpr, or of the bodies of its calls, whose values are wanted too.

    Returns:
      the outputs, and the values of `keep`.
    """
    env: dict[core.Var, Any] = {}
    kept: dict[core.Var, Any] = {}

    def read(atom):
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    env.update(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    env.update(zip(closed.jaxpr.invars, args, strict=True))
    for eqn in closed.jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        if eqn.primitive.name in _INLINED and _holds_contraction(eqn):
            results, inner = evaluate(_body(eqn), values, keep)
            kept.update(inner)
        elif eqn.primitive.name in _REMAT and _holds_contraction(eqn):
            results, inner = _rematerialised(eqn, keep)(*values)
            kept.update(zip(_variables(_body(eqn), keep), inner, strict=True))
        else:
            bind = eqn.primitive.get_bind_params(eqn.params)
            functions, bind_params = bind if isinstance(bind, tuple) else ((), bind)
            with eqn.ctx.manager:
                results = eqn.primitive.bind(*functions, *values, **bind_params)
            results = results if eqn.primitive.multiple_results else [results]
        env.update(zip(eqn.outvars, results, strict=True))
    kept.update({var: env[var] for var in keep if var in env})
    return [read(atom) for atom in closed.jaxpr.outvars], kept


def _rematerialised(eqn: core.JaxprEqn, keep: Collection[core.Var]) -> Callable[..., tuple[list[Any], list[Any]]]:
    """The body of a checkpointed call, checkpointed, returning its outputs and the values to keep."""
    body = _body(eqn)

    def run(*args):
        outputs, kept = evaluate(body, args, keep)
        return outputs, [kept[var] for var in _variables(body, keep)]

    return jax.checkpoint(run, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])


def _variables(closed: core.ClosedJaxpr, among: Collection[core.Var]) -> list[core.Var]:
    """Those variables that stand in a jaxpr or in the bodies of its calls."""
    if not among:
        return []
    found = {*closed.jaxpr.invars, *closed.jaxpr.constvars}
    for eqn in closed.jaxpr.eqns:
        found.update(eqn.outvars)
        if eqn.primitive.name in _INLINED | _REMAT and _holds_contraction(eqn):
            found.update(_variables(_body(eqn), among))
    return [var for var in among if var in found]


def is_remat(eqn: core.JaxprEqn) -> bool:
    """Whether an equation is a checkpointed call."""
    return eqn.primitive.name in _REMAT


def call_body(eqn: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """The jaxpr that a call-like equation runs once on exactly its operands, or None for any other."""
    if eqn.primitive.name in _INLINED | _REMAT | {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}:
        return _body(eqn)
    return None


def not_followed(primitive: str) -> str:
    """A primitive by name, and that labels do not pass through it; of a loop also why, and what to do."""
    reason = f"`{primitive}`, which is not followed"
    return f"{reason}: what a loop computes cannot be seen from outside; unroll it" if primitive in _LOOPS else reason


def live_equations(jaxpr: core.Jaxpr) -> list[core.JaxprEqn]:
    """The equations that the outputs depend on, in order."""
    live = {atom for atom in jaxpr.outvars if isinstance(atom, core.Var)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if live.intersection(eqn.outvars):
            kept.append(eqn)
            live.update(atom for atom in eqn.invars if isinstance(atom, core.Var))
    return kept[::-1]


def _body(eqn: core.JaxprEqn) -> core.ClosedJaxpr:
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    body = next(eqn.params[name] for name in names if name in eqn.params)
    return body if isinstance(body, core.ClosedJaxpr) else core.ClosedJaxpr(body, ())


def _holds_contraction(eqn: core.JaxprEqn) -> bool:
    if eqn.primitive.name in CONTRACTIONS:
        return True
    return any(_holds_contraction(inner) for body in core.jaxprs_in_params(eqn.params) for inner in body.eqns)
