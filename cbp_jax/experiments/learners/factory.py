"""A user's own transformation as a method: a function, given by its path or directly."""

import dataclasses
import functools
import inspect
import numbers
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Self

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import cbp_jax
from cbp_jax import by_path
from cbp_jax.experiments.learners.method import Method, check_finite, settings_of
from cbp_jax.experiments.learners.search import Space, check_space
from cbp_jax.report.looks import Look, readable
from cbp_jax.units import Units

# Arguments that a factory may have besides settings.
GIVEN_BY_THE_RUN = ("units", "key")


class NoTransformation(ValueError):
    """Raised if a function does not return an optax transformation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Custom(Method):
    """A method whose optimizer is created by a function; see `custom`.

    Attributes:
      path: its name in results: "module:function".
      factory: the function; `custom` describes its arguments and its result.
      settings: all its keyword arguments except `units` and `key`, as pairs.
      traced: names of the settings that are traced.
      second_order: whether its update needs `hessian_diag`.
    """

    name = "custom"
    about = "a function that makes an optax transformation"

    path: str
    factory: Callable[..., optax.GradientTransformation]
    settings: tuple[tuple[str, Any], ...] = ()
    traced: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    second_order: bool = dataclasses.field(default=False, compare=False)

    @property
    def learner(self) -> str:
        """See `Method`."""
        return self.path

    @property
    def look(self) -> Look:
        """See `Method`."""
        return Look(readable(self.path.rpartition(":")[2].rpartition(".")[2]))

    @property
    def space(self) -> Space:
        """The function's `space`, if it has one; see `Method`."""
        return check_space(getattr(self.factory, "space", {}), self.path)

    @property
    def text(self) -> str:
        """See `Method`."""
        given = ", ".join(f"{name}={_written(value)}" for name, value in self._values(self.given).items())
        return f"{self.path}({given})"

    @property
    def hyperparameters(self) -> dict[str, float]:
        """See `Method`."""
        return {name: float(value) for name, value in self.settings if name in self.traced}

    @property
    def options(self) -> dict[str, Any]:
        """See `Method`."""
        return super().options | {name: value for name, value in self.settings if name not in self.traced}

    @property
    def curvature(self) -> bool:
        """See `Method`."""
        return self.second_order

    def with_numbers(self, numbers: Mapping[str, chex.Numeric]) -> Self:
        """See `Method`."""
        return dataclasses.replace(self, settings=tuple((dict(self.settings) | dict(numbers)).items()))

    def with_settings(self, values: Mapping[str, Any]) -> Self:
        """See `Method`."""
        return custom(self.factory, self._values(self.given) | dict(values), path=self.path)

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """See `Method`."""
        names = inspect.signature(self.factory).parameters
        run = {name: value for name, value in (("units", units), ("key", key)) if name in names}
        tx = self.factory(**dict(self.settings), **run)
        if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
            raise NoTransformation(f"it must return an optax transformation, with init and update, got {tx!r}")
        return tx

    def _values(self, names: tuple[str, ...]) -> dict[str, Any]:
        settings = dict(self.settings)
        return {name: settings[name] if name in settings else getattr(self, name) for name in names}


def read_path(text: str) -> Method | None:
    """Parse a method of the form `module:function(name=value, ...)`.

    The module is imported; modules in the current directory are found. Values are numbers, text (quoted or a bare
    word), true, false, None, and tuples of these.

    Args:
      text: such as `"my_package.my_module:my_factory(learning_rate=0.01)"`. The parentheses are optional. Instead of a
        function, it may name a subclass of `Method`.

    Returns:
      the method; None if the text does not have this form.

    Raises:
      ValueError: there is no such module or function, or a setting is unknown or not allowed.

    Example:
      >>> read_path("optax:adam(learning_rate=1e-3)").hyperparameters["learning_rate"]
      0.001
    """
    found = by_path.read(text, "learner")
    if found is None:
        return None
    path, factory, settings = found
    if isinstance(factory, type) and issubclass(factory, Method):
        known = {name: setting for name, setting in settings_of(factory).items() if setting.read is not None}
        _check_known(settings, known)
        return factory(**settings, given=tuple(settings))
    return custom(factory, settings, path=path)


