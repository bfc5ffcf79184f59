"""How a learner looks in pictures: its title, and the color, dashes and marker of its line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import xarray as xr

ATTRIBUTE = "looks"  # of results


class Style(NamedTuple):
    """A line: its color and dashes, as Matplotlib takes them, and its marker."""

    color: str
    dashes: str | tuple
    marker: str
    hollow: bool = False


# Okabe and Ito's palette, which the color-blind can tell apart, with wine red for its yellow, lost on
# white. Some of the colors are alike in gray: there, dashes and markers carry the difference alone.
BLUE = Style("#0072B2", "-", "o")
BLACK = Style("#000000", "-", "s")
VERMILION = Style("#D55E00", (0, (5, 1.5)), "^")
GREEN = Style("#009E73", (0, (6, 1.5, 1, 1.5)), "D")
PURPLE = Style("#CC79A7", (0, (2.5, 1)), "v")
ORANGE = Style("#E69F00", (0, (1, 1)), "P")
SKY = Style("#56B4E9", (0, (6, 1, 1, 1, 1, 1)), "X")
WINE = Style("#882255", (0, (9, 2)), "p")
RUST = Style("#A6341B", "-", ">")
GRAY = Style("#6B6B6B", (0, (4, 1, 1, 1)), "<")
PALETTE = (BLUE, BLACK, VERMILION, GREEN, PURPLE, ORANGE, SKY, WINE, RUST, GRAY)


class Look(NamedTuple):
    """How a learner is named and drawn, in every picture alike.

    Attributes:
      title: its name for readers.
      style: its line; by default one of the palette that no other learner of the picture has.
      strong: whether its line is drawn thicker, and above the others.
    """

    title: str
    style: Style | None = None
    strong: bool = False


def readable(name: str) -> str:
    """A title for a name of code.

    >>> readable("layer_norm")
    'Layer norm'
    """
    return name[:1].upper() + name[1:].replace("_", " ")


def to_json(looks: Mapping[str, Look]) -> str:
    """Looks by learner, as the text that results keep.

    >>> to_json({"cbp": Look("Continual backprop", BLUE)})
    '{"cbp": ["Continual backprop", ["#0072B2", "-", "o", false], false]}'
    """
    return json.dumps(looks)


def looks_of(results: xr.Dataset) -> dict[str, Look]:
    """The looks that results have with them, by learner; none in results that were saved without."""
    return {
        name: Look(title, None if style is None else _style(*style), strong)
        for name, (title, style, strong) in json.loads(results.attrs.get(ATTRIBUTE, "{}")).items()
    }


def _style(color: str, dashes: str | list, marker: str, hollow: bool) -> Style:
    if not isinstance(dashes, str):
        offset, lengths = dashes
        dashes = (offset, tuple(lengths))
    return Style(color, dashes, marker, hollow)
