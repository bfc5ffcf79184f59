"""Tables of text."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], left: int | None = 1) -> list[str]:
    """Return the lines of a table.

    Args:
      rows: cells; the first row is the header, and gets a rule below it.
      left: number of columns that are aligned left, and the others right; None for all.

    Example:
      >>> print("\\n".join(text_table([("method", "loss"), ("bp", "0.5")])))
      method  loss
      ------------
      bp       0.5
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left_aligned = len(widths) if left is None else left
    lines = []
    for row in rows:
        cells = map(str.ljust, row[:left_aligned], widths), map(str.rjust, row[left_aligned:], widths[left_aligned:])
        lines.append("  ".join(cell for side in cells for cell in side))
    lines = [line.rstrip() for line in lines] if left is None else lines
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
