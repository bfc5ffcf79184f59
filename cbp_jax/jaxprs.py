"""Walking through jaxprs: code that `units` and `curvature` share.

Tables of primitives by their effect on operands; calls and their bodies; and evaluation of a jaxpr, equation by
equation, that keeps some intermediate values.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

# Calls that can be replaced by their body.
_INLINED = frozenset({"jit", "pjit", "closed_call", "core_call"})
_REMAT = frozenset({"remat", "remat2", "checkpoint"})
_CUSTOM = frozenset({"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"})
LOOPS = frozenset({"scan", "while"})
# Products of two operands, summed over some of their axes.
CONTRACTIONS = frozenset({"dot_general", "conv_general_dilated"})
POOLING = frozenset({"reduce_window_max", "reduce_window_min", "reduce_window_sum"})
# Each output element depends on the same element of every operand; these have derivatives.
SMOOTH = frozenset(
    """abs acos acosh add add_any asin asinh atan atan2 atanh cbrt clamp convert_element_type copy copy_p cos cosh
    digamma div erf erf_inv erfc exp exp2 expm1 integer_pow lgamma log log1p logistic max min mul name neg
    one_minus_square pow reduce_precision rem rsqrt select_n sin sinh sqrt square sub tan tanh""".split()
)
# These too, but their derivative is 0, undefined, or irrelevant.
ELEMENTWISE = SMOOTH | frozenset(
    """and ceil eq floor ge gt is_finite le lt ne nextafter not optimization_barrier or real round sharding_constraint
    sign stop_gradient xor""".split()
)


def trace(function: Callable[..., Any], *args: Any) -> tuple[core.ClosedJaxpr, Any]:
    """Trace a function and inline the calls that hold contractions or pooling.

    Args:
      function: of pytrees of arrays.
      *args: its arguments, or their shapes.

    Returns:
      the jaxpr, whose remaining calls contain none of these or cannot be inlined, and in which no two scans share a
      body; and the tree of the outputs' `ShapeDtypeStruct`s.
    """
    closed, out_tree = jax.make_jaxpr(function, return_shape=True)(*args)
    if any(_inlinable(eqn) for eqn in closed.jaxpr.eqns):
        # Retraced, so that each call has its own body.
        closed = jax.make_jaxpr(lambda *leaves: evaluate(closed, leaves)[0])(*jax.tree.leaves(args))
    return closed, out_tree


def bind(eqn: core.JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Evaluate one equation unchanged."""
    params = eqn.primitive.get_bind_params(eqn.params)
    functions, params = params if isinstance(params, tuple) else ((), params)
    with eqn.ctx.manager:
        results = eqn.primitive.bind(*functions, *values, **params)
    return list(results) if eqn.primitive.multiple_results else [results]


Bind = Callable[[core.JaxprEqn, Sequence[Any]], list[Any]]


class Lazy:
    """A placeholder for an array that a `bind` may return and take. Loops and checkpointed calls get the array."""

    def array(self) -> Any:
        """Return the array."""
        raise NotImplementedError


def settled(values: Sequence[Any]) -> list[Any]:
    """Return the values as arrays."""
    return [value.array() if isinstance(value, Lazy) else value for value in values]


def evaluate(
    closed: core.ClosedJaxpr, args: Sequence[Any], keep: Collection[core.Var] = (), bind: Bind = bind
) -> tuple[list[Any], dict[core.Var, Any]]:
    """Evaluate a jaxpr, inlining calls that hold contractions or pooling.

    All other equations are evaluated unchanged, `custom_jvp` included, so that derivatives are unchanged. Checkpointed
    calls are still rematerialized, except for the values to keep. Scans stay scans; values to keep are stacked over
    passes, along a new leading axis.

    Args:
      closed: the jaxpr with its constants.
      args: a value for each input.
      keep: variables of the jaxpr, or of the bodies of its calls, whose values are also returned.
      bind: evaluates one equation that is not inlined, like the function of that name. It may return `Lazy` values.

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
        if eqn.primitive.name in _INLINED and _is_opened(eqn):
            results, inner = evaluate(_body(eqn), values, keep, bind)
            kept.update(inner)
        elif eqn.primitive.name in _REMAT and _is_opened(eqn):
            results, inner = _rematerialized(eqn, keep, bind)(*settled(values))
            kept.update(zip(_variables(_body(eqn), keep), inner, strict=True))
        elif eqn.primitive.name == "scan" and _is_opened(eqn):
            results, inner = _scanned(eqn, settled(values), keep, bind)
            kept.update(inner)
        else:
            results = bind(eqn, values)
        env.update(zip(eqn.outvars, results, strict=True))
    kept.update({var: env[var] for var in keep if var in env})
    return [read(atom) for atom in closed.jaxpr.outvars], kept


class Scan(NamedTuple):
    """The body of a scan, and values sorted into its inputs."""

    body: core.ClosedJaxpr
    consts: list[Any]
    carry: list[Any]
    xs: list[Any]


def scan_of(eqn: core.JaxprEqn, values: Sequence[Any]) -> Scan:
    """Sort values of a scan's operands into constants, carries and scanned inputs."""
    if "ft_in" in eqn.params:  # jax 0.11.2
        return Scan(eqn.params["jaxpr"], *map(list, eqn.params["ft_in"].update(values).unpack()))
    consts, carry = eqn.params["num_consts"], eqn.params["num_consts"] + eqn.params["num_carry"]
    return Scan(eqn.params["jaxpr"], list(values[:consts]), list(values[consts:carry]), list(values[carry:]))