def custom(
    factory: Callable[..., optax.GradientTransformation],
    settings: Mapping[str, Any] | None = None,
    *,
    path: str | None = None,
) -> Method:
    """Return a method whose optimizer a function makes.

    The function is called with settings as keyword arguments, and, if its signature has them, with `units`, those of
    the network (see `discover_units`), and `key`, a different key for each seed. It returns an
    `optax.GradientTransformation`, whose `init` and `update` get all weights of the network. If `update` accepts extra
    arguments, it gets `features`, the activations of the units by group, and, if it fails without, `hessian_diag`, the
    diagonal of the Hessian, with the weights' structure (on streams of tasks, whose networks are feed-forward).

    Settings are the function's arguments that have a default or are given here. Floating-point numbers (0.1, 1.0, and
    values of arguments whose default is one) are traced: methods that differ only in these run as lanes of one program.
    If the function needs one of them as a Python number, as in `if momentum > 0:`, each value is compiled separately,
    with a warning. Integers, text and so on are never traced. `activation`, `normalization`, `dropout_rate` and
    `hidden` are settings of the network, as with any method, unless the function has arguments of these names. An
    experiment's schedule multiplies the setting called `learning_rate` or `step_size`. An attribute `space` of the
    function defines the search space for comparisons with an equal tuning budget: by name a `LogUniform`, or a tuple of
    values.

    Args:
      factory: the function, or a `functools.partial` with settings.
      settings: settings by name.
      path: its name in results; by default its module and name.

    Raises:
      ValueError: it cannot be called with these settings, or does not return a transformation.

    Example:
      >>> def signed(learning_rate, momentum=0.9):
      ...     return optax.chain(optax.trace(momentum), optax.scale_by_sign(), optax.scale(-learning_rate))
      >>> custom(functools.partial(signed, learning_rate=0.01)).hyperparameters
      {'learning_rate': 0.01, 'momentum': 0.9}
    """
    settings = dict(settings or {})
    if not callable(factory):
        raise ValueError(f"{path or 'a method'} must be a function that makes a transformation, got {factory!r}")
    while isinstance(factory, functools.partial):
        settings = _bound(factory) | settings
        factory = factory.func
    path = path or by_path.path_of(factory)
    parameters = _parameters(factory, path)
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    own = {
        name: each
        for name, each in parameters.items()
        if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY) and name not in GIVEN_BY_THE_RUN
    }
    of_network = {name: settings[name] for name in settings_of(Method) if name in settings and name not in own}
    given = {name: value for name, value in settings.items() if name not in of_network}
    for name in GIVEN_BY_THE_RUN:
        if name in given:
            raise ValueError(f"{path}: {name} is given by the run, and is no setting")
    if not anything:
        _check_known(given, own)
    missing = [name for name, each in own.items() if each.default is each.empty and name not in given]
    if missing:
        raise ValueError(f"{path} needs a value of {', '.join(missing)}")
    for name, value in given.items():
        if name in own and isinstance(own[name].default, float):
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise ValueError(f"{name} must be a number, got {value!r}")
            given[name] = value = float(value)
        if isinstance(value, float):
            check_finite(name, value)
        elif not _hashable(value):
            raise ValueError(f"{name} must be a number, text or a tuple, got {value!r}")
    values = {name: given.get(name, each.default) for name, each in own.items()} | given
    values = {name: value for name, value in values.items() if _hashable(value)}
    method = Custom(path=path, factory=factory, settings=tuple(values.items()), given=tuple(settings), **of_network)
    return _tried(method)


