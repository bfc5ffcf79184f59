"""Cuts the labels of a walked network into groups of units."""

import collections
from typing import Any

import numpy as np

from cbp_jax.units import collection, groups
from cbp_jax.units.values import Contraction
from cbp_jax.units.walk import Claim, Walk

# Names by which a running statistic is known to be a variance, where it is only updated and not used.
_VARIANCES = ("var", "std", "variance", "second_moment")


def build(walk: Walk) -> collection.Units:
    """The groups of a network: kernels whose units were made one belong together."""
    _check_normalisation(walk)
    roots = {key: walk.labels.roots(ids).ravel() for key, ids in walk.producers.items()}
    names = _layer_names([path for path, _ in roots])
    members = _members(roots, len(walk.labels))
    owner = np.full(len(walk.labels) + 1, -1)  # number of the group of each root; the last is that of no unit
    for number, keys in enumerate(members):
        for key in keys:
            owner[roots[key]] = number
    lost: dict[int, str] = {}
    for ids, reason in walk.lost:
        for number in np.unique(owner[walk.labels.roots(ids)]).tolist():
            lost.setdefault(number, reason)
    shared = _Parameters(walk)
    found, left_out = [], []
    for number, keys in enumerate(members):
        units = np.array(list(dict.fromkeys(root for key in keys for root in roots[key].tolist())))
        name = names[keys[0][0]]
        try:
            if number in lost:
                raise _LeaveOut(lost[number])
            if len(units) == 1 and sum(roots[key].size for key in keys) > len(keys):
                raise _LeaveOut(
                    "all its columns are one unit: they share weights, are mixed element by element or multiplied "
                    "with each other"
                )
            found.append(_group(walk, shared, name, units, keys))
        except _LeaveOut as reason:
            left_out.append(collection.LeftOut(name, len(units), str(reason)))
    # Kernels that never made labels were met in equations that are not followed.
    made = {path for path, _ in roots}
    for path, primitive in walk.used_otherwise.items():
        if path not in made and path not in walk.states and len(walk.shapes[path]) > 1:
            reason = f"{path} is used in `{primitive}`, which is not followed"
            left_out.append(collection.LeftOut(path, walk.shapes[path][-1], reason))
    if not found:
        reasons = "; ".join(f"{item.name}: {item.reason}" for item in left_out)
        raise ValueError(f"no units can be replaced in this network: {reasons or 'it applies no kernel'}")
    return collection.Units(found, left_out)


class _LeaveOut(Exception):
    """The group at hand is left out; the message says why."""


def _check_normalisation(walk: Walk) -> None:
    """Leaves out units whose statistics meet others than themselves: that is no normalisation."""
    for sources, targets in walk.normalised:
        sources, targets = np.unique(walk.labels.roots(sources)), np.unique(walk.labels.roots(targets))
        outside = np.setdiff1d(sources, targets)
        if outside.size:
            walk.lost.append((outside, "a sum over units (`reduce_sum`) of which it is one normalises other units"))


def _members(roots: dict[Any, np.ndarray], count: int) -> list[list[Any]]:
    """Producing kernels that share units, together, in forward order."""
    owner = np.full(count, -1)
    members: list[list[Any]] = []
    for key, ids in roots.items():
        met = np.unique(owner[ids])
        met = met[met >= 0].tolist()
        number = met[0] if met else len(members)
        if not met:
            members.append([])
        for other in met[1:]:
            members[number] += members[other]
            members[other] = []
            owner[owner == other] = number
        members[number].append(key)
        owner[ids] = number
    order = {key: place for place, key in enumerate(roots)}
    return [sorted(keys, key=order.__getitem__) for keys in members if keys]


class _Parameters:
    """What is known about each parameter over all of its uses."""

    def __init__(self, walk: Walk):
        self.claims: dict[tuple[str, tuple[int, ...]], list[Claim]] = {}
        for claim in walk.claims:
            self.claims.setdefault((claim.path, claim.axes), []).append(claim)
        self.readers: dict[str, list[Contraction]] = {}
        for contraction in walk.contractions:
            self.readers.setdefault(contraction.path, []).append(contraction)
        self.conflicts = {
            path: "it is used in more than one way: " + ", ".join(sorted(str(use[0]) for use in uses))
            for path, uses in walk.uses.items()
            if len(uses) > 1
        }
        for path, primitive in walk.used_otherwise.items():
            self.conflicts.setdefault(path, f"it is also used in `{primitive}`")
        for path, readers in self.readers.items():
            if len({reader.labels is None for reader in readers}) > 1:
                self.conflicts.setdefault(path, "it is used more than once, and not always on units")


