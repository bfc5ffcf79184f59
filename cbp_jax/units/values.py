"""What is known about an array while a network is walked: which units its elements belong to."""

import dataclasses
import enum
from typing import NamedTuple

import jax
import numpy as np
from jax.extend import core

from cbp_jax.units import moments


class LeftOutKind(enum.Enum):
    """Why the units of a layer cannot be replaced."""

    OUTPUT = "part of the network's output"
    LOOP = "inside of a loop, which cannot be seen into"
    NOT_FOLLOWED = "met by an operation that is not understood"
    MIXED = "summed with other units in a way that is no normalization"
    SHARED = "of weights that are used in more than one way, or shared with what are no units"
    NOT_READ = "read by no kernel"
    REFUTED = "seen to act on the output past its outgoing weights"
    NOT_SELECTED = "not selected by the caller"


class Reason(NamedTuple):
    """Why units are left out: the kind, and what is said of it."""

    kind: LeftOutKind
    text: str


class Index(NamedTuple):
    """An axis of a leaf that a scan indexes: the pass, and how many scans stand around this one."""

    axis: int
    number: int
    depth: int


@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter, perhaps cast, scaled, transposed or broadcast.

    Attributes:
      path: the leaf.
      axes: the leaf's axis behind each axis, None where there is none.
      plain: whether it is not scaled.
      fixed: where it is one of several that are stacked, as layers are for a scan, the leaf's axes that are indexed.
      state: whether it is no parameter but part of the network's state, as running statistics are.
      steps: elementwise equations with scalars that were applied to it, each with the operand that it was.
    """

    path: str
    axes: tuple[int | None, ...]
    plain: bool = True
    fixed: tuple["Index", ...] = ()
    state: bool = False
    steps: tuple[tuple[core.JaxprEqn, int], ...] = ()

    def identity(self) -> float:
        """The value of the leaf at which what was made of it is 1; where neither 1 nor 0 does that, 1."""
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
    """Parameters side by side, as the kernels of a cell's gates are.

    Attributes:
      parts: the parameters.
      sizes: how long each is along the axis.
      axis: along which they are put together.
    """

    parts: tuple[Weight, ...]
    sizes: tuple[int, ...]
    axis: int

    def split(self, ids: np.ndarray) -> list[np.ndarray]:
        """Cuts labels that broadcast to an array of this shape into those of each parameter."""
        cuts = np.cumsum(self.sizes)
        whole = np.broadcast_to(ids, (*ids.shape[: self.axis], cuts[-1], *ids.shape[self.axis + 1 :]))
        return np.split(whole, cuts[:-1], self.axis)


@dataclasses.dataclass(frozen=True, eq=False)
class Vector:
    """An elementwise function of parameters, constants and a statistic that mixes units; it is of no unit.

    Attributes:
      parts: the parameters, each with its axes.
      statistic: what was made of a sum over units, if there is one in it.
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
      ids: numbers of units, broadcastable to the array's shape; -1 where an element is of no unit.
      reduced: whether it is a sum over batch or positions.
      running: the running statistics that it is the update of, or "".
      joined: axes along which arrays were put side by side that do not differ along it, as a class token and patches: a
        sum over them is a sum of these, not one over units.
      form: by which it is known that two arrays hold the same values.
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
      in_axes: its axes that enumerate the rows which read units. (Those that are summed over; in a batched product, as
        of an ensemble, the batch's too; in a grouped convolution the output axis too, since a channel is read by one
        group's outputs only; and those that scans index.)
      out_axes: its axes that make the output.
      operand: the array it is applied to.
      operand_axes: the axes of that array that are summed over, or batched.
      operand_rows: for each row of `in_axes`, the element of `operand_axes` that it reads, or -1; None if the same.
      labels: the units that the rows read, [in_axes...]; None if there are none.
      out_places: the output's axes that `out_axes` make.
      plain: whether the kernel is applied as it is, not scaled.
      fixed: the kernel's axes that scans index.
      passes: of each scan around, the pass of which it is; None if it is of all.
      bias: path of a parameter that is added to the output as it is, and the kernel's axes that its axes stand for.
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
        """Whether rows of its kernel, which may be one of several that are stacked, are among those that it applies."""
        return self.operand_rows is None or bool((self.operand_rows[index] >= 0).all())


class UnionFind:
    """Numbers that can be made one; the least number of each set stands for it."""

    def __init__(self):
        self._parent = np.zeros(0, np.int64)
        self._count = 0
        self.changes = 0  # how often there was something new

    def new(self, shape: tuple[int, ...]) -> np.ndarray:
        """New numbers."""
        start, self._count = self._count, self._count + int(np.prod(shape))
        self.changes += 1
        if self._count > self._parent.size:
            more = max(self._count, 2 * self._parent.size)
            self._parent = np.concatenate([self._parent, np.arange(self._parent.size, more)])
        return np.arange(start, self._count).reshape(shape)

    def roots(self, ids: np.ndarray) -> np.ndarray:
        """The number that stands for each, -1 for -1."""
        found = np.where(ids >= 0, self._parent[ids], -1) if self._count else ids
        while True:
            above = np.where(found >= 0, self._parent[found], -1) if self._count else found
            if np.array_equal(above, found):
                return found
            found = above

    def union(self, a: np.ndarray, b: np.ndarray) -> None:
        """Makes those one that stand in the same place, unless one is -1."""
        a, b = np.broadcast_arrays(a, b)
        keep = (a != b) & (a >= 0) & (b >= 0)
        a, b = a[keep], b[keep]
        while a.size:
            a, b = self.roots(a), self.roots(b)
            differ = a != b
            a, b = a[differ], b[differ]
            self.changes += a.size
            # Of several numbers below one root the least stays its parent; the others are met in the next round.
            np.minimum.at(self._parent, np.maximum(a, b), np.minimum(a, b))

    def __len__(self) -> int:
        return self._count
