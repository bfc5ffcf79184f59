"""Real texts that every installation has: docstrings of libraries, labeled by library or by kind."""

import ast
import collections
import functools
import hashlib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

# The dependencies of cbp_jax, and theirs.
LIBRARIES = ("jax", "flax", "numpy", "optax", "scipy", "chex")
KINDS = ("class", "function", "method", "module")
LEAST_WORDS = 8
_MOST_WORDS = 100
_PER_LIBRARY = 600

# Where the prose ends. The form of sections would identify libraries immediately.
_SECTION = re.compile(
    r"^\s*(args?|arguments|parameters|returns?|raises|yields|examples?|notes?|attributes|references|see also|usage|"
    r"warnings?|methods)\s*:{0,2}\s*$|^\s*(-{3,}|={3,}|>>>|\.\. )",
    re.IGNORECASE | re.MULTILINE,
)
# Names, with their usual aliases; long ones also within other words, such as "jaxpr" and "jax_enable_x64".
_NAMES = re.compile(
    r"\w*(?:jax|flax|numpy|optax|scipy|chex)\w*|\b(?:jnp|xla|pjit|linen|nnx|nn|np|ndarray|sp|deepmind|google)\b",
    re.IGNORECASE,
)
_HIDDEN = "library"
_BODIES = ("body", "handlers", "orelse", "finalbody", "cases")  # fields of nodes that contain statements


def docstrings(by: str) -> tuple[list[str], list[str]]:
    """Return the prose of docstrings of installed libraries.

    Modules are parsed, not run. Clues to the label are hidden: names of libraries become "library", and everything
    after the prose, such as a list of arguments, is removed. Short texts and duplicates are left out. The texts depend
    on the installed versions.

    Args:
      by: the label: "library", or "kind", the kind of object that is documented.

    Returns:
      texts, and their labels.

    Raises:
      ValueError: `by` is unknown.

    Example:
      >>> texts, labels = docstrings("kind")
      >>> sorted(set(labels))
      ['class', 'function', 'method', 'module']
    """
    if by not in ("library", "kind"):
        raise ValueError(f"by must be 'library' or 'kind', got {by!r}")
    column = ("library", "kind").index(by)
    found: dict[str, str] = {}
    for library in LIBRARIES:
        for text, kind in _of_library(library):
            found.setdefault(text, (library, kind)[column])
    return list(found), list(found.values())


@functools.cache
def _of_library(library: str) -> tuple[tuple[str, str], ...]:
    """Return texts and kinds."""
    spec = importlib.util.find_spec(library)
    folders = spec.submodule_search_locations if spec is not None else None
    if not folders:
        return ()
    root = Path(next(iter(folders)))
    files = [path for path in root.rglob("*.py") if "test" not in path.relative_to(root).as_posix()]
    # In an order that covers the library evenly and is the same on every machine.
    files.sort(key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest())
    found: dict[str, str] = {}
    for path in files:
        for docstring, kind in _of_file(path):
            text = _prose(docstring)
            if len(text.split()) >= LEAST_WORDS:
                found.setdefault(text, kind)
        if len(found) >= _PER_LIBRARY:
            break
    return tuple(found.items())


def _of_file(path: Path) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node, parent in _statements(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring:
                plain = {ast.Module: "module", ast.ClassDef: "class"}.get(type(node), "function")
                yield docstring, "method" if plain == "function" and isinstance(parent, ast.ClassDef) else plain


def _statements(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.AST | None]]:
    """Yield a module and its statements with their parents, in the order of `ast.walk`, which is slower."""
    found: collections.deque[tuple[ast.AST, ast.AST | None]] = collections.deque([(tree, None)])
    while found:
        node, parent = found.popleft()
        yield node, parent
        for field in node._fields:
            if field in _BODIES:
                found.extend((child, node) for child in getattr(node, field))


def _prose(docstring: str) -> str:
    text = inspect.cleandoc(docstring)
    end = _SECTION.search(text)
    words = _NAMES.sub(_HIDDEN, text[: end.start()] if end else text).split()
    return " ".join(words[:_MOST_WORDS])
