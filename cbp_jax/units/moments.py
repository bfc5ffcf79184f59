"""Recognizes sums over units that are used for normalization.

A sum over units mixes them: everything computed from it depends on all of them. Units can still be replaced one by one
if the sum is only used for their own normalization, which has one of the forms

- `x - mean(x)`,
- `x / root`, `x * (1 / root)`, where the root is of a mean or sum of `x**2` or of `(x - mean(x))**2`, to which small
  numbers are added or which they bound from below.

Any other use of the sum, such as a softmax, is not a normalization. Therefore each array has a `Form`, which tells
whether two arrays hold the same values, or the same values with the mean subtracted; and each sum over units is a
`Statistic`, which records what was computed from it.
"""

import dataclasses
import enum
from collections.abc import Sequence

import numpy as np
from jax.extend import core

# Elementwise primitives that do not change values.
UNCHANGED = frozenset(
    "convert_element_type copy copy_p name optimization_barrier real reduce_precision stop_gradient".split()
)
_COMPARISONS = frozenset("eq ge gt le lt ne".split())
_TOLERANCE = 1e-2  # relative, for 1 / N, which may be in half precision


@dataclasses.dataclass(frozen=True)
class Form:
    """What is known about the values of an array, to recognize arrays with the same values.

    Attributes:
      origin: the same object for arrays that hold the same values, perhaps in another order or shape.
      power: which power of the values the array holds, 1 or 2.
      centered: whether their mean is subtracted from them first.
      multiple_of: the form of an array that this array is a multiple of, element by element.
    """

    origin: object = dataclasses.field(default_factory=object)
    power: int = 1
    centered: bool = False
    multiple_of: "Form | None" = dataclasses.field(default=None, compare=False)

    def multiple(self) -> "Form":
        """Return the form of this array times something."""
        return Form(multiple_of=self)

    def squared(self) -> "Form":
        """Return the form of the square."""
        return dataclasses.replace(self, power=2, multiple_of=None) if self.power == 1 else Form()

    def normalized_by(self, other: "Form") -> bool:
        """Return whether an array of this form has the other's values, possibly centered or multiplied."""
        form: Form | None = self
        while form is not None:
            if form.power == 1 and form.origin is other.origin:
                return True
            form = form.multiple_of
        return False


class Kind(enum.Enum):
    """What was computed from a sum over units."""

    SUM = "a multiple of the sum"
    SQUARES = "a multiple of the sum of squares, or the variance"
    SQUARED_MEAN = "a multiple of the square of the sum"
    ROOT = "the root of a sum of squares"
    INVERSE = "one over such a root"
    TEST = "a comparison of a sum of squares, or its root, with a number"
    OTHER = "anything else"


@dataclasses.dataclass(frozen=True, eq=False)
class Statistic:
    """A value computed from a sum over units.

    Attributes:
      kind: what it is now.
      form: the form of the array that was summed, to the first power.
      scale: the value divided by the mean; for kinds SUM, SQUARES and SQUARED_MEAN.
      sets: for each element, the number of the set of units that was summed; broadcastable to the array's shape.
      members: the units of each set.
      sources: the variables that hold the sums.
    """

    kind: Kind
    form: Form
    scale: float
    sets: np.ndarray
    members: tuple[np.ndarray, ...]
    sources: tuple[core.Var, ...]

    def same(self, other: "Statistic") -> bool:
        """Return whether two statistics are of the same array, summed over the same sets."""
        return (
            self.form == other.form
            and self.sets.shape == other.sets.shape
            and np.array_equal(self.sets, other.sets)
            and len(self.members) == len(other.members)
            and all(map(np.array_equal, self.members, other.members))
        )

    def is_one(self) -> bool:
        """Return whether it is the mean itself, not a multiple."""
        return abs(self.scale - 1.0) < _TOLERANCE


