"""Expands methods and a grid of settings to one method for each combination."""

import inspect
import itertools
import re
from collections.abc import Mapping, Sequence

from cbp_jax import by_path
from cbp_jax.experiments.learners.factory import GIVEN_BY_THE_RUN
from cbp_jax.experiments.learners.method import Method, settings_of
from cbp_jax.experiments.learners.registry import LEARNERS
from cbp_jax.experiments.learners.text import parse_method


def read_grid(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Parse the settings of a grid.

    Args:
      texts: such as `["replacement_rate=1e-4,1e-5", "step_size=0.01,0.003"]`.

    Returns:
      the values of each setting, as texts.

    Raises:
      ValueError: a text is malformed, or a setting or a value is given twice.

    Example:
      >>> read_grid(["replacement_rate=1e-4,1e-5"])
      {'replacement_rate': ('1e-4', '1e-5')}
    """
    grid: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, equals, given = text.partition("=")
        values = tuple(value.strip() for value in re.split(r",(?![^()]*\))", given))  # but not at the commas of a tuple
        if not equals or not name.isidentifier() or not all(values):
            raise ValueError(f"grid must be settings with their values, as in step_size=0.01,0.003, got {text!r}")
        if name in grid:
            raise ValueError(f"grid must have each setting once, got {name} twice")
        if len(set(values)) < len(values):
            raise ValueError(f"grid must have each value of a setting once, got {text!r}")
        grid[name] = values
    return grid


def expand(methods: Sequence[str], grid: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Expand each method to all combinations of the grid's settings that it has.

    Args:
      methods: texts as for `parse_method`. A method without any of the settings is not changed.
      grid: values of settings, from `read_grid`.

    Returns:
      texts of methods, in the order of the methods and, for each, with the last setting changing first.

    Raises:
      ValueError: a method is unknown, a method already has a value for one of the settings, or no method has a setting.

    Example:
      >>> expand(["bp", "cbp:utility=weight"], {"replacement_rate": ("1e-4", "1e-5")})
      ('bp', 'cbp:utility=weight,replacement_rate=1e-4', 'cbp:utility=weight,replacement_rate=1e-5')
    """
    unused, expanded = dict.fromkeys(grid), []
    for text in methods:
        settings, given = _settings(text)
        names = [name for name in grid if name in settings]
        for name in names:
            unused.pop(name, None)
            if name in given:
                raise ValueError(f"grid must leave {name} out, or method {text!r} must: it is given in both")
        for values in itertools.product(*(grid[name] for name in names)):
            expanded.append(_with(text, dict(zip(names, values, strict=True))))
    if unused:
        known = sorted({name for text in methods for name in _settings(text)[0]})
        raise ValueError(
            f"grid must have settings of methods, and no method has {', '.join(unused)}; "
            f"{' '.join(methods)} have {', '.join(known)}"
        )
    return tuple(expanded)


def _settings(text: str) -> tuple[set[str], set[str]]:
    """Return names of settings that a method's text can have, and of those that it has."""
    if text.partition(":")[0] in LEARNERS:
        method = parse_method(text)
        return _of_class(type(method)), set(method.given)
    # A function is not called yet, because it may need settings from the grid.
    found = by_path.read(text, "learner")
    if found is None:
        return set(), set(parse_method(text).given)  # raises a helpful error
    if isinstance(found.value, type) and issubclass(found.value, Method):
        return _of_class(found.value), set(found.settings)
    try:
        own = set(inspect.signature(found.value).parameters) - set(GIVEN_BY_THE_RUN)
    except (TypeError, ValueError):  # the error is reported when the method is parsed
        own = set()
    return own | _of_class(Method), set(found.settings)


def _of_class(learner: type[Method]) -> set[str]:
    return {name for name, setting in settings_of(learner).items() if setting.read is not None}


def _with(text: str, settings: Mapping[str, str]) -> str:
    """Return the text of a method with more settings."""
    if not settings:
        return text
    given = [f"{name}={value}" for name, value in settings.items()]
    name, _, rest = text.partition(":")
    if name in LEARNERS:
        return f"{name}:{','.join([*([rest] if rest else []), *given])}"
    path, _, inside = text.strip().removesuffix(")").partition("(")
    return f"{path}({', '.join([*([inside] if inside.strip() else []), *given])})"
