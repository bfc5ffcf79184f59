"""Objects given by an import path, with settings: `my_package.my_module:my_function(width=64)`."""

import ast
import importlib
import operator
import os
import re
import sys
from typing import Any, NamedTuple

_PATH = re.compile(r"(?P<module>[\w.]+):(?P<attribute>[\w.]+)(?:\((?P<settings>.*)\))?", re.DOTALL)


class Found(NamedTuple):
    """An object found by its path."""

    path: str  # "module:attribute"
    value: Any
    settings: dict[str, Any]


def read(text: str, kind: str) -> Found | None:
    """Import the object that a text names.

    Its module is imported. Modules in the current directory are found too.

    Args:
      text: such as `"my_package.my_module:my_function(width=64)"`. The parentheses are optional.
      kind: what else the text could name, for error messages, such as "learner".

    Returns:
      the object, with its settings as in `read_settings`; None if the text does not have this form.

    Raises:
      ValueError: there is no such module or attribute, or the settings are malformed.

    Example:
      >>> read("math:gcd(width=64)", "function")
      Found(path='math:gcd', value=<built-in function gcd>, settings={'width': 64})
    """
    match = _PATH.fullmatch(text.strip())
    if match is None:
        return None
    value = _imported(match["module"], match["attribute"], kind)
    return Found(f"{match['module']}:{match['attribute']}", value, read_settings(match["settings"] or ""))


def path_of(function: Any) -> str:
    """Return the path of a function, a class, or an object's class: a text that is the same in every process.

    Example:
      >>> import math
      >>> path_of(math.gcd)
      'math:gcd'
    """
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def _imported(module: str, attribute: str, kind: str) -> Any:
    # At the end, so that nothing there shadows installed packages.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise ValueError(f"importing {module} failed: {error}") from error
        raise ValueError(f"there is no module {error.name!r} to import, and no {kind} of that name") from error
    except Exception as error:
        raise ValueError(f"importing {module} failed: {type(error).__name__}: {error}") from error
    try:
        return operator.attrgetter(attribute)(found)
    except AttributeError as error:
        where = getattr(found, "__file__", None) or "built in"
        raise ValueError(f"module {module!r} ({where}) has no {attribute!r}") from error


def read_settings(text: str) -> dict[str, Any]:
    """Parse settings as written between parentheses.

    Args:
      text: such as `"width=64, norm=layer, bias=false"`. Values are numbers, text (quoted or a bare word), true, false,
        None, and tuples of these.

    Returns:
      the values by name.

    Raises:
      ValueError: the text is malformed, or a name is given twice.

    Example:
      >>> read_settings("widths=(8, 16), norm=layer, bias=false")
      {'widths': (8, 16), 'norm': 'layer', 'bias': False}
    """
    try:
        call = ast.parse(f"f({text})", mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"expected settings as in (learning_rate=0.01, nesterov=true), got ({text})") from error
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise ValueError(f"settings are given by name, as in (learning_rate=0.01), got ({text})")
    settings = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise ValueError(f"settings are given by name, as in (learning_rate=0.01), got ({text})")
        if keyword.arg in settings:
            raise ValueError(f"{keyword.arg} is given twice")
        settings[keyword.arg] = _read_value(keyword.arg, keyword.value)
    return settings


def _read_value(name: str, node: ast.expr) -> Any:
    if isinstance(node, ast.Name):  # a bare word, so that no quotes are needed in a shell
        if node.id.lower() in ("inf", "nan"):
            raise ValueError(f"{name} must be a finite number of float32, got {node.id.lower()}")
        return {"true": True, "false": False}.get(node.id, node.id)
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise ValueError(f"{name} must be a number, text, true, false or a tuple, got {ast.unparse(node)}") from error