def of_sum(eqn: core.JaxprEqn, ids: np.ndarray, form: Form) -> Statistic:
    """Return the statistic that `reduce_sum` over units computes from an array with these labels and form."""
    (operand,), axes = eqn.invars, tuple(eqn.params["axes"])
    kept = [axis for axis in range(ids.ndim) if axis not in axes]
    rows = ids.transpose(*kept, *axes).reshape(*(ids.shape[axis] for axis in kept), -1)
    known: dict[bytes, int] = {}
    members, numbers = [], []
    for row in rows.reshape(-1, rows.shape[-1]):
        found = np.unique(row)
        if found.tobytes() not in known:
            known[found.tobytes()] = len(members)
            members.append(found[found >= 0])
        numbers.append(known[found.tobytes()])
    count = float(np.prod([operand.aval.shape[axis] for axis in axes]))
    kind = Kind.SUM if form.power == 1 else Kind.SQUARES
    base = dataclasses.replace(form, power=1)
    return Statistic(kind, base, count, np.reshape(numbers, rows.shape[:-1]), tuple(members), (eqn.outvars[0],))


def combine(
    eqn: core.JaxprEqn,
    statistics: Sequence[Statistic | None],
    numbers: Sequence[float | None],
) -> Statistic | None:
    """Return the statistic that an elementwise equation computes; None if its output is not a statistic.

    The operands are statistics, and values that belong to no unit.

    Args:
      eqn: the equation.
      statistics: the statistic of each operand, or None.
      numbers: for each operand whose entries are all one number, this number.
    """
    known = [item for item in statistics if item is not None]
    if not known:
        return None
    kind, scale = _combined(eqn, statistics, numbers)
    mixed = _mixed(known, eqn.outvars[0].aval.ndim)
    return mixed if kind is Kind.OTHER else dataclasses.replace(known[0], kind=kind, scale=scale, sources=mixed.sources)


def rearrange(eqn: core.JaxprEqn, statistics: Sequence[Statistic], sets: np.ndarray | None) -> Statistic | None:
    """Return the statistic that an equation computes if it is not elementwise.

    Args:
      eqn: the equation.
      statistics: the statistics among its operands.
      sets: the numbers of the sets in its output; None if it does more than rearrange a single statistic.
    """
    if not statistics:
        return None
    (first, *more), ndim = statistics, eqn.outvars[0].aval.ndim
    if not more and sets is not None:
        return dataclasses.replace(first, sets=sets)
    return _mixed(statistics, ndim)


def _mixed(statistics: Sequence[Statistic], ndim: int) -> Statistic:
    """Return a statistic of kind `OTHER`, whose elements depend on the sets of units in unknown ways."""
    members = tuple(units for item in statistics for units in item.members)
    sources = tuple(dict.fromkeys(var for item in statistics for var in item.sources))
    return Statistic(Kind.OTHER, Form(), 1.0, np.zeros((1,) * ndim, int), members, sources)


