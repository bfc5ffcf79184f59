"""What a method is: a learner with its settings, as a frozen dataclass; and the kinds of settings."""

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
    """What is known of a setting beside its field.

    Attributes:
      check: raises a ValueError, or a TypeError, of a name and a value that is not allowed.
      read: makes the value of its text; None for what has no text and is given from Python alone.
      kind: what `read` expects, for its error.
      traced: whether methods that differ in it alone are lanes of one program.
      optional: whether it belongs to a method, and to its results, only where it is given.
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
    """A field for a finite number of a range.

    Args:
      default: its default.
      at_least: smallest value allowed.
      at_most: largest value allowed.
      below: value that must not be reached.
      traced: whether it is an argument of the compiled program, so that methods that differ in it share one.
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
    """Raises a ValueError if a number is not finite in float32, in which programs compute."""
    with np.errstate(over="ignore"):
        if not np.isfinite(np.float32(value)):
            raise ValueError(f"{name} must be a finite number of float32, got {value:g}")


def count(default: int | None, *, optional: bool = False) -> Any:
    """A field for an integer from 1; where the default is None, also for None."""

    def check(name: str, value: Any) -> None:
        if value is None and default is None:
            return
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise ValueError(f"{name} must be an integer, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")

    return _field(default, Setting(check, int, "a number", optional=optional))


