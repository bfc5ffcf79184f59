"""A network as one flat jaxpr, and its evaluation with some intermediate values kept."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from cbp_jax.units import groups

# Calls whose body can stand in place of the call.
_INLINED = frozenset({"jit", "pjit", "closed_call", "core_call"})
CONTRACTIONS = frozenset({"dot_general", "conv_general_dilated"})


class Trace(NamedTuple):
    """A traced apply function."""

    jaxpr: core.ClosedJaxpr  # flat: what is left of calls holds no contraction or cannot be inlined
    param_paths: dict[core.Var, str]  # the jaxpr's inputs that are parameters
    out_tree: Any  # tree of the outputs' ShapeDtypeStructs


def trace_network(apply_fn: Callable[..., Any], params: Any, *inputs: Any) -> Trace:
    """Traces `apply_fn(params, *inputs)` and inlines the calls that hold kernels."""
    closed, out_tree = jax.make_jaxpr(apply_fn, return_shape=True)(params, *inputs)
    leaves = jax.tree.leaves((params, *inputs))
    if any(eqn.primitive.name in _INLINED and _holds_contraction(eqn) for eqn in closed.jaxpr.eqns):
        closed = jax.make_jaxpr(lambda *args: evaluate(closed, args)[0])(*leaves)
    paths = list(groups.leaves_by_path(params))
    return Trace(closed, dict(zip(closed.jaxpr.invars[: len(paths)], paths, strict=True)), out_tree)


def evaluate(
    closed: core.ClosedJaxpr, args: Sequence[Any], keep: Sequence[core.Var] = ()
) -> tuple[list[Any], list[Any]]:
    """Evaluates a jaxpr, inlining calls that hold contractions.

    All other equations are bound as they stand, `custom_jvp` included, so that derivatives are unchanged.

    Args:
      closed: the jaxpr with its constants.
      args: a value for each of its inputs.
      keep: variables of the outermost jaxpr whose values are wanted too.

    Returns:
      the outputs, and the values of `keep`.
    """
    env: dict[core.Var, Any] = {}

    def read(atom):
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    env.update(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    env.update(zip(closed.jaxpr.invars, args, strict=True))
    for eqn in closed.jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        if eqn.primitive.name in _INLINED and _holds_contraction(eqn):
            results, _ = evaluate(_body(eqn), values)
        else:
            bind = eqn.primitive.get_bind_params(eqn.params)
            functions, bind_params = bind if isinstance(bind, tuple) else ((), bind)
            with eqn.ctx.manager:
                results = eqn.primitive.bind(*functions, *values, **bind_params)
            results = results if eqn.primitive.multiple_results else [results]
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in closed.jaxpr.outvars], [env[var] for var in keep]


def call_body(eqn: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """The jaxpr that a call-like equation runs once on exactly its operands, or None for any other."""
    if eqn.primitive.name in _INLINED | {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}:
        return _body(eqn)
    return None


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
