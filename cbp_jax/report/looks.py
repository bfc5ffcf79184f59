"""Appearance of learners in pictures: title, and color, dashes and marker of the line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import xarray as xr

ATTRIBUTE = "looks"  # of results


class Style(NamedTuple):
    """A line style: color, dashes and marker, in Matplotlib's notation."""

    color: str
    dashes: str | tuple
    marker: str
    hollow: bool = False


# Okabe and Ito's palette for color-blind readers, with wine red instead of yellow, which is invisible on white. Some of
# the colors are alike in gray; then only dashes and markers distinguish them.
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
    """How a learner is named and drawn, in all pictures.

    Attributes:
      title: its name for readers.
      style: its line style; by default one of the palette that no other learner in the picture has.
      strong: whether its line is drawn thicker, and above the others.
    """

    title: str
    style: Style | None = None
    strong: bool = False


def readable(name: str) -> str:
    """A title for a name in code.

    >>> readable("layer_norm")
    'Layer norm'
    """
    return name[:1].upper() + name[1:].replace("_", " ")


def to_json(looks: Mapping[str, Look]) -> str:
    """Looks by learner, as text to store in results.

    >>> to_json({"cbp": Look("Continual backprop", BLUE)})
    '{"cbp": ["Continual backprop", ["#0072B2", "-", "o", false], false]}'
    """
    return json.dumps(looks)


def looks_of(results: xr.Dataset) -> dict[str, Look]:
    """The looks stored in results, by learner; empty if there are none."""
    return {
        name: Look(title, None if style is None else _style(*style), strong)
        for name, (title, style, strong) in json.loads(results.attrs.get(ATTRIBUTE, "{}")).items()
    }


def _style(color: str, dashes: str | list, marker: str, hollow: bool) -> Style:
    if not isinstance(dashes, str):
        offset, lengths = dashes
        dashes = (offset, tuple(lengths))
    return Style(color, dashes, marker, hollow)
