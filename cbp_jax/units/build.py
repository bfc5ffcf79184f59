"""Builds groups of units from the labels of a walked network."""

import collections
from collections.abc import Callable

import numpy as np
from jax.extend import core

from cbp_jax.units import collection, groups, tracing
from cbp_jax.units.record import Claim
from cbp_jax.units.values import Contraction, LeftOutKind, Reason
from cbp_jax.units.walk import Walk

# Names that identify a running statistic as a variance if it is only updated, not used.
_VARIANCES = ("var", "std", "variance", "second_moment")


# Takes groups and the variables that hold sums of joint normalizations; returns the names of wrong groups.
Check = Callable[[list[groups.UnitGroup], frozenset[core.Var]], set[str]]


def build(walk: Walk, check: Check | None = None) -> collection.Units:
    """Return the groups of a network. Units that own equally many rows of the same parameters belong to one group.

    Args:
      walk: a walk through the network.
      check: finds groups that are wrong; these are left out as well.
    """
    together, sums = _check_normalization(walk)
    parts = _Parts(walk, together)
    found, left_out, named = [], [], collections.Counter()
    for number, (units, reason) in enumerate(parts.groups):
        keys = [place for place in parts.producers if number in parts.columns[place]]
        name = parts.names[parts.places[keys[0]][0]]
        try:
            if reason is not None:
                raise _LeaveOut(*reason)
            if len(units) == 1 and sum(parts.columns[place][number] for place in keys) > len(keys):
                raise _LeaveOut(
                    LeftOutKind.SHARED,
                    "all its columns are one unit: they share weights, are mixed element by element or multiplied "
                    "with each other",
                )
            group = parts.group(name if not named[name] else f"{name}#{named[name] + 1}", number, keys)
            named[name] += 1
            found.append(group)
        except _LeaveOut as error:  # every kernel that makes these units is named
            for place in keys:
                layer, columns = parts.names[parts.places[place][0]], parts.columns[place][number]
                left_out.append(collection.LeftOut(layer, columns, error.text, error.kind))
    wrong = check(found, sums) if check and found else ()
    for group in [group for group in found if group.name in wrong]:
        found.remove(group)
        text = "its incoming weights change the output when its outgoing ones are 0; please report this network"
        left_out.append(collection.LeftOut(group.name, group.size, text, LeftOutKind.REFUTED))
    # Kernels that never created labels occur in equations that are not followed.
    made = {path for path, _ in walk.producers}
    for path, shape in walk.shapes.items():
        if path in walk.used_otherwise and path not in made and path not in walk.states and len(shape) > 1:
            kind, text = tracing.not_followed(walk.used_otherwise[path], "it is used in")
            left_out.append(collection.LeftOut(path, shape[-1], text, kind))
    units = collection.Units(found, left_out, dict.fromkeys(path for path, _ in walk.producers))
    if not units:
        raise collection.NoUnits(units)
    return units


class _LeaveOut(Exception):
    """Raised when the current group must be left out."""

    def __init__(self, kind: LeftOutKind, text: str):
        super().__init__(text)
        self.kind, self.text = kind, text


def _check_normalization(walk: Walk) -> tuple[set[int], frozenset[core.Var]]:
    """Leave out units mixed by a statistic that is applied to other units, which is not a normalization.

    Returns:
      the units that are normalized together, where resetting one changes the others through the statistic; and the
      variables that hold the sums of such statistics.
    """
    together: set[int] = set()
    sums: set[core.Var] = set()
    for statistic, ids in walk.normalized:
        sets, met = np.broadcast_arrays(statistic.sets, walk.labels.roots(ids))
        for number, members in enumerate(statistic.members):
            members = np.unique(walk.labels.roots(members))
            found = np.unique(met[sets == number])
            if not np.array_equal(found[found >= 0], members):
                text = "a sum over units that includes it (`reduce_sum`) normalizes other units"
                walk.lose_units(members, Reason(LeftOutKind.MIXED, text))
            elif members.size > 1:
                together.update(members.tolist())
                sums.update(statistic.sources)
    return together, frozenset(sums)


