"""Evaluates a network to find groups that are wrong.

This catches errors in any rule of the walk: while the outgoing weights of a unit are 0, its incoming weights must not
change the network's output. Groups that act through a normalization are checked with its statistics held fixed.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from cbp_jax import jaxprs
from cbp_jax.units import groups, tracing

# Networks up to this size are checked by default: equations, and numbers in inputs and constants.
_CHEAP_EQUATIONS, _CHEAP_NUMBERS = 400, 2**20
# Compiled once and run a few times.
_QUICK = {"xla_backend_optimization_level": 0}
_DRAWS = 4


def is_cheap(closed: core.ClosedJaxpr) -> bool:
    """Return whether checking a network takes only a moment."""
    numbers = sum(math.prod(getattr(value, "shape", ())) for value in (*closed.in_avals, *closed.consts))
    return numbers <= _CHEAP_NUMBERS and jaxprs.count_equations(closed.jaxpr) <= _CHEAP_EQUATIONS


def refuted(
    trace: tracing.Trace,
    inputs: Sequence[Any],
    found: Sequence[groups.UnitGroup],
    frozen: Collection[core.Var],
    checked: Sequence[bool],
) -> set[str]:
    """Return the names of groups whose units act on the output although their outgoing weights are 0.

    Args:
      trace: the network.
      inputs: a leaf for each of its arguments. Integers and keys are used as they are, if they are arrays.
      found: the groups of the network.
      frozen: the variables that hold the sums by which units are normalized together.
      checked: for each output, whether it must stay the same; running statistics may change.

    Returns:
      names; none if the outputs are not finite, since nothing can be concluded then.
    """
    if any(isinstance(const, jax.core.Tracer) for const in trace.jaxpr.consts):
        return set()
    with jax.ensure_compile_time_eval():
        return _Check(trace, inputs, frozen, checked).refuted(found)


class _Check:
    """The network, compiled to be run with other parameters."""

    def __init__(
        self, trace: tracing.Trace, inputs: Sequence[Any], frozen: Collection[core.Var], checked: Sequence[bool]
    ):
        self.rng = np.random.default_rng(0)
        self.trace, self.inputs, self.checked = trace, inputs, checked
        self.frozen = frozenset(frozen)
        self.run = jax.jit(lambda leaves: self.evaluate(leaves, None), compiler_options=_QUICK)
        self.run_held = (
            jax.jit(self.evaluate, compiler_options=_QUICK) if frozen else lambda leaves, _: self.run(leaves)
        )

    def evaluate(self, leaves: list[Any], held: list[Any] | None) -> tuple[list[Any], list[Any]]:
        """Return the outputs that are checked, and the sums in order of evaluation; the sums are those in `held` if
        given."""
        sums: list[Any] = []
        outputs = _evaluate(self.trace.jaxpr, leaves, self.frozen, sums, None if held is None else iter(held))
        return [output for output, keep in zip(outputs, self.checked, strict=True) if keep], sums

    def refuted(self, found: Sequence[groups.UnitGroup]) -> set[str]:
        """Return the names of the groups that fail."""
        wrong: set[str] = set()
        exact = [group for group in found if group.exact]
        for draw in range(_DRAWS):
            leaves = self.draw()
            if draw % 2 == 0:  # half of the units, then the other half: any effect of one unit on another shows once
                orders = {group.name: self.rng.permutation(group.size) for group in found}
            half = slice(None, None, -1) if draw % 2 else slice(None)
            chosen = {name: order[half][: (order.size + 1) // 2] for name, order in orders.items()}
            # All groups at once, and one by one only if an output changes.
            held = bool(self.frozen)
            if not self.silent(leaves, found, chosen, held):
                wrong |= {group.name for group in found if not self.silent(leaves, [group], chosen, held)}
            if self.frozen and not self.silent(leaves, exact, chosen, held=False):
                wrong |= {group.name for group in exact if not self.silent(leaves, [group], chosen, held=False)}
        return wrong

    def silent(
        self, leaves: list[Any], found: Iterable[groups.UnitGroup], chosen: dict[str, np.ndarray], held: bool
    ) -> bool:
        """Return whether chosen units of groups, with outgoing weights 0, leave the output unchanged."""
        paths, states = self.trace.param_paths, self.trace.states
        invars = enumerate(self.trace.jaxpr.jaxpr.invars)
        number = {paths[var]: n for n, var in invars if var in paths and var not in states}
        redrawn = {n: np.zeros(np.shape(leaf), bool) for n, leaf in enumerate(leaves)}
        removed = {n: np.zeros(np.shape(leaf), bool) for n, leaf in enumerate(leaves)}
        for group in found:
            for masks, parts in (
                (redrawn, (*group.incoming, *group.biases, *group.scales)),
                (removed, [consumer.kernel for consumer in group.outgoing]),
            ):
                for part in parts:
                    mask = masks[number[part.path]]
                    mask |= _entries(part, chosen[group.name], mask)
        before = [np.where(removed[n], 0, leaf) if removed[n].any() else leaf for n, leaf in enumerate(leaves)]
        after = [
            np.where(redrawn[n] & ~removed[n], self.like(before[n]), before[n]).astype(before[n].dtype)
            if redrawn[n].any()
            else before[n]
            for n in range(len(leaves))
        ]
        outputs, sums = self.run(before)
        if held:
            (outputs, _), (others, _) = self.run_held(before, sums), self.run_held(after, sums)
        else:
            others, _ = self.run(after)
        floats = [np.asarray(a, np.float64) for a in outputs if jnp.issubdtype(a.dtype, jnp.floating)]
        if not all(np.isfinite(array).all() for array in floats):
            return True
        return all(np.array_equal(a, b) for a, b in zip(outputs, others, strict=True) if not _is_key(a))

    def like(self, leaf: np.ndarray) -> np.ndarray:
        """Return random numbers of the same shape as a leaf."""
        if leaf.ndim < 2:
            return self.rng.uniform(0.5, 1.5, leaf.shape)
        return self.rng.normal(size=leaf.shape) / math.sqrt(math.prod(leaf.shape[:-1]))

    def draw(self) -> list[Any]:
        """Draw random arguments: parameters and state of ordinary size, and data."""
        leaves = []
        for var, given in zip(self.trace.jaxpr.jaxpr.invars, self.inputs, strict=True):
            aval = var.aval
            known = not isinstance(given, jax.ShapeDtypeStruct | jax.core.Tracer)
            if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
                leaves.append(given if known else jax.random.split(jax.random.key(0), aval.shape))
            elif jnp.issubdtype(aval.dtype, jnp.floating):
                named = var in self.trace.param_paths
                array = np.zeros(aval.shape)
                values = self.like(array) if named else self.rng.normal(size=aval.shape)
                leaves.append(values.astype(aval.dtype))
            else:
                leaves.append(np.asarray(given) if known else np.zeros(aval.shape, aval.dtype))
        return leaves


def _entries(part: groups.ParamSlice, units: np.ndarray, array: np.ndarray) -> np.ndarray:
    """Return the entries of an array that belong to units: a mask that broadcasts to it. (NumPy need not compile.)"""
    rows = np.zeros(part.rows, bool)
    rows[part.index[:, units]] = True
    mask = rows.reshape([array.shape[axis] for axis in part.axes]).transpose(np.argsort(part.axes))
    return mask.reshape([size if axis in part.axes else 1 for axis, size in enumerate(array.shape)])


def _evaluate(
    closed: core.ClosedJaxpr,
    args: Sequence[Any],
    frozen: Collection[core.Var],
    sums: list[Any],
    held: Iterator[Any] | None,
) -> list[Any]:
    """Evaluate a jaxpr and all calls in it; note the values of `frozen` in `sums`, and take them from `held`."""
    env: dict[core.Var, Any] = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    env.update(zip(closed.jaxpr.invars, args, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    for eqn in closed.jaxpr.eqns:
        values, body = [read(atom) for atom in eqn.invars], jaxprs.call_body(eqn)
        if body is not None:
            results = _evaluate(body, values, frozen, sums, held)
        elif eqn.primitive.name == "scan" and frozen:
            results = _unrolled(eqn, values, frozen, sums, held)
        else:
            results = jaxprs.bind(eqn, values)
        for var, value in zip(eqn.outvars, results, strict=True):
            if var in frozen:
                sums.append(value)
                value = value if held is None else next(held)
            env[var] = value
    return [read(atom) for atom in closed.jaxpr.outvars]


def _unrolled(
    eqn: core.JaxprEqn,
    values: Sequence[Any],
    frozen: Collection[core.Var],
    sums: list[Any],
    held: Iterator[Any] | None,
) -> list[Any]:
    """Evaluate a scan pass by pass, and return its outputs."""
    scan, ys = jaxprs.scan_of(eqn, values), []
    carry = scan.carry
    for number in range(eqn.params["length"])[:: -1 if eqn.params["reverse"] else 1]:
        results = _evaluate(scan.body, [*scan.consts, *carry, *(x[number] for x in scan.xs)], frozen, sums, held)
        carry, made = results[: len(carry)], results[len(carry) :]
        ys.append(made)
    if eqn.params["reverse"]:
        ys.reverse()
    return [*carry, *(jnp.stack(made) for made in zip(*ys, strict=True))]


def _is_key(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
