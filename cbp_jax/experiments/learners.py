"""The learners that experiments compare, by name; each is an optax chain, or a choice of the network."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import cbp_jax
from cbp_jax import nets
from cbp_jax.training import Learner, output_layers, reset_layers
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
      options: settings that are not traced; of these, `NETWORK_OPTIONS` are the network's.
      further: more settings that are not traced, which belong to a method only where they are given.
    """

    about: str
    build: Build
    defaults: Mapping[str, float]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    further: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# Attributes of the network that any method may choose for itself.
NETWORK_OPTIONS: dict[str, Any] = {"activation": "relu", "normalization": "", "dropout_rate": 0.0}


def _momentum_sgd(h: Mapping[str, Any], options: Mapping[str, Any]) -> optax.GradientTransformation:
    # Without momentum there is no trace, which costs memory and time.
    return optax.sgd(h["step_size"], momentum=options.get("momentum") or None)


def _adam(adam: Callable[..., optax.GradientTransformation], h: Mapping[str, Any], options: Mapping[str, Any]):
    tx = adam(h["step_size"], b1=h["b1"], b2=h["b2"])
    # L2 as a part of the loss, so that it goes through Adam's moments.
    return optax.chain(optax.add_decayed_weights(options["l2"]), tx) if options.get("l2") else tx


def _sgd(h: Mapping[str, Any], options: Mapping[str, Any], units: Units, key: chex.PRNGKey):
    return _momentum_sgd(h, options)


def _l2(h: Mapping[str, Any], options: Mapping[str, Any], units: Units, key: chex.PRNGKey):
    return optax.chain(optax.add_decayed_weights(h["l2"]), _momentum_sgd(h, options))


def _momentum_sgd_with_decay(h: Mapping[str, Any], options: Mapping[str, Any], key: chex.PRNGKey):
    if options.get("l2"):
        return optax.chain(optax.add_decayed_weights(options["l2"]), _momentum_sgd(h, options))
    return _momentum_sgd(h, options)


def _shrink_and_perturb(h: Mapping[str, Any], options: Mapping[str, Any], units: Units, key: chex.PRNGKey):
    if options.get("momentum"):
        # The decay goes through the momentum, as in the Nature paper, where it is SGD's own.
        return cbp_jax.shrink_and_perturb(_l2(h, options, units, key), shrink=0.0, perturb=h["noise"], key=key)
    return cbp_jax.shrink_and_perturb(
        optax.sgd(h["step_size"]), shrink=h["step_size"] * h["l2"], perturb=h["noise"], key=key
    )


