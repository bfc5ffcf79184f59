"""Parses methods given by a user as texts, functions, or methods."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cbp_jax.experiments.learners.factory import custom, read_path
from cbp_jax.experiments.learners.method import Method, Setting, settings_of
from cbp_jax.experiments.learners.registry import LEARNERS


def parse_method(text: str, known: Mapping[str, type[Method]] = LEARNERS) -> Method:
    """Parse a method: a learner's name, optionally followed by a colon and settings; or a path.

    Args:
      text: such as `"cbp"` or `"cbp:replacement_rate=1e-5,utility=weight"`. Every learner also takes the network's
        `activation`, `normalization`, `dropout_rate` and `hidden`, sizes of its hidden layers as in `hidden=100x100`,
        or `hidden=none` for a linear network. Some learners with SGD take `momentum`. These and learners with Adam take
        `reset`, "head" or "network", to reinitialize it before each task but the first, or, with `reset_every=1000`,
        every 1,000 updates. Your own function is given as `"my_package.my_module:my_factory(learning_rate=0.01)"`; see
        `custom`.
      known: the learners by name.

    Returns:
      the method.

    Raises:
      ValueError: the learner or setting is unknown, or a value does not fit.

    Example:
      >>> method = parse_method("cbp:replacement_rate=1e-5")
      >>> method.label, method.hyperparameters["replacement_rate"], method.options["utility"]
      ('cbp(replacement_rate=1e-05)', 1e-05, 'contribution')
    """
    try:
        return _parsed(text, known)
    except (TypeError, ValueError) as error:
        raise ValueError(f"method {text!r}: {error}") from error


def _parsed(text: str, known: Mapping[str, type[Method]]) -> Method:
    name, _, given = text.partition(":")
    if name not in known:
        found = read_path(text)
        if found is None:
            raise ValueError(
                f"the learner must be one of {list(known)}, or a function's path as in "
                f"my_module:my_factory(learning_rate=0.01), got {name!r}"
            )
        return found
    settings = {name: setting for name, setting in settings_of(known[name]).items() if setting.read is not None}
    changed: dict[str, Any] = {}
    for item in given.split(",") if given else ():
        key, equals, value = item.partition("=")
        if not equals or key not in settings:
            own, others = ([name for name in settings if settings[name].optional == given] for given in (False, True))
            raise ValueError(
                f"expected setting=value with one of {own}, got {item!r}; {', '.join(others)} can be set too"
            )
        if key in changed:
            raise ValueError(f"{key} is given twice")
        changed[key] = _read(settings[key], key, value)
    return known[name](**changed, given=tuple(changed))


def _read(setting: Setting, key: str, value: str) -> Any:
    try:
        return setting.read(value)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{key} must be {setting.kind}, got {value!r}") from error


def read_methods(
    given: Sequence[str | Method | Callable[..., Any]],
    *,
    activation: str | None = None,
    known: Mapping[str, type[Method]] = LEARNERS,
) -> list[Method]:
    """Parse the methods of a comparison.

    Args:
      given: texts (see `parse_method`), methods, or functions that create an optax transformation (see `custom`), such
        as `functools.partial(my_factory, learning_rate=0.01)`.
      activation: activation of the experiment's network, for methods that do not set their own.
      known: the learners by name.

    Returns:
      the methods.

    Raises:
      ValueError: there are no methods, two are the same, or one is unknown.

    Example:
      >>> read_methods(["bp", "bp:step_size=0.01"])
      Traceback (most recent call last):
      ...
      ValueError: methods must differ, and 'bp' and 'bp:step_size=0.01' have the same settings
    """
    if isinstance(given, str) or not given:
        raise ValueError(f"methods must name at least one of {list(known)}, got {given!r}")
    methods = [_method(one, known) for one in given]
    seen: dict[Any, int] = {}
    for i, method in enumerate(methods):
        settings = method if method.activation or not activation else dataclasses.replace(method, activation=activation)
        for what, same in ((settings, "have the same settings"), (method.label, "have the same name in results")):
            first = seen.setdefault(what, i)
            if first != i:
                raise ValueError(f"methods must differ, and {_told(given[first])} and {_told(given[i])} {same}")
    return methods


def texts_of(given: Sequence[Any], methods: Sequence[Method]) -> tuple[str, ...]:
    """Return the given methods as texts for `read_methods`; the text of a function is the same in every process."""
    return tuple(one if isinstance(one, str) else method.text for one, method in zip(given, methods, strict=True))


def _method(given: Any, known: Mapping[str, type[Method]] = LEARNERS) -> Method:
    if isinstance(given, str):
        return parse_method(given, known)
    if isinstance(given, Method):
        return given
    if isinstance(given, type) and issubclass(given, Method):
        return given()
    if callable(given):
        return custom(given)
    raise ValueError(f"a method must be a text, a Method, or a function, got {given!r}")


def _told(given: Any) -> str:
    return repr(given if isinstance(given, str) else _method(given).text)