def _group(
    walk: Walk, known: _Parameters, name: str, units: np.ndarray, keys: list[tuple[str, tuple[int, ...]]]
) -> groups.UnitGroup:
    number = np.full(len(walk.labels) + 1, -1)
    number[units] = np.arange(len(units))

    def part(path: str, axes: tuple[int, ...], ids: np.ndarray, reset: float = 0.0) -> groups.ParamSlice | None:
        unit_of_row = number[walk.labels.roots(ids).ravel()]
        counts = np.bincount(unit_of_row[unit_of_row >= 0], minlength=len(units))
        if counts.max() == 0:
            return None
        if path in known.conflicts:
            raise _LeaveOut(f"{path}: {known.conflicts[path]}")
        if counts.min() != counts.max():
            raise _LeaveOut(f"its units own different numbers of rows of {path}")
        order = np.argsort(unit_of_row, kind="stable")[np.count_nonzero(unit_of_row < 0) :]
        return groups.ParamSlice(path, axes, order.reshape(len(units), -1).T, unit_of_row.size, reset)

    incoming = [part(path, axes, walk.producers[path, axes]) for path, axes in keys]
    vectors: dict[str, list[groups.ParamSlice]] = collections.defaultdict(list)
    for (path, axes), claims in known.claims.items():
        ids = walk.labels.roots(np.concatenate([claim.ids for claim in claims], -1))
        own = ids.max(-1, keepdims=True)
        if ((ids != own) & (ids >= 0)).any():
            continue  # it is shared by several units, and belongs to none
        state, role = claims[0].weight.state, "scale" if any(claim.role == "scale" for claim in claims) else "bias"
        found = part(path, axes, own[..., 0])
        if found is not None:
            reset = _statistic(path, role) if state else claims[0].weight.identity() if role == "scale" else 0.0
            vectors["statistics" if state else role].append(
                groups.ParamSlice(path, axes, found.index, found.rows, reset)
            )
    outgoing, operands = [], {}
    for path, readers in known.readers.items():
        labels = [reader.labels for reader in readers if reader.labels is not None]
        kernel = part(path, readers[0].in_axes, labels[0]) if labels else None
        if kernel is not None:
            read = tuple((reader.operand, reader.operand_axes, reader.in_axes) for reader in readers)
            operand = operands.setdefault(read, len(operands))
            bias, bias_axes = readers[0].bias or (None, ())
            if any(reader.bias != readers[0].bias for reader in readers) or bias in known.conflicts:
                bias, bias_axes = None, ()
            absorbed = all(reader.absorbed for reader in readers)
            outgoing.append(groups.Consumer(kernel, bias, bias_axes, operand, absorbed))
    if not outgoing:
        raise _LeaveOut("no kernel reads it")
    return groups.UnitGroup(
        name,
        len(units),
        tuple(incoming),
        tuple(vectors["bias"]),
        tuple(outgoing),
        tuple(vectors["scale"]),
        tuple(vectors["statistics"]),
        _kind(walk, units, keys),
    )


def _statistic(path: str, role: str) -> float:
    """What a running statistic starts at."""
    name = path.removesuffix("/value").rpartition("/")[2].lower()
    return 1.0 if role == "scale" or any(word in name for word in _VARIANCES) else 0.0


def _kind(walk: Walk, units: np.ndarray, keys: list[tuple[str, tuple[int, ...]]]) -> str:
    def among(events: list[np.ndarray]) -> bool:
        return any(np.isin(walk.labels.roots(ids), units).any() for ids in events)

    if among(walk.products):
        return "head"
    if len(keys) > 1 and among(walk.sums):
        return "residual"
    return walk.kinds[keys[0][0]]


def _layer_names(paths: list[str]) -> dict[str, str]:
    """The path of the layer of each kernel; the kernel's own where its layer holds several."""
    layers = {path: path.removesuffix("/value").rpartition("/")[0] for path in paths}
    counts: dict[str, int] = {}
    for layer in layers.values():
        counts[layer] = counts.get(layer, 0) + 1
    return {path: layer if layer and counts[layer] == 1 else path for path, layer in layers.items()}
