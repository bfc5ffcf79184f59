"""Kernels with a low-rank change, applied in factors: `x (W + c A B)` as `x W + c (x A) B`."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from cbp_jax import jaxprs

# Primitives that make a view of a parameter, or change its type.
_VIEWS = frozenset(
    """reshape transpose squeeze expand_dims convert_element_type copy copy_p stop_gradient reduce_precision
    optimization_barrier""".split()
)
# Those that can be applied to each factor of a product instead.
_ALIKE = frozenset({"convert_element_type", "copy", "copy_p", "stop_gradient", "reduce_precision"})


def apply_in_factors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a network apply kernels `W + c A B` factor by factor.

    The product of A and B is as large as the kernel, and so is its gradient, even if A and B are small: a step that
    trains only A and B costs as much as one that trains W. Applied in factors, it costs a third less. And the columns
    of A compute activations, which are units like others: `cbp_jax.discover_units` does this automatically.

    Products of two leaves of the first argument, possibly reshaped, transposed or scaled, are applied in factors in
    dense layers, attention projections and convolutions that are not grouped. Elsewhere they are multiplied as before.

    Args:
      function: takes arrays or pytrees of arrays, the first of which holds the factors. Keyword arguments are not
        traced.

    Returns:
      a function of the same arguments with the same results within rounding.

    Example:
      >>> function = lambda params, x: x @ (params["W"] + 0.5 * params["A"] @ params["B"])
      >>> params = {"W": jnp.ones((8, 6)), "A": jnp.ones((8, 1)), "B": jnp.ones((1, 6))}
      >>> jaxpr = jax.make_jaxpr(apply_in_factors(function))(params, jnp.ones((2, 8)))
      >>> [eqn.outvars[0].aval.shape for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
      [(2, 6), (2, 1), (2, 6)]
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        closed, out_tree = jax.make_jaxpr(functools.partial(function, **kwargs), return_shape=True)(*args)
        leaves = jax.tree.leaves(args)
        count = len(jax.tree.leaves(args[:1]))
        if not multiplies_parameters(closed, count):
            return function(*args, **kwargs)
        return jax.tree.unflatten(jax.tree.structure(out_tree), evaluate(closed, leaves, count))

    return run


def multiplies_parameters(closed: core.ClosedJaxpr, count: int) -> bool:
    """Return whether the first `count` inputs of a jaxpr are multiplied with each other, like factors."""
    return _multiplies(closed.jaxpr, closed.jaxpr.invars[:count])


def evaluate(closed: core.ClosedJaxpr, args: Sequence[Any], count: int) -> list[Any]:
    """Evaluate a jaxpr, whose first `count` inputs are parameters, with kernels applied in factors."""
    wrapped = [_Parameter(arg, constant=number >= count) for number, arg in enumerate(args)]
    constants = [_Parameter(value, constant=True) for value in closed.consts]
    outputs, _ = jaxprs.evaluate(core.ClosedJaxpr(closed.jaxpr, constants), wrapped, bind=_bind)
    return jaxprs.settled(outputs)


@dataclasses.dataclass(frozen=True)
class _Parameter(jaxprs.Lazy):
    """A view of a parameter, or of something else: a kernel that is not trained, or data."""

    value: Any
    constant: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the array."""
        return jnp.shape(self.value)

    def array(self) -> Any:
        return self.value


@dataclasses.dataclass(frozen=True)
class _Term:
    """A low-rank matrix, `scale * left @ right`. Some of its axes come from `left` [..., rank], the others from `right`
    [rank, ...]."""

    left: Any
    right: Any
    left_places: tuple[int, ...]  # the matrix's axis for each of left's axes but the last
    right_places: tuple[int, ...]
    scale: Any
    options: dict[str, Any]  # precision of the product

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the matrix."""
        sizes = (*self.left.shape[:-1], *self.right.shape[1:])
        return tuple(sizes[place] for place in np.argsort((*self.left_places, *self.right_places)))

    def array(self) -> Any:
        product = jax.lax.dot_general(self.left, self.right, (((self.left.ndim - 1,), (0,)), ((), ())), **self.options)
        return self.scale * product.transpose(np.argsort((*self.left_places, *self.right_places)))

    def mapped(self, function: Callable[[Any], Any]) -> "_Term":
        return dataclasses.replace(self, left=function(self.left), right=function(self.right))


@dataclasses.dataclass(frozen=True)
class _Sum(jaxprs.Lazy):
    """A kernel, or None, and low-rank changes of it."""

    base: Any
    terms: tuple[_Term, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the array."""
        return self.terms[0].shape if self.terms else jnp.shape(self.base)

    def array(self) -> Any:
        arrays = [term.array() for term in self.terms]
        return sum(arrays[1:], arrays[0]) if self.base is None else sum(arrays, self.base)