def _keeping_statistics(options: Mapping[str, Any], tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Lets the statistics of online normalization change beside the weights; has to be what replaces units wraps."""
    return nets.keep_online_stats(tx) if options.get("normalization") == "online" else tx


def _cbp(
    inner: Callable[[Mapping[str, Any], Mapping[str, Any], chex.PRNGKey], optax.GradientTransformation],
) -> Build:
    def build(h, options, units, key):
        return cbp_jax.continual_backprop(
            _keeping_statistics(options, inner(h, options, jax.random.fold_in(key, 1))),
            units,
            replacement_rate=h["replacement_rate"],
            decay_rate=h["decay_rate"],
            maturity_threshold=h["maturity_threshold"],
            utility=options["utility"],
            initializer=options.get("kernel_init"),
            compensate_bias=options["compensate_bias"],
            max_replacements=options["max_replacements"],
            key=key,
        )

    return build


def _redo(
    inner: Callable[[Mapping[str, Any], Mapping[str, Any]], optax.GradientTransformation],
) -> Build:
    def build(h, options, units, key):
        return cbp_jax.redo(
            _keeping_statistics(options, inner(h, options)),
            units,
            threshold=h["threshold"],
            every=h["every"],
            initializer=options.get("kernel_init"),
            key=key,
        )

    return build


def _upgd(transformation: Callable[..., optax.GradientTransformation], *numbers: str) -> Build:
    def build(h, options, units, key):
        return transformation(
            h["step_size"],
            **{name: h[name] for name in (*_UPGD, *numbers)},
            order=options["order"],
            scope=options["scope"],
            protect=options["protect"],
            units=units if options["featurewise"] else None,
            key=key,
        )

    return build


def _consolidation(transformation: Callable[..., optax.GradientTransformation]) -> Build:
    return lambda h, options, units, key: transformation(h["step_size"], **{name: h[name] for name in _CONSOLIDATION})


_ADAM = {"step_size": 1e-3, "b1": 0.9, "b2": 0.999}
_SGD = {"momentum": 0.0, "reset": ""}
_UPGD = {"weight_decay": 0.0, "beta_utility": 0.999, "sigma": 0.01}
_UPGD_OPTIONS = {"order": 1, "scope": "global", "protect": True, "featurewise": False}
_CONSOLIDATION = {"strength": 0.1, "beta_weight": 0.999, "beta_importance": 0.999}
_CBP = {"replacement_rate": 1e-4, "decay_rate": 0.99, "maturity_threshold": 100.0}
_REDO = {"threshold": 0.1, "every": 1000.0}
_CBP_OPTIONS = {"utility": "contribution", "compensate_bias": False, "max_replacements": None}

LEARNERS: dict[str, Spec] = {
    "bp": Spec("backpropagation, plain SGD", _sgd, {"step_size": 0.01}, further=_SGD),
    "adam": Spec(
        "Adam",
        lambda h, options, units, key: _adam(optax.adam, h, options),
        _ADAM,
        further={"l2": 0.0},
    ),
    "shrink_and_perturb_adam": Spec(
        "Adam with weight decay and noise on the weights at every step",
        lambda h, options, units, key: cbp_jax.shrink_and_perturb(
            _adam(optax.adam, h, options), shrink=h["step_size"] * h["l2"], perturb=h["noise"], key=key
        ),
        {**_ADAM, "l2": 1e-4, "noise": 1e-5},
    ),
    "l2": Spec(
        "SGD with L2 toward zero",
        _l2,
        {"step_size": 0.01, "l2": 1e-4},
        further=_SGD,
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
        _shrink_and_perturb,
        {"step_size": 0.01, "l2": 1e-4, "noise": 1e-5},
        further=_SGD,
    ),
    "pgd": Spec(
        "perturbed gradient descent: SGD with noise on the gradients",
        lambda h, options, units, key: cbp_jax.perturbed_gradient_descent(
            h["step_size"], h["sigma"], weight_decay=h["weight_decay"], key=key
        ),
        {"step_size": 0.01, "sigma": 0.01, "weight_decay": 0.0},
    ),
    "upgd": Spec(
        "utility-gated perturbed gradient descent", _upgd(cbp_jax.upgd), {"step_size": 0.01, **_UPGD}, _UPGD_OPTIONS
    ),
    "adaptive_upgd": Spec(
        "UPGD around Adam's moments",
        _upgd(cbp_jax.adaptive_upgd, "b1", "b2"),
        {"step_size": 1e-3, **_UPGD, "b1": 0.9, "b2": 0.999},
        _UPGD_OPTIONS,
    ),
    "ewc": Spec(
        "SGD with online elastic weight consolidation",
        _consolidation(cbp_jax.ewc),
        {"step_size": 0.01, **_CONSOLIDATION},
    ),
    "mas": Spec(
        "SGD with online memory aware synapses",
        _consolidation(cbp_jax.mas),
        {"step_size": 0.01, **_CONSOLIDATION},
    ),
    "synaptic_intelligence": Spec(
        "SGD with online synaptic intelligence",
        _consolidation(cbp_jax.synaptic_intelligence),
        {"step_size": 0.01, **_CONSOLIDATION},
    ),
    "rwalk": Spec("SGD with online RWalk", _consolidation(cbp_jax.rwalk), {"step_size": 0.01, **_CONSOLIDATION}),
    "redo": Spec(
        "SGD with recycling of dormant units",
        _redo(lambda h, options: optax.sgd(h["step_size"])),
        {"step_size": 0.01, **_REDO},
    ),
    "redo_adam": Spec(
        "Adam with a step count per weight, with recycling of dormant units",
        _redo(lambda h, options: _adam(cbp_jax.adam, h, options)),
        {**_ADAM, **_REDO},
        further={"l2": 0.0},
    ),
    "clip": Spec(
        "SGD with weight clipping",
        lambda h, options, units, key: cbp_jax.clip_weights(optax.sgd(h["step_size"]), h["bound"]),
        {"step_size": 0.01, "bound": 2.0},
    ),
    "dropout": Spec("SGD with dropout of hidden units", _sgd, {"step_size": 0.01}, {"dropout_rate": 0.1}),
    "layer_norm": Spec("SGD with layer normalization", _sgd, {"step_size": 0.01}, {"normalization": "layer"}),
    "online_norm": Spec("SGD with online normalization", _sgd, {"step_size": 0.01}, {"normalization": "online"}),
    "crelu": Spec("SGD with concatenated ReLU", _sgd, {"step_size": 0.01}, {"activation": "crelu"}),
    "cbp": Spec(
        "continual backpropagation around SGD",
        _cbp(_momentum_sgd_with_decay),
        {"step_size": 0.01, **_CBP},
        _CBP_OPTIONS,
        {**_SGD, "l2": 0.0},
    ),
    "cbp_adam": Spec(
        "continual backpropagation around Adam with a step count per weight",
        _cbp(lambda h, options, key: _adam(cbp_jax.adam, h, options)),
        {**_ADAM, **_CBP},
        _CBP_OPTIONS,
        {"l2": 0.0},
    ),
    "cbp_upgd": Spec(
        "continual backpropagation around UPGD",
        _cbp(lambda h, options, key: cbp_jax.upgd(h["step_size"], **{name: h[name] for name in _UPGD}, key=key)),
        {"step_size": 0.01, **_UPGD, **_CBP},
        _CBP_OPTIONS,
    ),
}


_REPLACING = ("cbp", "cbp_adam", "cbp_upgd", "redo", "redo_adam")


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
      text: such as `"cbp"` or `"cbp:replacement_rate=1e-5,utility=weight"`. Every learner also takes the network's
        `activation`, `normalization` and `dropout_rate`, and those around SGD that say so (see `Spec.further`)
        `momentum`, and `reset`, "head" or "network", for what is drawn anew before each task but the first.

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
    own = {**spec.defaults, **spec.options}
    settings = {**NETWORK_OPTIONS, **spec.further, **own}
    changed = {}
    for item in given.split(",") if given else ():
        key, equals, value = item.partition("=")
        if not equals or key not in settings:
            others = [name for name in settings if name not in own]
            raise ValueError(
                f"method {text!r}: expected setting=value with one of {list(own)}, got {item!r}; "
                f"{', '.join(others)} can be set too"
            )
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
        options={key: settings[key] for key in (*spec.options, *(k for k in changed if k not in own))},
    )


def _read(text: str, key: str, value: str, default: Any) -> Any:
    if isinstance(default, str):
        return value
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[value.lower()]
        return int(value) if default is None or isinstance(default, int) else float(value)
    except (KeyError, ValueError) as error:
        kind = "true or false" if isinstance(default, bool) else "a number"
        raise ValueError(f"method {text!r}: {key} must be {kind}, got {value!r}") from error


def _check(text: str, settings: Mapping[str, Any]) -> None:
    ranges = {
        "replacement_rate": {"at_least": 0, "at_most": 1},
        "decay_rate": {"at_least": 0, "below": 1},
        "b1": {"at_least": 0, "below": 1},
        "b2": {"at_least": 0, "below": 1},
        "beta_utility": {"at_least": 0, "below": 1},
        "beta_weight": {"at_least": 0, "below": 1},
        "beta_importance": {"at_least": 0, "below": 1},
        "every": {"at_least": 1},
        "dropout_rate": {"at_least": 0, "below": 1},
        "momentum": {"at_least": 0, "below": 1},
    }
    try:
        for key, value in settings.items():
            if isinstance(value, float):
                check_scalar(key, value, **ranges.get(key, {"at_least": 0}))
        if "utility" in settings:
            get_utility(settings["utility"])
        nets.get_activation(settings["activation"])
        choices = {
            "order": (1, 2),
            "scope": ("global", "local"),
            "normalization": ("", *nets.NORMALIZATIONS),
            "reset": ("", "head", "network"),
        }
        for key, allowed in choices.items():
            if key in settings and settings[key] not in allowed:
                raise ValueError(f"{key} must be one of {allowed}, got {settings[key]!r}")
        if settings.get("max_replacements") is not None and settings["max_replacements"] < 1:
            raise ValueError(f"max_replacements must be at least 1, got {settings['max_replacements']}")
        if settings.get("noise") is not None and settings["step_size"] * settings["l2"] > 1:
            raise ValueError("step_size times l2, the fraction lost at every step, must be at most 1")
    except ValueError as error:
        raise ValueError(f"method {text!r}: {error}") from error


def make_optimizer(
    methods: Sequence[Method], units: Units, options: Mapping[str, Any]
) -> Callable[[Mapping[str, Any], chex.PRNGKey], optax.GradientTransformation]:
    """The optimizer of methods that differ in their numbers alone.

    Args:
      methods: of one learner and with the same options.
      units: of the network.
      options: those of the methods, and `kernel_init`, what replaced units start from.

    Returns:
      a function of hyperparameters by name and of a key to an optax transformation.
    """
    learner, options = methods[0].learner, dict(options)
    if options.get("max_replacements", 0) is None:
        # The rate is traced; its largest value bounds how many units one step can replace.
        largest = max(method.hyperparameters["replacement_rate"] for method in methods)
        options["max_replacements"] = int(largest * max(group.size for group in units) + 1e-5) + 1

    def optimizer(h: Mapping[str, Any], key: chex.PRNGKey) -> optax.GradientTransformation:
        tx = LEARNERS[learner].build(h, options, units, key)
        return tx if learner in _REPLACING else _keeping_statistics(options, tx)

    return optimizer


def make_learner(
    methods: Sequence[Method],
    hidden: Sequence[int],
    activation: str,
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    network: Callable[..., nn.Module] = nets.MLP,
    reset_head: bool = False,
    init_of_activation: Callable[[str], nn.initializers.Initializer] | None = None,
    **attributes: Any,
) -> Learner:
    """Makes the learner of methods that differ in their numbers alone.

    Args:
      methods: of one learner and with the same options.
      hidden: sizes of the hidden layers.
      activation: name of the activation, where the methods do not choose one.
      input_shape: of one example.
      num_classes: outputs.
      network: makes the network of keyword arguments `hidden`, `num_outputs`, `activation`, and those below.
      reset_head: whether the output layer starts each task from zero.
      init_of_activation: gives the network's `kernel_init` for the name of its activation.
      **attributes: further attributes of the network, such as `kernel_init`, which is then also what replaced units
        start from.
    """
    first = methods[0]
    activation = first.options.get("activation", activation)
    if init_of_activation is not None:
        attributes["kernel_init"] = init_of_activation(activation)
    options = {**attributes, **first.options}
    own = {name: options[name] or None for name in ("normalization", "dropout_rate") if options.get(name)}
    net = network(
        hidden=tuple(hidden),
        num_outputs=num_classes,
        activation=activation,
        **{**attributes, **own},
    )
    example = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    params = jax.eval_shape(net.init, jax.random.key(0), example)
    batch_stats = "batch_stats" in params
    in_training = functools.partial(net.apply, train=True, mutable=["batch_stats"]) if batch_stats else net.apply
    units = cbp_jax.discover_units(in_training, params, example)
    apply = cbp_jax.with_features(net.apply, units)
    apply_in_training = cbp_jax.with_features(in_training, units)

    def train(params, x, key):
        if not options.get("dropout_rate"):
            return apply_in_training(params, x)
        return apply(params, x, deterministic=False, rngs={"dropout": key})

    init = lambda key: net.init(key, jnp.zeros((1, *input_shape)))
    reset = options.get("reset", "")
    head = output_layers(units) if reset_head or reset == "head" else ()

    def begin_task(tx, key, task, params, opt_state):
        start = params, opt_state
        if reset == "head":
            start = reset_layers(tx, params, opt_state, head, init(key))
        elif reset == "network":
            fresh = init(key)
            start = fresh, tx.init(fresh)
        # In the first task the weights are fresh, and those that all methods start from.
        start = jax.tree.map(lambda new, old: jnp.where(task == 0, old, new), start, (params, opt_state))
        return reset_layers(tx, *start, head) if reset_head else start

    return Learner(
        init=init,
        predict=apply,
        train=train,
        optimizer=make_optimizer(methods, units, options),
        units=units,
        begin_task=begin_task if reset_head or reset else None,
        batch_stats=batch_stats,
        curvature=options.get("order") == 2,
    )