class _Parts:
    """The rows of parameters that belong to each unit.

    A *place* is a number that identifies a parameter, the axes that enumerate its rows, and its role for the units.

    Attributes:
      places: the path and the axes of each place.
      rows: for each place, the unit of each row, flat; -1 for none.
      producers, vectors, readers: the places of incoming kernels; of biases, scales and statistics; of outgoing
        kernels.
      groups: units that own equally many rows everywhere, in forward order, with the reason if they are left out.
      columns: for each place and number of a group, how many rows each unit owns.
    """

    def __init__(self, walk: Walk, together: set[int]):
        self.walk = walk
        self.names = _layer_names([path for path, _ in walk.producers])
        self.places: list[tuple[str, tuple[int, ...]]] = []
        self.rows: list[np.ndarray] = []
        self.producers = [self._place(path, axes, ids) for (path, axes), ids in walk.producers.items()]
        self.vectors: dict[int, tuple[str, float]] = {}  # place -> role and value at a reset
        claims: dict[tuple[str, tuple[int, ...]], list[Claim]] = {}
        for claim in walk.claims:
            claims.setdefault((claim.path, claim.axes), []).append(claim)
        for (path, axes), uses in claims.items():
            ids = walk.labels.roots(np.concatenate([claim.ids for claim in uses], -1))
            own = ids.max(-1)
            shared = ((ids != own[..., None]) & (ids >= 0)).any(-1)  # a row of several units belongs to no unit
            role = "scale" if any(claim.role == "scale" for claim in uses) else "bias"
            reset = 0.0
            if uses[0].weight.state:
                role, reset = "statistics", _statistic(path, role)
            elif role == "scale":
                reset = uses[0].weight.identity()
            self.vectors[self._place(path, axes, np.where(shared, -1, own))] = role, reset
        self.readers: dict[int, list[Contraction]] = {}
        by_path: dict[str, list[Contraction]] = {}
        for contraction in walk.contractions:
            by_path.setdefault(contraction.path, []).append(contraction)
        for path, uses in by_path.items():
            for fixed in dict.fromkeys(use.fixed for use in uses):  # stacked kernels, one by one
                same = [use for use in uses if use.fixed == fixed]
                first = next((use for use in same if use.labels is not None), None)
                if first is not None:
                    labels = walk.readers[path, first.in_axes]
                    if fixed:
                        labels = np.where(first.operand_rows.reshape(labels.shape) >= 0, labels, -1)
                    self.readers[self._place(path, first.in_axes, labels)] = same
        self.conflicts = {
            path: "it is used in more than one way: " + ", ".join(sorted(map(_description, uses)))
            for path, uses in walk.uses.items()
            if len(uses) > 1 and not _is_tied(uses)
        }
        for path, primitive in walk.used_otherwise.items():
            self.conflicts.setdefault(path, f"it is also used in `{primitive}`")
        for uses in self.readers.values():
            if any(use.labels is None for use in uses):
                self.conflicts.setdefault(uses[0].path, "it is used more than once, and not always on units")
        self.groups = self._split()
        # The group of every unit, and its number in the group. The last entry stands for no unit.
        self._group = np.full(len(walk.labels) + 1, -1)
        self._number = np.zeros(len(walk.labels) + 1, np.int64)
        for number, (units, _) in enumerate(self.groups):
            self._group[units], self._number[units] = number, np.arange(len(units))
        self.columns = [self._counts(rows) for rows in self.rows]
        self.products, self.sums = (self._among(events) for events in (walk.products, walk.sums))
        self.together = self._among([np.array(sorted(together), np.int64)])

    def _counts(self, rows: np.ndarray) -> dict[int, int]:
        """Return how many of the rows belong to each group."""
        found = self._group[rows]
        numbers, counts = np.unique(found[found >= 0], return_counts=True)
        return dict(zip(numbers.tolist(), counts.tolist(), strict=True))

    def _among(self, events: list[np.ndarray]) -> set[int]:
        """Return the groups that contain some of these units."""
        return {number for ids in events for number in self._counts(self.walk.labels.roots(ids).ravel())}

    def _place(self, path: str, axes: tuple[int, ...], ids: np.ndarray) -> int:
        self.places.append((path, axes))
        self.rows.append(self.walk.labels.roots(ids).ravel())
        return len(self.places) - 1

    def _split(self) -> list[tuple[np.ndarray, Reason | None]]:
        """Return the groups: units with equal signatures.

        The signature of a unit is the sum of a random number for each row that it owns.
        """
        size, random = len(self.walk.labels), np.random.default_rng(0)
        signatures = np.zeros(size, np.uint64)
        for rows in self.rows:
            units, counts = np.unique(rows[rows >= 0], return_counts=True)
            signatures[units] += counts.astype(np.uint64) * random.integers(2**64, dtype=np.uint64)
        lost = np.zeros(size, np.int64)
        reasons: list[Reason | None] = [None]
        for ids, reason in reversed(self.walk.lost):  # the first of several reasons is kept
            reasons.append(reason)
            lost[self.walk.labels.roots(ids)] = len(reasons) - 1
        if not self.producers:
            return []
        everywhere = np.concatenate([self.rows[place] for place in self.producers])
        units, first = np.unique(everywhere, return_index=True)
        units = units[np.argsort(first)]
        signatures += lost.astype(np.uint64) * random.integers(2**64, dtype=np.uint64)
        _, first, kinds = np.unique(signatures[units], return_index=True, return_inverse=True)
        members = np.split(np.argsort(kinds, kind="stable"), np.cumsum(np.bincount(kinds))[:-1])
        return [(units[members[kind]], reasons[lost[units[first[kind]]]]) for kind in np.argsort(first)]

    def is_table(self, place: int) -> bool:
        """Return whether rows of a parameter are looked up by index."""
        return self.walk.kinds[self.places[place][0]] == "embedding"

    def slice(self, place: int, group: int, reset: float = 0.0, lookup: bool = False) -> groups.ParamSlice | None:
        """Return the rows of a parameter that belong to units of a group, or None."""
        path, axes = self.places[place]
        if group not in self.columns[place]:
            return None
        if path in self.conflicts:
            raise _LeaveOut(LeftOutKind.SHARED, f"{path}: {self.conflicts[path]}")
        rows = self.rows[place]
        own = np.flatnonzero(self._group[rows] == group)
        order = own[np.argsort(self._number[rows[own]], kind="stable")]
        size = len(self.groups[group][0])
        return groups.ParamSlice(path, axes, order.reshape(size, -1).T, rows.size, reset, lookup)

    def group(self, name: str, number: int, keys: list[int]) -> groups.UnitGroup:
        """Return the group of units that own rows at the places `keys`."""
        # In a table that also reads units, their entries are outgoing: they become 0.
        written = [place for place in keys if not _is_tied(self.walk.uses[self.places[place][0]])]
        if not written:
            raise _LeaveOut(
                LeftOutKind.SHARED,
                "a table both makes it and reads it, and no other kernel makes it: all would become 0",
            )
        incoming = [self.slice(place, number, lookup=self.is_table(place)) for place in written]
        vectors: dict[str, list[groups.ParamSlice]] = collections.defaultdict(list)
        for place, (role, reset) in self.vectors.items():
            part = self.slice(place, number, reset)
            if part is not None:
                vectors[role].append(part)
        outgoing, operands = [], {}
        for place, uses in self.readers.items():
            kernel = self.slice(place, number)
            if kernel is None:
                continue
            read = tuple(
                (use.operand, use.passes, use.operand_axes, use.in_axes, kernel.index.tobytes()) for use in uses
            )
            operand = operands.setdefault(read, len(operands))
            bias, bias_axes = uses[0].bias or (None, ())
            if bias in self.conflicts or any(use.bias != uses[0].bias for use in uses):
                bias, bias_axes = None, ()
            absorbed = all(use.absorbed for use in uses)
            outgoing.append(groups.Consumer(kernel, bias, bias_axes, operand, absorbed))
        if not outgoing:
            raise _LeaveOut(LeftOutKind.NOT_READ, "no kernel reads it")
        return groups.UnitGroup(
            name,
            len(self.groups[number][0]),
            tuple(incoming),
            tuple(vectors["bias"]),
            tuple(outgoing),
            tuple(vectors["scale"]),
            tuple(vectors["statistics"]),
            self.kind(number, keys),
            number not in self.together,
        )

    def kind(self, number: int, keys: list[int]) -> str:
        """Return the kind of a group."""
        if number in self.products:
            return "head"
        if len(keys) > 1 and number in self.sums:
            return "residual"
        return self.walk.kinds[self.places[keys[0]][0]]