def _bind(eqn: core.JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Evaluate an equation whose operands may be parameters or sums."""
    name = eqn.primitive.name
    sums = [place for place, value in enumerate(values) if isinstance(value, _Sum)]
    made = None
    if name == "dot_general" and all(map(_is_own, values)):
        made = _product(eqn, *(value.value for value in values))
    elif (place := _viewed(eqn)) is not None and isinstance(values[place], _Parameter):
        return [dataclasses.replace(values[place], value=jaxprs.bind(eqn, jaxprs.settled(values))[0])]
    elif name in jaxprs.CONTRACTIONS and len(sums) == 1:
        made = _contraction(eqn, values, sums[0])
    elif sums:
        made = _of_sums(eqn, values, sums)
    return jaxprs.bind(eqn, jaxprs.settled(values)) if made is None else [made]


def _viewed(eqn: core.JaxprEqn) -> int | None:
    """Return the position of the operand that an equation makes a view or a multiple of."""
    name, shapes = eqn.primitive.name, [jnp.shape(getattr(atom, "val", atom.aval)) for atom in eqn.invars]
    if len(shapes) == 1:
        return 0 if name in _VIEWS or name == "neg" else None
    if name == "mul" and () in shapes:
        return 1 - shapes.index(())
    return 0 if name == "div" and shapes[1] == () else None


def _is_own(value: Any) -> bool:
    return isinstance(value, _Parameter) and not value.constant


def _product(eqn: core.JaxprEqn, left: Any, right: Any) -> _Sum | None:
    """Multiply two parameters along one axis."""
    (left_axes, right_axes), batch = eqn.params["dimension_numbers"]
    if len(left_axes) != 1 or batch != ((), ()) or min(left.ndim, right.ndim) < 2:
        return None
    count = left.ndim - 1
    places = tuple(range(count)), tuple(range(count, count + right.ndim - 1))
    options = {name: eqn.params[name] for name in ("precision", "preferred_element_type")}
    left, right = jnp.moveaxis(left, left_axes[0], -1), jnp.moveaxis(right, right_axes[0], 0)
    return _Sum(None, (_Term(left, right, *places, 1.0, options),))


def _of_sums(eqn: core.JaxprEqn, values: Sequence[Any], sums: Sequence[int]) -> _Sum | None:
    """Return the output of an equation other than a product on sums, if it is a sum too."""
    name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
    first = values[sums[0]]
    if name in ("add", "add_any", "sub"):
        # An operand that is not a parameter, such as a broadcast bias, shows that these are activations.
        if not all(isinstance(value, _Parameter | _Sum) and value.shape == shape for value in values):
            return None
        a, b = (value if isinstance(value, _Sum) else _Sum(value.value, ()) for value in values)
        b = _scaled(b, -1.0) if name == "sub" else b
        bases = [one.base for one in (a, b) if one.base is not None]
        return _Sum(sum(bases[1:], bases[0]) if bases else None, a.terms + b.terms)
    if name == "neg":
        return _scaled(first, -1.0)
    if name in ("mul", "div") and len(sums) == 1 and (name == "mul" or sums[0] == 0):
        (other,) = jaxprs.settled([values[1 - sums[0]]])
        if jnp.ndim(other) == 0:
            return _scaled(first, other if name == "mul" else 1 / other)
    if name == "transpose":
        order = eqn.params["permutation"]
        base = None if first.base is None else first.base.transpose(order)
        return _Sum(base, tuple(_moved(term, order.index) for term in first.terms))
    if name in _ALIKE:
        same = lambda array: jaxprs.bind(eqn, [array])[0]
        return _Sum(None if first.base is None else same(first.base), tuple(term.mapped(same) for term in first.terms))
    return None


def _scaled(value: _Sum, factor: Any) -> _Sum:
    terms = tuple(dataclasses.replace(term, scale=factor * term.scale) for term in value.terms)
    return _Sum(None if value.base is None else factor * value.base, terms)


def _moved(term: _Term, to: Callable[[int], int]) -> _Term:
    left, right = (tuple(map(to, places)) for places in (term.left_places, term.right_places))
    return dataclasses.replace(term, left_places=left, right_places=right)


def _contraction(eqn: core.JaxprEqn, values: Sequence[Any], kernel: int) -> Any:
    """Apply a kernel, and its low-rank changes, each in two steps."""
    value, (operand,) = values[kernel], jaxprs.settled([values[1 - kernel]])
    if value.base is None or _is_own(values[1 - kernel]):  # computed from parameters only: these are activations
        return None
    pair = (operand, value.base) if kernel == 1 else (value.base, operand)
    apply = _convolved if eqn.primitive.name == "conv_general_dilated" else _contracted
    out = jaxprs.bind(eqn, pair)[0]  # first, since units are named by the first kernel that writes them
    for term in value.terms:
        part = apply(eqn, term, operand, kernel)
        if part is None:
            return None
        out = out + part
    return out


def _contracted(eqn: core.JaxprEqn, term: _Term, operand: Any, kernel: int) -> Any:
    """Multiply a low-rank matrix with activations, and sum over all axes of one of its factors."""
    contracted, batch = eqn.params["dimension_numbers"]
    if batch != ((), ()):
        return None
    inside, others = contracted[kernel], contracted[1 - kernel]
    if set(inside) == set(term.left_places):
        first, places, then, made = term.left, term.left_places, term.right, term.right_places
    elif set(inside) == set(term.right_places):
        first, places = jnp.moveaxis(term.right, 0, -1), term.right_places
        then, made = jnp.moveaxis(term.left, -1, 0), term.left_places
    else:
        return None
    options = {name: eqn.params[name] for name in ("precision", "preferred_element_type")}
    axes = tuple(places.index(axis) for axis in inside)
    # All batch axes as one. With several, XLA recomputes derivatives in another layout, on one thread.
    rest = [axis for axis in range(operand.ndim) if axis not in others]
    sizes = [operand.shape[axis] for axis in rest]
    rows = operand.transpose(*rest, *others).reshape(-1, *(operand.shape[axis] for axis in others))
    hidden = jax.lax.dot_general(rows, first, ((tuple(range(1, rows.ndim)), axes), ((), ())), **options)
    then = then.transpose(0, *(1 + place for place in np.argsort(made)))
    out = jax.lax.dot_general(_times(term.scale, hidden), then, (((1,), (0,)), ((), ())), **options)
    out = out.reshape(*sizes, *out.shape[1:])
    if kernel == 0:  # its axes come first
        out = out.transpose(*range(len(sizes), out.ndim), *range(len(sizes)))
    return out


def _convolved(eqn: core.JaxprEqn, term: _Term, image: Any, kernel: int) -> Any:
    """Convolve to as many channels as the rank, and multiply these with the other factor."""
    params = eqn.params
    spec = params["dimension_numbers"]
    out_axis, *inside = spec.rhs_spec
    plain = params["feature_group_count"] == params["batch_group_count"] == 1
    if kernel != 1 or not plain or set(term.right_places) != {out_axis} or set(term.left_places) != set(inside):
        return None
    first = term.left.transpose(*np.argsort(term.left_places), term.left.ndim - 1)  # the kernel's axes, rank last
    (hidden,) = jaxprs.bind(eqn, (image, jnp.moveaxis(first, -1, out_axis)))
    channels = spec.out_spec[1]
    options = {name: params[name] for name in ("preferred_element_type",)}
    precision = params["precision"]
    out = jax.lax.dot_general(
        _times(term.scale, hidden), term.right, (((channels,), (0,)), ((), ())), precision=precision, **options
    )
    return jnp.moveaxis(out, -1, channels)


def _times(scale: Any, array: Any) -> Any:
    return array if isinstance(scale, float) and scale == 1 else (scale * array).astype(array.dtype)


def _multiplies(jaxpr: core.Jaxpr, parameters: Sequence[core.Var]) -> bool:
    known = set(parameters)
    for eqn in jaxpr.eqns:
        own = [isinstance(atom, core.Var) and atom in known for atom in eqn.invars]
        if eqn.primitive.name == "dot_general" and all(own):
            return True
        place = _viewed(eqn)
        if place is not None and own[place]:
            known.update(eqn.outvars)
        body = jaxprs.call_body(eqn) if any(own) else None
        if body is not None and len(body.jaxpr.invars) == len(own):
            if _multiplies(body.jaxpr, [var for var, mine in zip(body.jaxpr.invars, own, strict=True) if mine]):
                return True
    return False