def flag(default: bool) -> Any:
    """A field for true or false."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {value!r}")

    return _field(default, Setting(check, lambda text: {"true": True, "false": False}[text.lower()], "true or false"))


def choice(default: Any, *others: Any, optional: bool = False) -> Any:
    """A field for one of some values, all strings or all integers."""
    allowed = (default, *others)

    def check(name: str, value: Any) -> None:
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")

    kind = "text" if isinstance(default, str) else "a number"
    return _field(default, Setting(check, type(default), kind, optional=optional))


def named(default: str | None, get: Callable[[Any], Any], *, optional: bool = False) -> Any:
    """A field for a name that a function knows, which raises a ValueError where it does not."""

    def check(name: str, value: Any) -> None:
        if value is not None:
            get(value)

    return _field(default, Setting(check, optional=optional))


def sizes(default: tuple[int, ...] | None = None) -> Any:
    """A field for the sizes of layers, in texts as 100x100, or none where there are no layers."""

    def check(name: str, value: Any) -> None:
        if value is None and default is None:
            return
        if not isinstance(value, tuple) or not all(isinstance(size, int) and size >= 1 for size in value):
            raise ValueError(f"{name} must be a tuple of sizes of at least 1, got {value!r}")

    read = lambda text: () if text == "none" else tuple(int(size) for size in text.split("x"))
    return _field(default, Setting(check, read, "sizes as in 100x100, or none", optional=True))


def of_python(default: Any = None) -> Any:
    """A field for what is given from Python alone."""
    return _field(default, Setting(lambda name, value: None, read=None, optional=True))


def _field(default: Any, setting: Setting) -> Any:
    return dataclasses.field(default=default, metadata={"setting": setting})


def settings_of(learner: "type[Method] | Method") -> dict[str, Setting]:
    """The settings of a learner by name: first its own, of these first what is traced, and then what is optional."""
    found = {
        field.name: field.metadata["setting"] for field in dataclasses.fields(learner) if "setting" in field.metadata
    }
    return dict(sorted(found.items(), key=lambda item: (item[1].optional, not item[1].traced)))


def defaults_of(learner: "type[Method]") -> dict[str, Any]:
    """The defaults of a learner's own settings, by name."""
    own = [name for name, setting in settings_of(learner).items() if not setting.optional]
    return {name: learner.__dataclass_fields__[name].default for name in own}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A learner with its settings: the class is the learner, the fields are the settings.

    A learner is added by a subclass: a frozen dataclass, whose arguments are given by keyword, with `name`, `about`,
    `look`, a field for each setting (`ranged`, `choice`, ...; what these check is checked when a method is made), and
    `build`. In a row of `learners.LEARNERS` it is a learner by that name.

    Attributes:
      activation: of the network's hidden layers; that of the experiment where it is None.
      normalization: of the network's hidden layers.
      dropout_rate: of the network's hidden units.
      hidden: sizes of the network's hidden layers, which may be none, as in a linear network; those of the experiment
        where it is None.
      given: names of the settings that were given, which its label shows; by default all that differ from defaults.

    Example:
      >>> from cbp_jax.experiments.learners import ContinualBackprop
      >>> method = ContinualBackprop(replacement_rate=1e-5)
      >>> method.label, method.hyperparameters["step_size"]
      ('cbp(replacement_rate=1e-05)', 0.01)
    """

    name: ClassVar[str]  # in texts and in results
    about: ClassVar[str]  # one line for lists
    look: ClassVar[Look]  # in pictures
    # Where comparisons with an equal budget search its settings; a subclass says what it adds to that of its bases.
    space: ClassVar[Space] = {}
    needs_units: ClassVar[bool] = False  # whether a network without hidden units is nothing for it
    # What is drawn anew before each task but the first: "head" or "network". Not annotated: even as a ClassVar it would
    # hide the field that only some of the bases of a subclass have.
    reset = ""
    reference = 0  # how many batches of before the optimizer wants with each update, as `reference`
    inject_at = None  # the task before which a fresh head is injected; see `training.with_injection`
    reset_every = None  # updates after which it is, where that is not before each task

    activation: str | None = named(None, nets.get_activation, optional=True)
    normalization: str = choice("", *nets.NORMALIZATIONS, optional=True)
    dropout_rate: float = ranged(0.0, below=1, traced=False, optional=True)
    hidden: tuple[int, ...] | None = sizes()
    given: tuple[str, ...] | None = dataclasses.field(default=None, compare=False, repr=False)

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        own = vars(cls).get("space", {})
        if isinstance(own, Mapping):  # and no property
            bases = [vars(base).get("space", {}) for base in reversed(cls.__mro__[1:])]
            cls.space = {name: values for space in (*bases, own) for name, values in space.items()}

    def __post_init__(self):
        for name, setting in settings_of(self).items():
            setting.check(name, getattr(self, name))
        if self.reset_every and not self.reset:
            raise ValueError("reset_every says when, and reset must say what is drawn anew: 'head' or 'network'")
        if self.given is None:
            fields = self.__dataclass_fields__
            changed = (name for name in settings_of(self) if getattr(self, name) != fields[name].default)
            object.__setattr__(self, "given", tuple(changed))

    def build(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """Makes the optimizer of the network's weights.

        Args:
          units: of the network.
          key: for what it draws.
        """
        raise NotImplementedError

    @property
    def learner(self) -> str:
        """Its learner's name."""
        return self.name

    @property
    def label(self) -> str:
        """What it is called in results: its learner, and what was given besides."""
        shown = ", ".join(f"{name}={_shown(value)}" for name, value in self._values(self.given).items())
        return f"{self.learner}({shown})" if shown else self.learner

    @property
    def text(self) -> str:
        """The text that `parse_method` makes it of."""
        given = ",".join(f"{name}={_written(value)}" for name, value in self._values(self.given).items())
        return f"{self.learner}:{given}" if given else self.learner

    @property
    def hyperparameters(self) -> dict[str, float]:
        """Its numbers, which are traced."""
        traced = [name for name, setting in settings_of(self).items() if setting.traced]
        return {name: float(value) for name, value in self._values(traced).items()}

    @property
    def options(self) -> dict[str, Any]:
        """Its settings that are not traced; methods of one learner with the same run as lanes of one program."""
        found = settings_of(self).items()
        return self._values(
            [name for name, setting in found if not setting.traced and (not setting.optional or name in self.given)]
        )

    @property
    def network(self) -> dict[str, Any]:
        """Attributes of the network that it chooses."""
        chosen = {name: getattr(self, name) for name in settings_of(Method)}
        return {name: value for name, value in chosen.items() if value or value == ()}

    @property
    def curvature(self) -> bool:
        """Whether its optimizer wants the diagonal of the Hessian."""
        return False

    @property
    def scheduled(self) -> str:
        """The number that a schedule of the experiment's multiplies; "" if there is none."""
        return next((name for name in ("step_size", "learning_rate") if name in self.hyperparameters), "")

    def loss_term(
        self, predict: Callable[[optax.Params, chex.Array], chex.Array]
    ) -> optax.GradientTransformation | None:
        """What it adds to the gradients before its optimizer, by the network's outputs; None if nothing.

        Args:
          predict: `(params, x) -> outputs`, not in training.
        """
        return None

    @property
    def searched(self) -> Space:
        """What a search may change: its space, but for the settings that were given.

        Example:
          >>> from cbp_jax.experiments.learners import parse_method
          >>> list(parse_method("cbp:utility=weight,step_size=0.01").searched)
          ['replacement_rate']
        """
        return {name: values for name, values in self.space.items() if name not in self.given}

    def with_numbers(self, numbers: Mapping[str, chex.Numeric]) -> Self:
        """The same with other numbers, which may be traced."""
        return dataclasses.replace(self, **numbers)

    def with_settings(self, values: Mapping[str, Any]) -> Self:
        """The same with other settings, which its label shows.

        Raises:
          ValueError: it has no such setting, or the value is not allowed.

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
        """The same for a network.

        Args:
          network: attributes of the network, which a method takes where it has not its own.
          units: of the network.
          methods: those that are compiled together, of which this is the first.
        """
        names = {field.name for field in dataclasses.fields(self)} & {"normalization", "kernel_init"}
        taken = {name: network[name] for name in names if name in network and name not in self.options}
        return dataclasses.replace(self, **taken)

    def transformation(self, units: Units, key: chex.PRNGKey) -> optax.GradientTransformation:
        """What `build` makes, for all variables of the network: statistics change beside the weights."""
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
    """As a text has it."""
    if isinstance(value, tuple) and all(isinstance(each, int) for each in value):
        return "x".join(map(str, value)) or "none"
    return by_path.path_of(value) if callable(value) else str(value)
