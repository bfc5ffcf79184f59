"""The groups of a network: a tuple that prints as a table, with methods to select and to draw groups."""

import dataclasses
import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from cbp_jax.units.groups import ParamSlice, UnitGroup, leaves_by_path
from cbp_jax.units.values import LeftOutKind

# Maximum number of parameters in a cell of the table.
_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A layer whose units cannot be replaced, and the reason. Layers that write the same units are listed separately.

    Attributes:
      name: the path of the layer, or of its kernel.
      size: number of its units, which are its kernel's columns.
      reason: an explanation in words.
      kind: the reason as an enum, for programs.
    """

    name: str
    size: int
    reason: str
    kind: LeftOutKind


class Units(tuple[UnitGroup, ...]):
    """The unit groups of a network, in forward order. Prints as a table.

    Attributes:
      left_out: layers that are not groups, each a `LeftOut` with the reason.
      kernels: the paths of all kernels that were found, in forward order; empty if the groups were written by hand.
    """

    left_out: tuple[LeftOut, ...]
    kernels: tuple[str, ...]

    def __new__(cls, groups: Iterable[UnitGroup] = (), left_out: Iterable[LeftOut] = (), kernels: Iterable[str] = ()):
        """Make the tuple of groups."""
        self = super().__new__(cls, groups)
        self.left_out, self.kernels = tuple(left_out), tuple(kernels)
        return self

    def select(self, *names: str, kind: str | Iterable[str] | None = None) -> "Units":
        """Return the groups to replace, chosen by name or by kind.

        Args:
          *names: patterns of group names, as in `fnmatch`: `*` matches any characters, `?` one. A group is chosen if
            any pattern matches. Without names, all groups are chosen.
          kind: one kind or several, to which chosen groups must belong. By default any.

        Returns:
          the chosen groups; the others are listed in its `left_out`.

        Raises:
          ValueError: a name or a kind matches no group.

        Example:
          >>> import jax.numpy as jnp, cbp_jax
          >>> def apply(params, x):
          ...   return jnp.tanh(jnp.tanh(x @ params["w1"]) @ params["w2"]) @ params["head"]
          >>> params = {"w1": jnp.ones((4, 3)), "w2": jnp.ones((3, 5)), "head": jnp.ones((5, 2))}
          >>> units = cbp_jax.discover_units(apply, params, jnp.ones((1, 4)))
          >>> [group.name for group in units.select("w*", kind="dense")], [group.name for group in units.select("w2")]
          (['w1', 'w2'], ['w2'])
        """
        kinds = {kind} if isinstance(kind, str) else None if kind is None else set(kind)
        have_names, have_kinds = [group.name for group in self], {group.kind for group in self}
        for name in names:
            if not fnmatch.filter(have_names, name):
                raise ValueError(f"no group's name matches {name!r}; the groups are {have_names}")
        if kinds is not None and not kinds <= have_kinds:
            raise ValueError(f"kind must be among {sorted(have_kinds)}, got {kind!r}")
        chosen: list[UnitGroup] = []
        others: list[UnitGroup] = []
        for group in self:
            named = not names or any(fnmatch.fnmatchcase(group.name, name) for name in names)
            (chosen if named and (kinds is None or group.kind in kinds) else others).append(group)
        left = (LeftOut(group.name, group.size, "it was not selected", LeftOutKind.NOT_SELECTED) for group in others)
        return Units(chosen, (*self.left_out, *left), self.kernels)

    def to_dot(self) -> str:
        """Return the groups as a graph in Graphviz's DOT language: boxes are groups, ellipses are kernels between them.

        Returns:
          text to render with `dot -Tsvg`.

        Example:
          >>> import jax.numpy as jnp, cbp_jax
          >>> units = cbp_jax.discover_units(
          ...     lambda params, x: jnp.tanh(x @ params["w1"]) @ params["w2"],
          ...     {"w1": jnp.ones((4, 3)), "w2": jnp.ones((3, 2))}, jnp.ones((1, 4)))
          >>> print(units.to_dot())
          digraph units {
            rankdir=LR;
            "group w1" [label="w1\\n3 dense", shape=box];
            "w1" -> "group w1";
            "group w1" -> "w2";
          }
        """
        lines = ["digraph units {", "  rankdir=LR;"]
        for group in self:
            box = _quote(f"group {group.name}")
            label = _quote(f"{group.name}\\n{group.size} {group.kind}".rstrip())
            lines.append(f"  {box} [label={label}, shape=box];")
            lines += [f"  {_quote(part.path)} -> {box};" for part in group.incoming]
            lines += [f"  {box} -> {_quote(consumer.kernel.path)};" for consumer in group.outgoing]
        return "\n".join([*lines, "}"])

    def __str__(self) -> str:
        """Return a table of the groups, and a list of what is left out."""
        columns = {
            "group": [group.name for group in self],
            "size": [str(group.size) for group in self],
            "kind": [group.kind or "-" for group in self],
            "incoming": [_describe(group.incoming) for group in self],
            "bias": [_describe(group.biases) for group in self],
            "scale": [_describe(group.scales) for group in self],
            "statistics": [_describe(group.statistics) for group in self],
            "outgoing": [_describe([consumer.kernel for consumer in group.outgoing]) for group in self],
            "exact": ["-" if group.exact else "but for its normalization" for group in self],
        }
        # Columns that are empty for all groups are not shown, except for biases.
        columns = {
            name: cells
            for name, cells in columns.items()
            if name not in ("scale", "statistics", "exact") or set(cells) - {"-"}
        }
        widths = [max(map(len, (name, *cells))) for name, cells in columns.items()]
        lines = [
            "  ".join(
                cell.rjust(width) if name == "size" else cell.ljust(width)
                for name, cell, width in zip(columns, row, widths, strict=True)
            ).rstrip()
            for row in zip(*((name, *cells) for name, cells in columns.items()), strict=True)
        ]
        lines += [f"left out: {item.name} ({item.size} units): {item.reason}" for item in self.left_out]
        return "\n".join(lines)

    __repr__ = __str__


def _describe(parts: Sequence[ParamSlice]) -> str:
    texts = [part.path if part.positions == 1 else f"{part.path} (x{part.positions} positions)" for part in parts]
    if len(texts) > _SHOWN:
        texts = [*texts[: _SHOWN - 1], f"... ({len(texts)} in all)"]
    return ", ".join(texts) or "-"


def _quote(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'


class NoUnits(ValueError):
    """Raised if no unit of a network can be replaced, as in a linear network.

    Attributes:
      units: an empty `Units`, whose `left_out` lists the layers with reasons.
    """

    def __init__(self, units: Units):
        reasons = "; ".join(f"{item.name}: {item.reason}" for item in units.left_out)
        super().__init__(f"no units can be replaced in this network: {reasons or 'it applies no kernel'}")
        self.units = units


def check_units(units: Iterable[UnitGroup], params: Any) -> Units:
    """Check that every slice of the groups exists in the params.

    Args:
      units: groups.
      params: pytree of arrays.

    Returns:
      the groups, as `Units`.

    Raises:
      TypeError: something in units is not a `UnitGroup`.
      ValueError: there are no groups, two groups have the same name, or the params lack a slice.
    """
    units = units if isinstance(units, Units) else Units(units)
    if not units:
        raise ValueError("units is empty: there is nothing to replace; pass the groups of discover_units")
    leaves = leaves_by_path(params)
    for group in units:
        if not isinstance(group, UnitGroup):
            raise TypeError(f"units must be a sequence of UnitGroup; found {group!r}")
        operands = {consumer.operand for consumer in group.outgoing}
        if not group.incoming or operands != set(range(len(operands))) or not operands:
            raise ValueError(
                f"group {group.name!r} needs incoming and outgoing kernels, whose operands are numbered from 0; it has "
                f"{len(group.incoming)} incoming, and outgoing ones with operands {sorted(operands)}"
            )
        for consumer in group.outgoing:
            if consumer.bias is not None and consumer.bias not in leaves:
                raise ValueError(f"units do not match the params: group {group.name!r} needs {consumer.bias!r}")
        for part in group.slices():
            leaf = leaves.get(part.path)
            if leaf is None or not hasattr(leaf, "shape"):
                raise ValueError(
                    f"units do not match the params: group {group.name!r} needs {part.path!r}, "
                    f"but the params have {sorted(leaves)}"
                )
            rows = int(np.prod([leaf.shape[axis] for axis in part.axes if 0 <= axis < leaf.ndim]))
            if min(part.axes) < 0 or max(part.axes) >= leaf.ndim or rows != part.rows:
                raise ValueError(
                    f"units do not match the params: group {group.name!r} expects {part.rows} rows along "
                    f"axes {part.axes} of {part.path!r}, whose shape is {tuple(leaf.shape)}"
                )
    names = [group.name for group in units]
    if len(set(names)) != len(names):
        raise ValueError(f"units must have distinct names; found {names}")
    return units
