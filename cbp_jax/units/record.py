"""Findings of a walk through a network: labels, the kernels that write and read them, and what is left out."""

import dataclasses
from typing import Any

import numpy as np
from jax.extend import core

from cbp_jax.units import moments, rules, tracing
from cbp_jax.units.values import (
    Contraction,
    Derived,
    Labels,
    LeftOutKind,
    Reason,
    UnionFind,
    Vector,
    Weight,
    paths_of,
)

SHARED = Reason(LeftOutKind.SHARED, "it shares weights with values that are not units")


@dataclasses.dataclass
class Claim:
    """A parameter that is added to units or multiplied with them.

    Attributes:
      path, axes: the leaf and its axes that enumerate rows.
      role: "bias" or "scale".
      ids: the units of each row, [axes..., uses].
      weight: the parameter as it was used.
    """

    path: str
    axes: tuple[int, ...]
    role: str
    ids: np.ndarray
    weight: Weight


class Record:
    """Information about a traced network, filled in by a walk."""

    def __init__(self, trace: tracing.Trace):
        self._contractions: dict[Any, Contraction] = {}
        self.passes: list[int] = []  # of the enclosing scans
        self.labels = UnionFind()
        # Kernel and axes -> labels; -1 for slices of a stacked kernel that were not applied yet.
        self.producers: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}  # free axes
        self.readers: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}  # axes of rows
        self.read: set[Any] = set()  # entries of `readers` that were applied
        self.claims: list[Claim] = []
        self.uses: dict[str, set[Any]] = {}  # the ways in which a parameter is used
        self.kinds: dict[str, str] = {}  # "dense", "conv" or "embedding", by kernel
        self.made_by: dict[core.Var, Contraction] = {}  # outputs of contractions, for their biases
        self.lost: list[tuple[np.ndarray, Reason]] = []  # labels that are left out, and why
        # Statistics, and the labels of what they normalize.
        self.normalized: list[tuple[moments.Statistic, np.ndarray]] = []
        self.sums: list[np.ndarray] = []  # units that were added to others
        self.products: list[np.ndarray] = []  # units whose activations are contracted with each other
        self.used_otherwise: dict[str, str] = {}  # parameters used in ways not followed
        self.misused: set[str] = set()  # state that is not used like a statistic
        self.numbers: dict[core.Var, float] = {}  # arrays whose entries are all one number
        self.trace = trace
        self.paths = trace.param_paths
        self.shapes = {path: var.aval.shape for var, path in trace.param_paths.items()}
        self.states = {trace.param_paths[var] for var in trace.states}

    @property
    def contractions(self) -> list[Contraction]:
        """All contractions, in forward order. If all passes of a scan do the same, the last pass represents all."""
        return list(self._contractions.values())

    def note_contraction(self, output: core.Var, made: Contraction) -> None:
        """Record that an array is the output of a contraction."""
        self._contractions[output, made.path, made.passes] = made
        self.made_by[output] = made

    def number(self, atom: core.Var | core.Literal) -> float | None:
        """Return the number that all entries of an array equal, if known."""
        if isinstance(atom, core.Literal):
            return float(atom.val) if np.ndim(atom.val) == 0 and np.isrealobj(atom.val) else None
        return self.numbers.get(atom)

    def note_number(self, var: core.Var, value: Any) -> None:
        """Record that a variable is a number or, since bodies of calls are walked again, that it is not (None)."""
        known = isinstance(value, int | float | np.ndarray | np.generic) and np.ndim(value) == 0
        if known and np.isrealobj(value):
            self.numbers[var] = float(value)
        else:
            self.numbers.pop(var, None)

    def nothing(self, eqn: core.JaxprEqn) -> None:
        """Record an array of zeros, such as the first state of a cell, which belongs to no unit."""
        self.note_number(eqn.outvars[0], 0.0)

    def join(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Merge units that are combined in one element, and return the labels of all elements."""
        self.labels.union(a, b)
        a, b = np.broadcast_arrays(a, b)
        return np.where(a >= 0, a, b)

    def merge(self, ids: np.ndarray, axes: tuple[int, ...], keep: bool = False) -> np.ndarray:
        """Merge units that differ only along `axes`, which share weights, and drop these axes."""
        for axis in axes:
            whole = ids
            ids = whole.max(axis, keepdims=True)
            self.labels.union(ids, whole)
            mixed = np.broadcast_to((whole < 0).any(axis, keepdims=True) & (ids >= 0), ids.shape)
            if mixed.any():
                self.lose_units(ids[mixed], SHARED)
        return ids if keep else ids.squeeze(axes)

    def meeting(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Return the units that are combined with others in one element."""
        a, b = np.broadcast_arrays(self.labels.roots(a), self.labels.roots(b))
        differ = (a != b) & (a >= 0) & (b >= 0)
        return np.unique(np.concatenate([a[differ], b[differ]]))

    def as_units(self, value: Any) -> Any:
        """Merge units of a partial sum, as over the members of an ensemble, into one unit. Other values are
        unchanged."""
        statistic = value.statistic if isinstance(value, Vector) and not value.parts else None
        if statistic is None or statistic.kind is moments.Kind.OTHER or len(statistic.members) < 2:
            return value
        first = np.full(len(statistic.members), -1)
        for number, members in enumerate(statistic.members):
            if members.size:
                first[number] = members[0]
                self.labels.union(members[:1], members)
        return Labels(first[statistic.sets])

    def lose(self, value: Any, reason: Reason) -> None:
        """Leave out the units of a value."""
        if isinstance(value, Labels):
            self.lose_units(value.ids, reason)
        elif isinstance(value, Vector):
            text = f"it is summed with other units (`reduce_sum`), and {reason.text}"
            for ids in value.statistic.members if value.statistic else ():
                self.lose_units(ids, reason._replace(text=text))

    def lose_units(self, ids: np.ndarray, reason: Reason) -> None:
        """Leave out units. Numbers below 0 are ignored."""
        self.lost.append((np.unique(ids[ids >= 0]), reason))

    def not_followed(self, eqn: core.JaxprEqn, values: list[Any], text: str = "") -> Any:
        """Leave out every labeled operand, and mark parameters as used in another way."""
        reason = tracing.not_followed(eqn.primitive.name, "its activations pass through")
        reason = Reason(LeftOutKind.NOT_FOLLOWED, text) if text else reason
        for value in values:
            self.lose(value, reason)
        paths = paths_of(values)
        # The use of a derived value does not show that running statistics in it are misused.
        derived = any(isinstance(value, Derived) for value in values)
        for path in paths:
            if derived and path in self.states:
                continue
            self.used_otherwise.setdefault(path, eqn.primitive.name)
        return Derived(paths) if paths and not rules.labeled(values) else None

    def block(
        self, table: dict[tuple[str, tuple[int, ...]], np.ndarray], weight: Weight, axes: tuple[int, ...]
    ) -> np.ndarray:
        """Return a view of a leaf's labels in a table, for these axes; a new entry is -1."""
        key = (weight.path, (*(index.axis for index in weight.fixed), *axes))
        if key not in table:
            table[key] = np.full([self.shapes[weight.path][axis] for axis in key[1]], -1)
        return table[key][tuple(index.number for index in weight.fixed)]

    def among_stacked(
        self, weight: Weight, axes: tuple[int, ...], rows: np.ndarray
    ) -> tuple[np.ndarray, tuple[int, ...]]:
        """Convert rows of a slice of a stacked leaf, [axes..., others...], to rows of the whole leaf; also return their
        axes."""
        if not weight.fixed:
            return rows, axes
        sizes = [self.shapes[weight.path][index.axis] for index in weight.fixed]
        whole = np.full((*sizes, *rows.shape), -1)
        whole[tuple(index.number for index in weight.fixed)] = rows
        return whole, (*(index.axis for index in weight.fixed), *axes)

    def produce(
        self,
        weight: Weight,
        axes: tuple[int, ...],
        places: tuple[int, ...],
        ndim: int,
        coupled: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return the labels along the free axes of a kernel, placed on the array's axes.

        Args:
          weight: the kernel.
          axes: its free axes.
          places: the array's axes that correspond to these.
          ndim: the array's number of axes.
          coupled: units that stay the same, or -1 for new ones; None if all are new.
        """
        labels = self.block(self.producers, weight, axes)
        if (labels < 0).any():
            new = self.labels.new(labels.shape)
            labels[...] = new if coupled is None else np.where(coupled >= 0, coupled, new)
        if coupled is not None:
            self.labels.union(labels, coupled)
        shape = [1] * ndim
        for size, place in zip(labels.shape, places, strict=True):
            shape[place] = size
        return labels.transpose(np.argsort(places)).reshape(shape)