def _is_tied(uses: set[tuple]) -> bool:
    """Return whether a parameter embeds tokens and also computes the output, with one row for each token in both."""
    lookups = [use[1] for use in uses if use[0] == "lookup"]
    kernels = [use[1:] for use in uses if use[0] == "kernel"]
    if len(uses) != 2 or not lookups or not kernels:
        return False
    in_axes, out_axes, count = kernels[0]
    return in_axes == lookups[0] and count == 1 and not set(out_axes) & set(in_axes)


def _description(use: tuple) -> str:
    """Describe a use of a parameter."""
    axes = lambda numbers: "axis " + " and ".join(map(str, numbers))
    if use[0] == "kernel":
        return f"as a kernel that reads along {axes(use[1])}"
    return f"as a table of {axes(use[1])}" if use[0] == "lookup" else f"as a {use[0]} along {axes(use[1])}"


def _statistic(path: str, role: str) -> float:
    """Return the initial value of a running statistic."""
    name = path.rpartition("/")[2].lower()
    return 1.0 if role == "scale" or any(word in name for word in _VARIANCES) else 0.0


def _layer_names(paths: list[str]) -> dict[str, str]:
    """Return the path of each kernel's layer, or the kernel's own path if its layer has several kernels."""
    layers = {path: path.rpartition("/")[0] for path in paths}
    counts: dict[str, int] = {}
    for layer in layers.values():
        counts[layer] = counts.get(layer, 0) + 1
    return {path: layer if layer and counts[layer] == 1 else path for path, layer in layers.items()}
