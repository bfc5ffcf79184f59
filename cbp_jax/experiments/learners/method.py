"""The class `Method`: a learner with its settings, as a frozen dataclass; and the kinds of settings."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import chex
import jax
import numpy as np
import optax

from cbp_jax import by_path, nets
from cbp_jax.experiments.learners.search import Space
from cbp_jax.numerics.scalars import check_scalar
from cbp_jax.report.looks import Look
from cbp_jax.units import Units


@dataclasses.dataclass(frozen=True)
class Setting:
    """Metadata of a setting.

    Attributes:
      check: `check(name, value)` raises a ValueError or a TypeError if the value is not allowed.
      read: parses a value; None for settings that can be given only from Python.
      kind: what `read` expects, for error messages.
      traced: whether methods that differ only in this setting are lanes of one program.
      optional: whether the setting belongs to a method, and to its results, only if it is given.
    """

    check: Callable[[str, Any], None]
    read: Callable[[str], Any] | None = str
    kind: str = "text"
    traced: bool = False
    optional: bool = False


def ranged(
    default: float,
    *,
    at_least: float | None = 0.0,
    at_most: float | None = None,
    below: float | None = None,
    traced: bool = True,
    optional: bool = False,
) -> Any:
    """Return a field for a finite number in a range.

    Args:
      default: its default.
      at_least: smallest value allowed.
      at_most: largest value allowed.
      below: exclusive upper bound.
      traced: whether it is an argument of the compiled program, so that methods that differ in it share a program.
      optional: see `Setting`.

    Example:
      >>> @dataclasses.dataclass(frozen=True, kw_only=True)
      ... class Noisy(Method):
      ...     name = "noisy"
      ...     step_size: float = ranged(0.01)
      ...     decay: float = ranged(0.9, below=1)
      >>> Noisy(decay=1.5)
      Traceback (most recent call last):
      ...
      ValueError: decay must be in [0, 1), got 1.5
    """

    def check(name: str, value: Any) -> None:
        check_scalar(name, value, at_least=at_least, at_most=at_most, below=below)
        if not isinstance(value, jax.core.Tracer):
            check_finite(name, value)

    return _field(default, Setting(check, float, "a number", traced=traced, optional=optional))


def check_finite(name: str, value: float) -> None:
    """Raise a ValueError if a number is not finite in float32, the precision of programs."""
    with np.errstate(over="ignore"):
        if not np.isfinite(np.float32(value)):
            raise ValueError(f"{name} must be a finite number of float32, got {value:g}")


def count(default: int | None, *, optional: bool = False) -> Any:
    """Return a field for a positive integer, or also None if that is the default."""

    def check(name: str, value: Any) -> None:
        if value is None and default is None:
            return
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise ValueError(f"{name} must be an integer, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")

    return _field(default, Setting(check, int, "a number", optional=optional))


def flag(default: bool) -> Any:
    """Return a field for true or false."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {value!r}")

    return _field(default, Setting(check, lambda text: {"true": True, "false": False}[text.lower()], "true or false"))


def choice(default: Any, *others: Any, optional: bool = False) -> Any:
    """Return a field for one of some values, all strings or all integers."""
    allowed = (default, *others)

    def check(name: str, value: Any) -> None:
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")

    kind = "text" if isinstance(default, str) else "a number"
    return _field(default, Setting(check, type(default), kind, optional=optional))


def named(default: str | None, get: Callable[[Any], Any], *, optional: bool = False) -> Any:
    """Return a field for a name that a function accepts; otherwise the function raises a ValueError."""

    def check(name: str, value: Any) -> None:
        if value is not None:
            get(value)

    return _field(default, Setting(check, optional=optional))


def sizes(default: tuple[int, ...] | None = None) -> Any:
    """Return a field for the sizes of layers, written as 100x100, or none for no layers."""

    def check(name: str, value: Any) -> None:
        if value is None and default is None:
            return
        if not isinstance(value, tuple) or not all(isinstance(size, int) and size >= 1 for size in value):
            raise ValueError(f"{name} must be a tuple of sizes of at least 1, got {value!r}")

    read = lambda text: () if text == "none" else tuple(int(size) for size in text.split("x"))
    return _field(default, Setting(check, read, "sizes as in 100x100, or none", optional=True))


def of_python(default: Any = None) -> Any:
    """Return a field that can be given only from Python."""
    return _field(default, Setting(lambda name, value: None, read=None, optional=True))