def is_remat(eqn: core.JaxprEqn) -> bool:
    """Return whether an equation is a checkpointed call."""
    return eqn.primitive.name in _REMAT


def call_body(eqn: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """Return the jaxpr that a call-like equation runs once on exactly its operands, or None for any other."""
    if eqn.primitive.name in _INLINED | _REMAT | _CUSTOM:
        return _body(eqn)
    return None


def count_equations(jaxpr: core.Jaxpr) -> int:
    """Return the number of equations, including those in the bodies of calls, and those in scans as often as they
    run."""
    inner = (
        eqn.params.get("length", 1) * count_equations(body)
        for eqn in jaxpr.eqns
        for body in core.jaxprs_in_params(eqn.params)
    )
    return len(jaxpr.eqns) + sum(inner)


def holds(jaxpr: core.Jaxpr, names: Collection[str]) -> bool:
    """Return whether a primitive of one of these names occurs in a jaxpr, or in the body of a call or a loop in it."""
    return any(
        eqn.primitive.name in names or any(holds(body, names) for body in core.jaxprs_in_params(eqn.params))
        for eqn in jaxpr.eqns
    )


def live_equations(jaxpr: core.Jaxpr) -> list[core.JaxprEqn]:
    """Return the equations that the outputs depend on, in order."""
    live = {atom for atom in jaxpr.outvars if isinstance(atom, core.Var)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if live.intersection(eqn.outvars):
            kept.append(eqn)
            live.update(atom for atom in eqn.invars if isinstance(atom, core.Var))
    return kept[::-1]


def _rematerialized(
    eqn: core.JaxprEqn, keep: Collection[core.Var], bind: Bind
) -> Callable[..., tuple[list[Any], list[Any]]]:
    """Return the body of a checkpointed call, checkpointed, returning its outputs and the values to keep."""
    body = _body(eqn)

    def run(*args):
        outputs, kept = evaluate(body, args, keep, bind)
        return settled(outputs), [kept[var] for var in _variables(body, keep)]

    return jax.checkpoint(run, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])


def _scanned(
    eqn: core.JaxprEqn, values: Sequence[Any], keep: Collection[core.Var], bind: Bind
) -> tuple[list[Any], dict[core.Var, Any]]:
    """Return the outputs of a scan, and the values to keep of all its passes."""
    scan = scan_of(eqn, values)
    variables = _variables(scan.body, keep)

    def run(carry, x):
        outputs, kept = evaluate(scan.body, [*scan.consts, *carry, *x], keep, bind)
        outputs, count = settled(outputs), len(scan.carry)
        return outputs[:count], (outputs[count:], [kept[var] for var in variables])

    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    carry, (ys, kept) = jax.lax.scan(run, scan.carry, scan.xs, **options)
    return [*carry, *ys], dict(zip(variables, kept, strict=True))


def _variables(closed: core.ClosedJaxpr, among: Collection[core.Var]) -> list[core.Var]:
    """Return those variables that occur in a jaxpr or in the bodies of its calls."""
    if not among:
        return []
    found = {*closed.jaxpr.invars, *closed.jaxpr.constvars}
    for eqn in closed.jaxpr.eqns:
        found.update(eqn.outvars)
        if _inlinable(eqn):
            found.update(_variables(eqn.params["jaxpr"] if eqn.primitive.name == "scan" else _body(eqn), among))
    return [var for var in among if var in found]


def _body(eqn: core.JaxprEqn) -> core.ClosedJaxpr:
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    body = next(eqn.params[name] for name in names if name in eqn.params)
    return body if isinstance(body, core.ClosedJaxpr) else core.ClosedJaxpr(body, ())


def _is_opened(eqn: core.JaxprEqn) -> bool:
    """Return whether the body of a call contains contractions or pooling."""
    return any(holds(body, CONTRACTIONS | POOLING) for body in core.jaxprs_in_params(eqn.params))


def _inlinable(eqn: core.JaxprEqn) -> bool:
    return eqn.primitive.name in _INLINED | _REMAT | {"scan"} and _is_opened(eqn)