def _combined(eqn, statistics, numbers) -> tuple[Kind, float]:
    """Return the kind and the scale of an equation's output."""
    name, other = eqn.primitive.name, (Kind.OTHER, 1.0)
    places = [n for n, item in enumerate(statistics) if item is not None]
    item, place = statistics[places[0]], places[0]
    kind, scale = item.kind, item.scale
    if kind is Kind.OTHER or any(not item.same(statistics[n]) for n in places[1:] if name != "sub"):
        return other
    if name in UNCHANGED:
        return kind, scale
    if name == "select_n":  # a root that must not be 0
        cases = [statistics[n].kind for n in places if n > 0]
        tested = places[0] == 0 and kind is Kind.TEST
        fixed = all(numbers[n] is not None for n in range(1, len(numbers)) if statistics[n] is None)
        alike = len(set(cases)) == 1 and cases[0] in (Kind.SQUARES, Kind.ROOT, Kind.INVERSE)
        return (cases[0], 1.0) if fixed and alike and (tested or statistics[0] is None) else other
    if len(places) == 2:
        a, b = (statistics[n] for n in places)
        if name == "mul" and a.kind is b.kind is Kind.SUM:
            return Kind.SQUARED_MEAN, a.scale * b.scale
        if name == "sub" and a.kind is Kind.SQUARES and b.kind is Kind.SQUARED_MEAN:
            variance = a.same(b) and a.is_one() and b.is_one() and not a.form.centered
            return (Kind.SQUARES, 1.0) if variance else other
        return other
    rest = [n for n in range(len(numbers)) if n != place]
    number = numbers[rest[0]] if rest else None
    if name == "square" or (name == "integer_pow" and eqn.params["y"] == 2) or (name == "pow" and number == 2):
        return (Kind.SQUARED_MEAN, scale**2) if kind is Kind.SUM else other
    power = {"sqrt": 0.5, "rsqrt": -0.5}.get(name)
    if name == "pow" and place == 0:
        power = number
    if name == "integer_pow":
        power = eqn.params["y"]
    if power is not None:
        made = {(Kind.SQUARES, 0.5): Kind.ROOT, (Kind.SQUARES, -0.5): Kind.INVERSE, (Kind.ROOT, -1): Kind.INVERSE}
        return made.get((kind, power), Kind.OTHER), 1.0
    if name == "neg":
        return (kind, -scale) if kind is Kind.SUM else other
    if name in ("mul", "div"):
        if name == "div" and place == 1:
            return (Kind.INVERSE, 1.0) if kind is Kind.ROOT else other
        if number is not None and number != 0 and (number > 0 or kind is Kind.SUM) and kind is not Kind.TEST:
            return kind, scale * number if name == "mul" else scale / number
        return (kind, 1.0) if kind is Kind.INVERSE else other  # x * (inverse * scale) is (x * inverse) * scale
    bounded = kind in (Kind.SQUARES, Kind.ROOT) and all(numbers[n] is not None for n in rest)
    if name in ("add", "add_any", "max") and bounded and number >= 0:
        return kind, scale
    if name == "clamp" and bounded and place == 1:
        return kind, scale
    if name in _COMPARISONS and bounded:
        return Kind.TEST, 1.0
    return other


def normalizes(eqn: core.JaxprEqn, position: int, statistic: Statistic, form: Form) -> bool:
    """Return whether an equation with a statistic at `position` normalizes an array of this form by it."""
    name, kind = eqn.primitive.name, statistic.kind
    if kind is Kind.SUM:
        sign = {"sub": 1.0 if position == 1 else 0.0, "add": -1.0, "add_any": -1.0}.get(name, 0.0)
        mean = dataclasses.replace(statistic, scale=sign * statistic.scale).is_one()
        return mean and form == statistic.form
    divides = kind is Kind.INVERSE if name == "mul" else kind is Kind.ROOT and name == "div" and position == 1
    return divides and form.normalized_by(statistic.form)


def form_of(
    eqn: core.JaxprEqn,
    forms: Sequence[Form | None],
    statistics: Sequence[Statistic | None],
    numbers: Sequence[float | None],
) -> Form:
    """Return the form of the output of an elementwise equation, some of whose operands are labeled.

    Args:
      eqn: the equation.
      forms: the form of each operand, None if it has no labels.
      statistics: the statistic of each operand, or None.
      numbers: for each operand whose entries are all one number, this number.
    """
    name, found = eqn.primitive.name, [form for form in forms if form is not None]
    form = found[0]
    if len(found) == 2:
        return form.squared() if name == "mul" and found[0] == found[1] else Form()
    if len(found) > 2:
        return Form()
    if name in UNCHANGED or (name in ("add", "sub") and 0.0 in numbers[forms[0] is not None :]):
        return form
    if name == "square" or (name == "integer_pow" and eqn.params["y"] == 2) or (name == "pow" and numbers[1] == 2):
        return form.squared()
    mixing = [(n, item) for n, item in enumerate(statistics) if item is not None]
    if mixing:
        (position, statistic), *more = mixing
        if not more and statistic.kind is Kind.SUM and normalizes(eqn, position, statistic, form):
            return dataclasses.replace(form, centered=True, multiple_of=None)
        return Form()
    if name in ("mul", "neg") or (name == "div" and forms[0] is not None):
        return form.multiple()
    return Form()
