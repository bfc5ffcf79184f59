"""Docstrings of the package as Markdown: their equations, links, roles and examples."""

import re
from typing import Any

import griffe

_MATH = re.compile(r"^( *)\.\. math::[ \t]*(.*(?:\n(?:\1[ \t]+.*|[ \t]*(?=\n\1[ \t]+\S)))*)", re.MULTILINE)
_INLINE = re.compile(r":math:`([^`]+)`")
_ROLE = re.compile(r":(?:func|class|meth|mod|attr):`~?([^`]+)`")
_LINK = re.compile(r"`([^`<]+?)\s*<(https?://[^>]+)>`__?", re.DOTALL)
_CODE = re.compile(r"``([^`]+)``")
_HEADING = re.compile(r"^(\S.*)\n-{4,}$", re.MULTILINE)
_TABLE = re.compile(r"^(=+)  =+\n(.*?)\n=+  =+\n(.*?)\n=+  =+$", re.MULTILINE | re.DOTALL)
_RETURNS = re.compile(r"^( *Returns:\n +)(?=\S)", re.MULTILINE)
_EXAMPLE = re.compile(r"^( *)>>> .*(?:\n\1\S.*|\n\1 +\S.*)*", re.MULTILINE)


class AsMarkdown(griffe.Extension):
    """Rewrites docstrings as griffe reads them."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """Return a docstring with its reStructuredText as Markdown."""
    text = _TABLE.sub(_table, text)
    text = _HEADING.sub(r"### \1", text)
    text = _MATH.sub(_display, text)
    text = _INLINE.sub(lambda match: f"${' '.join(match[1].split())}$", text)
    text = _ROLE.sub(r"`\1`", text)
    text = _LINK.sub(lambda match: f"[{' '.join(match[1].split())}]({match[2]})", text)
    text = _CODE.sub(r"`\1`", text)
    text = _RETURNS.sub(r"\1: ", text)  # what stands in front of a colon is taken for a type
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    return _EXAMPLE.sub(_fenced, text)


def _display(match: re.Match[str]) -> str:
    tex = " ".join(match[2].split())
    return f"\n{match[1]}$$\n{match[1]}{tex}\n{match[1]}$$\n"


def _fenced(match: re.Match[str]) -> str:
    return f"{match[1]}```pycon\n{match[0]}\n{match[1]}```"


def _table(match: re.Match[str]) -> str:
    """Return a table of two columns; the text of the second ends with a full stop."""
    width, rows = len(match[1]) + 2, []
    for line in (match[2] + "\n" + match[3]).splitlines():
        cells = [line[:width].strip(), line[width:].strip()]
        starts = not rows or (cells[0] and cells[1] and (len(rows) == 1 or rows[-1][1].endswith(".")))
        if starts:
            rows.append(cells)
        else:
            rows[-1] = [" ".join(filter(None, pair)) for pair in zip(rows[-1], cells, strict=True)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---|---|", *lines[1:]])
