"""What is known about arrays during the walk: which units their elements belong to."""

import dataclasses
import enum
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from cbp_jax.units import moments


class LeftOutKind(enum.Enum):
    """Why the units of a layer cannot be replaced."""

    OUTPUT = "part of the network's output"
    LOOP = "inside a loop, whose computation cannot be seen from outside"
    NOT_FOLLOWED = "met by an operation that is not understood"
    MIXED = "summed with other units in a way that is not a normalization"
    SHARED = "with weights that are used in more than one way, or shared with values that are not units"
    NOT_READ = "read by no kernel"
    REFUTED = "found to change the output while its outgoing weights are 0"
    NOT_SELECTED = "not selected by the caller"


class Reason(NamedTuple):
    """Why units are left out: the kind, and an explanation in words."""

    kind: LeftOutKind
    text: str


class Index(NamedTuple):
    """An axis of a leaf that a scan indexes: the pass, and the nesting depth of the scan."""

    axis: int
    number: int
    depth: int


@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter, possibly cast, scaled, transposed or broadcast.

    Attributes:
      path: the leaf.
      axes: for each axis, the leaf's axis, or None.
      plain: whether it is not scaled.
      fixed: for a slice of a stacked array, as for the layers of a scan, the leaf's axes that are indexed.
      state: whether it is part of the network's state, such as running statistics, instead of a parameter.
      steps: elementwise equations with scalars that were applied to it, each with its operand position.
    """

    path: str
    axes: tuple[int | None, ...]
    plain: bool = True
    fixed: tuple["Index", ...] = ()
    state: bool = False
    steps: tuple[tuple[core.JaxprEqn, int], ...] = ()

    def identity(self) -> float:
        """Return the value of the leaf, 0 or 1, at which the value computed from it is 1; by default 1."""
        with jax.ensure_compile_time_eval():
            for value in (1.0, 0.0):
                made = value
                for eqn, position in self.steps:
                    operands = [made if n == position else atom.val for n, atom in enumerate(eqn.invars)]
                    made = eqn.primitive.bind(*(np.asarray(operand, np.float32) for operand in operands), **eqn.params)
                if np.isclose(float(made), 1.0, rtol=1e-3):
                    return value
        return 1.0


@dataclasses.dataclass(frozen=True)
class Joined:
    """Concatenated parameters, such as the kernels of a cell's gates.

    Attributes:
      parts: the parameters.
      sizes: the length of each along the axis.
      axis: the axis along which they are concatenated.
    """

    parts: tuple[Weight, ...]
    sizes: tuple[int, ...]
    axis: int

    def split(self, ids: np.ndarray) -> list[np.ndarray]:
        """Split labels that broadcast to an array of this shape into those of each parameter."""
        cuts = np.cumsum(self.sizes)
        whole = np.broadcast_to(ids, (*ids.shape[: self.axis], cuts[-1], *ids.shape[self.axis + 1 :]))
        return np.split(whole, cuts[:-1], self.axis)


@dataclasses.dataclass(frozen=True, eq=False)
class Vector:
    """An elementwise function of parameters, constants and a statistic that mixes units; it belongs to no unit.

    Attributes:
      parts: the parameters, each with its axes.
      statistic: the statistic among its operands, computed from a sum over units, or None.
    """

    parts: tuple[Weight, ...] = ()
    statistic: moments.Statistic | None = None


@dataclasses.dataclass(frozen=True)
class Derived:
    """A value computed from parameters alone in ways that are not followed."""

    paths: frozenset[str]


@dataclasses.dataclass(frozen=True, eq=False)
class Labels:
    """Units of an array's elements.

    Attributes:
      ids: numbers of units, broadcastable to the array's shape; -1 where an element belongs to no unit.
      reduced: whether it is a sum over batch or positions.
      running: the running statistics that it updates, or "".
      joined: axes along which arrays were concatenated whose units do not differ along the axis, such as a class token
        and patches. A sum over such an axis is not a sum over units.
      form: identifies arrays that hold the same values.
    """

    ids: np.ndarray
    reduced: bool = False
    running: str = ""
    joined: frozenset[int] = frozenset()
    form: moments.Form = dataclasses.field(default_factory=moments.Form)


@dataclasses.dataclass
class Contraction:
    """A kernel applied to an array.

    Attributes:
      path: the kernel.
      in_axes: the kernel's axes that enumerate the rows that read units. (Those that are summed over; in a batched
        product, as in an ensemble, also the batch axes; in a grouped convolution also the output axis, since a channel
        is read only by its own group's outputs; and those that scans index.)
      out_axes: the kernel's axes that appear in the output.
      operand: the array it is applied to.
      operand_axes: the axes of that array that are summed over, or batched.
      operand_rows: for each row of `in_axes`, the element of `operand_axes` that it reads, or -1; None if they
        correspond.
      labels: the units that the rows read, [in_axes...], or None.
      out_places: the output's axes that correspond to `out_axes`.
      plain: whether the kernel is applied as it is, not scaled.
      fixed: the kernel's axes that scans index.
      passes: for each enclosing scan, the pass in which it is applied; None for all passes.
      bias: path of a parameter that is added to the output unscaled, and the kernel's axes that correspond to its axes.
      absorbed: whether the output's mean over batch and positions is subtracted from it.
    """

    path: str
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    operand: core.Var
    operand_axes: tuple[int, ...]
    operand_rows: np.ndarray | None
    labels: np.ndarray | None
    out_places: tuple[int, ...]
    plain: bool
    fixed: tuple[Index, ...] = ()
    passes: tuple[int | None, ...] = ()
    bias: tuple[str, tuple[int, ...]] | None = None
    absorbed: bool = False

    def reads(self, index: np.ndarray) -> bool:
        """Return whether it applies these rows of its kernel, which may be a slice of a stacked array."""
        return self.operand_rows is None or bool((self.operand_rows[index] >= 0).all())


def as_vector(value: Weight | Vector, ndim: int) -> Vector:
    """Return a parameter as a vector on an array of `ndim` axes; None for a scalar."""
    if isinstance(value, Weight):
        value = Vector((value,))
    fitting = (
        part if len(part.axes) == ndim else dataclasses.replace(part, axes=(None,) * ndim) for part in value.parts
    )
    return dataclasses.replace(value, parts=tuple(fitting))


def statistics_of(values: list[Any]) -> list[moments.Statistic | None]:
    """Return the statistics among values."""
    return [value.statistic if isinstance(value, Vector) else None for value in values]


def paths_of(values: list[Any]) -> frozenset[str]:
    """Return the paths of the parameters among values, or from which they were computed."""
    paths: set[str] = set()
    for value in values:
        if isinstance(value, Weight):
            paths.add(value.path)
        elif isinstance(value, Vector | Joined):
            paths.update(part.path for part in value.parts)
        elif isinstance(value, Derived):
            paths.update(value.paths)
    return frozenset(paths)


class UnionFind:
    """Numbers that can be merged into sets (union-find). The smallest number represents its set."""

    def __init__(self):
        self._parent = np.zeros(0, np.int64)
        self._count = 0
        self.changes = 0  # how often something new was found

    def new(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return new numbers."""
        start, self._count = self._count, self._count + int(np.prod(shape))
        self.changes += 1
        if self._count > self._parent.size:
            more = max(self._count, 2 * self._parent.size)
            self._parent = np.concatenate([self._parent, np.arange(self._parent.size, more)])
        return np.arange(start, self._count).reshape(shape)

    def roots(self, ids: np.ndarray) -> np.ndarray:
        """Return the representative of each number; -1 for -1."""
        found = np.where(ids >= 0, self._parent[ids], -1) if self._count else ids
        while True:
            above = np.where(found >= 0, self._parent[found], -1) if self._count else found
            if np.array_equal(above, found):
                return found
            found = above

    def union(self, a: np.ndarray, b: np.ndarray) -> None:
        """Merge numbers at the same position, unless one is -1."""
        a, b = np.broadcast_arrays(a, b)
        keep = (a != b) & (a >= 0) & (b >= 0)
        a, b = a[keep], b[keep]
        while a.size:
            a, b = self.roots(a), self.roots(b)
            differ = a != b
            a, b = a[differ], b[differ]
            self.changes += a.size
            # If a root is paired with several smaller numbers, the smallest becomes its parent. The next round handles
            # the others.
            np.minimum.at(self._parent, np.maximum(a, b), np.minimum(a, b))

    def __len__(self) -> int:
        return self._count
