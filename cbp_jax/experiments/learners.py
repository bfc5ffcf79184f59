"""The learners that experiments compare, by name; each is an optax chain or a layer of the network."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

import cbp_jax
from cbp_jax import nets
from cbp_jax.training import Learner
from cbp_jax.transforms.regularization import add_l1, add_l2_init
from cbp_jax.transforms.scalars import check_scalar
from cbp_jax.transforms.utility import get_utility
from cbp_jax.units import Units

# hyperparameters, options, units, key -> optimizer
Build = Callable[[Mapping[str, Any], Mapping[str, Any], Units, chex.PRNGKey], optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class Spec:
    """How to make a learner.

    Attributes:
      about: one line for lists.
      build: makes its optimizer.
      defaults: its numeric hyperparameters; runs that differ in these alone share one compilation.
      options: settings that are not traced.
    """

    about: str
    build: Build
    defaults: Mapping[str, float]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _cbp(inner: Callable[[chex.Numeric], optax.GradientTransformation]) -> Build:
    def build(h, options, units, key):
        return cbp_jax.continual_backprop(
            inner(h["step_size"]),
            units,
            replacement_rate=h["replacement_rate"],
            decay_rate=h["decay_rate"],
            maturity_threshold=h["maturity_threshold"],
            utility=options["utility"],
            compensate_bias=options["compensate_bias"],
            max_replacements=options["max_replacements"],
            key=key,
        )

    return build


_CBP = {"replacement_rate": 1e-4, "decay_rate": 0.99, "maturity_threshold": 100.0}
_CBP_OPTIONS = {"utility": "contribution", "compensate_bias": False, "max_replacements": None}

LEARNERS: dict[str, Spec] = {
    "bp": Spec(
        "backpropagation, plain SGD",
        lambda h, options, units, key: optax.sgd(h["step_size"]),
        {"step_size": 0.01},
    ),
    "adam": Spec(
        "Adam",
        lambda h, options, units, key: optax.adam(h["step_size"], b1=h["b1"], b2=h["b2"]),
        {"step_size": 1e-3, "b1": 0.9, "b2": 0.999},
    ),
    "l2": Spec(
        "SGD with L2 toward zero",
        lambda h, options, units, key: optax.chain(optax.add_decayed_weights(h["l2"]), optax.sgd(h["step_size"])),
        {"step_size": 0.01, "l2": 1e-4},
    ),
    "l1": Spec(
        "SGD with L1 toward zero",
        lambda h, options, units, key: optax.chain(add_l1(h["l1"]), optax.sgd(h["step_size"])),
        {"step_size": 0.01, "l1": 1e-5},
    ),
    "l2_init": Spec(
        "SGD with L2 toward the initial weights",
        lambda h, options, units, key: optax.chain(add_l2_init(h["l2"]), optax.sgd(h["step_size"])),
        {"step_size": 0.01, "l2": 1e-3},
    ),
    "shrink_and_perturb": Spec(
        "SGD with weight decay and noise on the weights at every step",
        lambda h, options, units, key: cbp_jax.shrink_and_perturb(
            optax.sgd(h["step_size"]), shrink=h["step_size"] * h["l2"], perturb=h["noise"], key=key
        ),
        {"step_size": 0.01, "l2": 1e-4, "noise": 1e-5},
    ),
    "dropout": Spec(
        "SGD with dropout of hidden units",
        lambda h, options, units, key: optax.sgd(h["step_size"]),
        {"step_size": 0.01},
        {"dropout_rate": 0.1},
    ),
    "cbp": Spec("continual backpropagation around SGD", _cbp(optax.sgd), {"step_size": 0.01, **_CBP}, _CBP_OPTIONS),
    "cbp_adam": Spec(
        "continual backpropagation around Adam with a step count per weight",
        _cbp(cbp_jax.adam),
        {"step_size": 1e-3, **_CBP},
        _CBP_OPTIONS,
    ),
}


@dataclasses.dataclass(frozen=True)
class Method:
    """A learner with its settings.

    Attributes:
      label: what it is called in results: its learner, and what was given besides.
      learner: its name in `LEARNERS`.
      hyperparameters: all its numbers.
      options: all its settings that are not numbers to trace.
    """

    label: str
    learner: str
    hyperparameters: Mapping[str, float]
    options: Mapping[str, Any]


def parse_method(text: str) -> Method:
    """Reads a method: a learner's name and, after a colon, settings that differ from its defaults.

    Args:
      text: such as `"cbp"` or `"cbp:replacement_rate=1e-5,utility=weight"`.

    Returns:
      the method.

    Raises:
      ValueError: an unknown learner or setting, or a value that does not fit it.

    Example:
      >>> method = parse_method("cbp:replacement_rate=1e-5")
      >>> method.label, method.hyperparameters["replacement_rate"], method.options["utility"]
      ('cbp(replacement_rate=1e-05)', 1e-05, 'contribution')
    """
    name, _, given = text.partition(":")
    if name not in LEARNERS:
        raise ValueError(f"method {text!r}: the learner must be one of {list(LEARNERS)}, got {name!r}")
    spec = LEARNERS[name]
    settings = {**spec.defaults, **spec.options}
    changed = {}
    for item in given.split(",") if given else ():
        key, equals, value = item.partition("=")
        if not equals or key not in settings:
            raise ValueError(f"method {text!r}: expected setting=value with one of {list(settings)}, got {item!r}")
        if key in changed:
            raise ValueError(f"method {text!r}: {key} is given twice")
        changed[key] = _read(text, key, value, settings[key])
    settings |= changed
    _check(text, settings)
    shown = ", ".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in changed.items()
    )
    return Method(
        label=f"{name}({shown})" if shown else name,
        learner=name,
        hyperparameters={key: float(settings[key]) for key in spec.defaults},
        options={key: settings[key] for key in spec.options},
    )


def _read(text: str, key: str, value: str, default: Any) -> Any:
    if isinstance(default, str):
        return value
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[value.lower()]
        return int(value) if default is None else float(value)
    except (KeyError, ValueError) as error:
        kind = "true or false" if isinstance(default, bool) else "a number"
        raise ValueError(f"method {text!r}: {key} must be {kind}, got {value!r}") from error


def _check(text: str, settings: Mapping[str, Any]) -> None:
    ranges = {
        "replacement_rate": {"at_least": 0, "at_most": 1},
        "decay_rate": {"at_least": 0, "below": 1},
        "b1": {"at_least": 0, "below": 1},
        "b2": {"at_least": 0, "below": 1},
        "dropout_rate": {"at_least": 0, "below": 1},
    }
    try:
        for key, value in settings.items():
            if isinstance(value, float):
                check_scalar(key, value, **ranges.get(key, {"at_least": 0}))
        if "utility" in settings:
            get_utility(settings["utility"])
        if settings.get("max_replacements") is not None and settings["max_replacements"] < 1:
            raise ValueError(f"max_replacements must be at least 1, got {settings['max_replacements']}")
        if settings.get("noise") is not None and settings["step_size"] * settings["l2"] > 1:
            raise ValueError("step_size times l2, the fraction lost at every step, must be at most 1")
    except ValueError as error:
        raise ValueError(f"method {text!r}: {error}") from error


def make_learner(
    methods: Sequence[Method],
    hidden: Sequence[int],
    activation: str,
    input_shape: tuple[int, ...],
    num_classes: int,
) -> Learner:
    """Makes the learner of methods that differ in their numbers alone.

    Args:
      methods: of one learner and with the same options.
      hidden: sizes of the hidden layers.
      activation: name of the activation.
      input_shape: of one example.
      num_classes: outputs.
    """
    first = methods[0]
    options = dict(first.options)
    net = nets.MLP(tuple(hidden), num_classes, activation, dropout_rate=options.get("dropout_rate", 0.0))
    example = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    params = jax.eval_shape(net.init, jax.random.key(0), example)
    units = cbp_jax.discover_units(net.apply, params, example)
    if options.get("max_replacements", 0) is None:
        # The rate is traced; its largest value bounds how many units one step can replace.
        largest = max(method.hyperparameters["replacement_rate"] for method in methods)
        options["max_replacements"] = int(largest * max(group.size for group in units) + 1e-5) + 1
    apply = cbp_jax.with_features(net.apply, units)

    def train(params, x, key):
        if not net.dropout_rate:
            return apply(params, x)
        return apply(params, x, deterministic=False, rngs={"dropout": key})

    return Learner(
        init=lambda key: net.init(key, jnp.zeros((1, *input_shape))),
        predict=apply,
        train=train,
        optimizer=lambda h, key: LEARNERS[first.learner].build(h, options, units, key),
        units=units,
    )