def _bound(partial: functools.partial) -> dict[str, Any]:
    """Return the settings in a partial, by name."""
    if not partial.args:
        return dict(partial.keywords)
    return dict(inspect.signature(partial.func).bind_partial(*partial.args, **partial.keywords).arguments)


def _written(value: Any) -> str:
    """Return a setting as text that is the same in every process."""
    return by_path.path_of(value) if callable(value) else repr(value)


def _parameters(factory: Callable[..., Any], path: str) -> Mapping[str, inspect.Parameter]:
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: its arguments cannot be determined ({error}); wrap it in a function") from error
    for name, each in parameters.items():
        if each.kind is each.POSITIONAL_ONLY and each.default is each.empty:
            raise ValueError(f"{path}: its argument {name} cannot be given by name; wrap it in a function")
    return parameters


def _check_known(settings: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for name in settings:
        if name not in known:
            others = [other for other in settings_of(Method) if other not in known]
            rest = f"; {', '.join(others)} can be set too" if others else ""
            raise ValueError(f"expected settings of {list(known)}, got {name!r}{rest}")


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _tried(method: Custom) -> Custom:
    """Probe the method's transformation by tracing it on a small network. Nothing is computed.

    Raises:
      ValueError: the factory fails, or does not return a transformation.
    """
    _, units = _small_network()
    made = _error_of(lambda: method.build(units, jax.random.key(0)) and None)
    if isinstance(made, NoTransformation):
        raise ValueError(f"{method.path}: {made}") from made
    if made is not None and "units" not in inspect.signature(method.factory).parameters:
        raise ValueError(f"{method.path}: {_first_line(made)}") from made
    error = _update_error(method, {})
    if error is not None:
        method = dataclasses.replace(method, second_order=True)
        if _update_error(method, {}) is not None:
            # It may work only with the experiment's network, so it cannot be probed.
            warnings.warn(
                f"{method.path} fails on a small network ({_first_line(error)}): methods that differ in its numbers "
                "are compiled one by one",
                stacklevel=3,
            )
            return dataclasses.replace(method, second_order=False)
    floats = {name: value for name, value in method.settings if isinstance(value, float) and np.isfinite(value)}
    error = _update_error(method, floats)
    traced = tuple(floats)
    if error is not None:
        alone = {name: value for name, value in floats.items() if _update_error(method, {name: value}) is None}
        traced = tuple(alone) if _update_error(method, alone) is None else ()
        untraced = [name for name in floats if name in method.given and name not in traced]
        if untraced:
            warnings.warn(
                f"{method.path} needs {', '.join(untraced)} as Python numbers ({type(error).__name__}): methods that "
                "differ in these are compiled one by one",
                stacklevel=3,
            )
    return dataclasses.replace(method, traced=traced)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _error_of(function: Callable[..., Any], *args: Any) -> Exception | None:
    """Return the error when the function is traced, or None."""
    try:
        jax.eval_shape(function, *args)
    except Exception as error:
        return error
    return None


def _update_error(method: Custom, traced: Mapping[str, float]) -> Exception | None:
    """Return the error when an update of the method's transformation is traced with these numbers traced, or None."""
    params, units = _small_network()
    features = {group.name: jax.ShapeDtypeStruct((1, group.size), jnp.float32) for group in units}
    extra = {"hessian_diag": params} if method.curvature else {}

    def step(traced, params, features, extra):
        # The key is created in here, so that no device is initialized.
        tx = optax.with_extra_args_support(method.with_numbers(traced).build(units, jax.random.key(0)))
        return tx.update(params, tx.init(params), params, features=features, **extra)

    return _error_of(step, dict(traced), params, features, extra)


@functools.cache
def _small_network() -> tuple[Any, Units]:
    net = nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(3), nn.relu, nn.Dense(2)])
    x = jax.ShapeDtypeStruct((1, 2), jnp.float32)
    params = jax.eval_shape(lambda x: net.init(jax.random.key(0), x), x)
    return params, cbp_jax.discover_units(net.apply, params, x, check=True)