def _field(default: Any, setting: Setting) -> Any:
    return dataclasses.field(default=default, metadata={"setting": setting})


def settings_of(learner: "type[Method] | Method") -> dict[str, Setting]:
    """Return the settings of a learner by name: first its own, traced before others, then optional ones."""
    found = {
        field.name: field.metadata["setting"] for field in dataclasses.fields(learner) if "setting" in field.metadata
    }
    return dict(sorted(found.items(), key=lambda item: (item[1].optional, not item[1].traced)))


def defaults_of(learner: "type[Method]") -> dict[str, Any]:
    """Return the defaults of a learner's own settings, by name."""
    own = [name for name, setting in settings_of(learner).items() if not setting.optional]
    return {name: learner.__dataclass_fields__[name].default for name in own}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A learner with its settings. The class is the learner, its fields are the settings.

    To add a learner, write a subclass: a frozen dataclass with keyword-only arguments, with `name`, `about`, `look`, a
    field for each setting (`ranged`, `choice`, ..., which are checked when a method is created), and `build`. A row in
    `learners.LEARNERS` makes it available by name.

    Attributes:
      activation: activation of the network's hidden layers; None for that of the experiment.
      normalization: normalization of the network's hidden layers.
      dropout_rate: dropout rate of the network's hidden units.
      hidden: sizes of the network's hidden layers, which may be empty, for a linear network; None for those of the
        experiment.
      given: names of the settings that were given, which its label shows; by default all that differ from their
        defaults.

    Example:
      >>> from cbp_jax.experiments.learners import ContinualBackprop
      >>> method = ContinualBackprop(replacement_rate=1e-5)
      >>> method.label, method.hyperparameters["step_size"]
      ('cbp(replacement_rate=1e-05)', 0.01)
    """

    name: ClassVar[str]  # name in texts and results
    about: ClassVar[str]  # one line for lists
    look: ClassVar[Look]  # look in pictures
    # Search space for comparisons with an equal tuning budget. A subclass declares only what it adds to its bases.
    space: ClassVar[Space] = {}
    needs_units: ClassVar[bool] = False  # whether it requires a network with hidden units
    # What is reinitialized before each task but the first: "head" or "network". It is not annotated, because even a
    # ClassVar would hide the field of that name in some bases of a subclass.
    reset = ""
    reference = 0  # how many earlier batches the optimizer gets with each update, as `reference`
    inject_at = None  # the task before which a fresh head is injected; see `training.with_injection`
    reset_every = None  # number of updates between resets, instead of before each task

    activation: str | None = named(None, nets.get_activation, optional=True)
    normalization: str = choice("", *nets.NORMALIZATIONS, optional=True)
    dropout_rate: float = ranged(0.0, below=1, traced=False, optional=True)
    hidden: tuple[int, ...] | None = sizes()
    given: tuple[str, ...] | None = dataclasses.field(default=None, compare=False, repr=False)

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        own = vars(cls).get("space", {})
        if isinstance(own, Mapping):  # not a property
            bases = [vars(base).get("space", {}) for base in reversed(cls.__mro__[1:])]
            cls.space = {name: values for space in (*bases, own) for name, values in space.items()}

    def __post_init__(self):
        for name, setting in settings_of(self).items():
            setting.check(name, getattr(self, name))
        if not self.reset and self.reset_every:  # in this order, because with a reset the number may be traced
            raise ValueError("reset_every says when, and reset must say what is reinitialized: 'head' or 'network'")
        if self.given is None:
            fields = self.__dataclass_fields__
            changed = (name for name in settings_of(self) if getattr(self, name) != fields[name].default)
            object.__setattr__(self, "given", tuple(changed))

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """Create the optimizer of the network's weights.

        Args:
          units: the units of the network.
          key: key for the optimizer's random numbers.
        """
        raise NotImplementedError

    @property
    def learner(self) -> str:
        """Its learner's name."""
        return self.name

    @property
    def label(self) -> str:
        """Its name in results: its learner, and the given settings."""
        shown = ", ".join(f"{name}={_shown(value)}" for name, value in self._values(self.given).items())
        return f"{self.learner}({shown})" if shown else self.learner

    @property
    def text(self) -> str:
        """Its text, from which `parse_method` creates it."""
        given = ",".join(f"{name}={_written(value)}" for name, value in self._values(self.given).items())
        return f"{self.learner}:{given}" if given else self.learner

    @property
    def hyperparameters(self) -> dict[str, float]:
        """Its traced numbers."""
        traced = [name for name, setting in settings_of(self).items() if setting.traced]
        return {name: float(value) for name, value in self._values(traced).items()}

    @property
    def options(self) -> dict[str, Any]:
        """Its settings that are not traced. Methods of one learner with equal options run as lanes of one program."""
        found = settings_of(self).items()
        return self._values(
            [name for name, setting in found if not setting.traced and (not setting.optional or name in self.given)]
        )

    @property
    def texts(self) -> dict[str, str]:
        """Its options that are text, true or false, or sizes, as its label shows them.

        Example:
          >>> from cbp_jax.experiments.learners import parse_method
          >>> parse_method("cbp:hidden=20x20").texts
          {'utility': 'contribution', 'compensate_bias': 'False', 'hidden': '20x20'}
        """
        return {name: _shown(value) for name, value in self.options.items() if isinstance(value, str | bool | tuple)}

    @property
    def network(self) -> dict[str, Any]:
        """Attributes of the network that it sets."""
        chosen = {name: getattr(self, name) for name in settings_of(Method)}
        return {name: value for name, value in chosen.items() if value or value == ()}

    @property
    def curvature(self) -> bool:
        """Whether its optimizer needs the diagonal of the Hessian."""
        return False

    @property
    def scheduled(self) -> str:
        """The setting that an experiment's schedule multiplies; "" if there is none."""
        return next((name for name in ("step_size", "learning_rate") if name in self.hyperparameters), "")

    def loss_term(
        self, predict: Callable[[optax.Params, chex.Array], chex.Array]
    ) -> optax.GradientTransformation | None:
        """Return a transformation before its optimizer that depends on the network's outputs, or None.

        Args:
          predict: `(params, x) -> outputs`, in evaluation mode.
        """
        return None

    @property
    def searched(self) -> Space:
        """Its search space, without the settings that were given.

        Example:
          >>> from cbp_jax.experiments.learners import parse_method
          >>> list(parse_method("cbp:utility=weight,step_size=0.01").searched)
          ['replacement_rate']
        """
        return {name: values for name, values in self.space.items() if name not in self.given}

    def with_numbers(self, numbers: Mapping[str, chex.Numeric]) -> Self:
        """Return a copy with other numbers, which may be traced."""
        return dataclasses.replace(self, **numbers)

    def with_settings(self, values: Mapping[str, Any]) -> Self:
        """Return a copy with other settings, which its label shows.

        Raises:
          ValueError: there is no such setting, or the value is not allowed.

        Example:
          >>> from cbp_jax.experiments.learners import parse_method
          >>> parse_method("cbp:utility=weight").with_settings({"replacement_rate": 1e-3}).text
          'cbp:utility=weight,replacement_rate=0.001'
        """
        known = settings_of(self)
        if unknown := [name for name in values if name not in known]:
            raise ValueError(f"{self.learner} has the settings {list(known)}, got {', '.join(unknown)}")
        return dataclasses.replace(self, **values, given=tuple(dict.fromkeys((*self.given, *values))))

    def on(self, network: Mapping[str, Any], units: Units, methods: "Sequence[Method]") -> Self:
        """Return a copy completed for a network.

        Args:
          network: attributes of the network, used for settings that the method leaves open.
          units: of the network.
          methods: the methods that are compiled together; this is the first of them.
        """
        names = {field.name for field in dataclasses.fields(self)} & {"normalization", "kernel_init"}
        taken = {name: network[name] for name in names if name in network and name not in self.options}
        return dataclasses.replace(self, **taken)

    def transformation(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """Return the transformation of `build`, extended to all variables of the network, including statistics."""
        return self._keeping_statistics(self.build(units, key))

    def _keeping_statistics(self, tx: optax.GradientTransformation) -> optax.GradientTransformation:
        return nets.keep_online_stats(tx) if self.normalization == "online" else tx

    def _values(self, names: Sequence[str]) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return getattr(value, "__name__", None) or _written(value)


def _written(value: Any) -> str:
    """Return the value as text."""
    if isinstance(value, tuple) and all(isinstance(each, int) for each in value):
        return "x".join(map(str, value)) or "none"
    return by_path.path_of(value) if callable(value) else str(value)
