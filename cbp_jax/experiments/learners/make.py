"""Creates learners for the training loop from methods: the network, and the optimizer."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import cbp_jax
from cbp_jax import nets
from cbp_jax.experiments.learners.method import Method
from cbp_jax.training import Learner, last_layers, output_layers, reset_layers, restart, with_injection
from cbp_jax.units import NoUnits, Units


def make_optimizer(
    methods: Sequence[Method], units: Units, network: Mapping[str, Any]
) -> Callable[[Mapping[str, Any], chex.PRNGKey], optax.GradientTransformation]:
    """Return the optimizer of methods that differ only in numbers.

    Args:
      methods: methods of one learner with the same options.
      units: the units of the network.
      network: attributes of the network, such as `kernel_init`, by which replaced units are initialized.

    Returns:
      a function that maps hyperparameters by name and a key to an optax transformation.
    """
    method = methods[0].on(network, units, methods)
    return lambda numbers, key: method.with_numbers(numbers).transformation(units, key)


def make_learner(
    methods: Sequence[Method],
    hidden: Sequence[int],
    activation: str,
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    network: str | Callable[..., nn.Module] = "mlp",
    reset_head: bool = False,
    init_of_activation: Callable[[str], nn.initializers.Initializer] | None = None,
    **attributes: Any,
) -> Learner:
    """Create the learner of methods that differ only in numbers.

    Args:
      methods: methods of one learner with the same options.
      hidden: sizes of the hidden layers, if the network has a setting for them.
      activation: name of the activation, if the network has a setting for it and the methods do not set one.
      input_shape: the shape of one example.
      num_classes: the number of outputs.
      network: as for `nets.read`. Settings after its name override those here, and the methods' settings override both.
      reset_head: whether the output layer is reset to zero before each task.
      init_of_activation: maps the name of the activation to the network's `kernel_init`.
      **attributes: further settings of the network, if it has them, such as `kernel_init`.

    Raises:
      ValueError: there is no such network, it does not fit the inputs, or it lacks a setting of the methods.
    """
    first = methods[0]
    attributes = {"hidden": tuple(hidden), "activation": activation, **attributes}
    if init_of_activation is not None:
        attributes["kernel_init"] = init_of_activation(first.activation or activation)
    named = nets.read(network)
    net = named.make(input_shape, num_classes, **{**named.own(attributes), **first.network})
    example = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    params = jax.eval_shape(net.init, jax.random.key(0), example)
    batch_stats = "batch_stats" in params
    differs = {"train": True} if "train" in inspect.signature(type(net).__call__).parameters else {}
    in_training = functools.partial(net.apply, **differs, **({"mutable": ["batch_stats"]} if batch_stats else {}))
    traced = functools.partial(in_training, rngs={"dropout": jax.random.key(0)}) if batch_stats else net.apply
    try:
        units = cbp_jax.discover_units(traced, params, example, check=True)
    except NoUnits as error:
        if first.needs_units:
            raise ValueError(f"method {first.text!r}: {error}") from error
        units = error.units
    apply = cbp_jax.contract_convolutions(cbp_jax.with_features(net.apply, units))
    apply_in_training = cbp_jax.contract_convolutions(cbp_jax.with_features(in_training, units))

    def train(params, x, key):
        return apply_in_training(params, x, **({"rngs": {"dropout": key}} if differs else {}))

    init = lambda key: net.init(key, jnp.zeros((1, *input_shape)))
    head = output_layers(units) if reset_head or first.reset == "head" else ()

    optimizer = make_optimizer(methods, units, _shared(net, attributes))
    if first.loss_term(apply) is not None:
        optimizer = _with_term(optimizer, first, lambda params, x: apply(params, x)[0])
    if first.reset_every:
        optimizer = _resetting(optimizer, first, init, head if first.reset == "head" else None)
    at_tasks = first.reset if not first.reset_every else ""

    def begin_task(tx, key, task, params, opt_state):
        start = params, opt_state
        if at_tasks:
            start = restart(at_tasks, tx, params, opt_state, head, init(key))
        # In the first task the weights are fresh already, and the same for all methods.
        start = jax.tree.map(lambda new, old: jnp.where(task == 0, old, new), start, (params, opt_state))
        return reset_layers(tx, *start, head) if reset_head else start

    learner = Learner(
        init=init,
        predict=apply,
        train=train,
        optimizer=optimizer,
        units=units,
        begin_task=begin_task if reset_head or at_tasks else None,
        batch_stats=batch_stats,
        curvature=first.curvature,
        reference=first.reference,
        scheduled=first.scheduled,
    )
    if first.inject_at is None:
        return learner
    if batch_stats or reset_head or first.reset:
        what = "running statistics" if batch_stats else "a head that is reset before each task"
        raise ValueError(f"method {first.text!r}: nothing can be injected into a network with {what}")
    return with_injection(learner, last_layers(units, first.head_layers), first.inject_at)


def _with_term(
    optimizer: Callable[[Mapping[str, Any], chex.PRNGKey], optax.GradientTransformation],
    method: Method,
    predict: Callable[[optax.Params, chex.Array], chex.Array],
) -> Callable[[Mapping[str, Any], chex.PRNGKey], optax.GradientTransformation]:
    """Return the optimizer, for a loss with the method's additional term."""
    return lambda numbers, key: optax.chain(method.with_numbers(numbers).loss_term(predict), optimizer(numbers, key))


def _resetting(
    optimizer: Callable[[Mapping[str, Any], chex.PRNGKey], optax.GradientTransformation],
    method: Method,
    init: Callable[[chex.PRNGKey], optax.Params],
    layers: Sequence[str] | None,
) -> Callable[[Mapping[str, Any], chex.PRNGKey], optax.GradientTransformation]:
    """Return the optimizer, with periodic resets of layers or the whole network."""

    def make(numbers: Mapping[str, Any], key: chex.PRNGKey) -> optax.GradientTransformation:
        key, of_resets = jax.random.split(key)
        every = method.with_numbers(numbers).reset_every
        return cbp_jax.periodic_reset(optimizer(numbers, key), init, every=every, layers=layers, key=of_resets)

    return make


def _shared(net: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return attributes that a network shares with its optimizer: those given here, or its own."""
    own = {name: getattr(net, name, None) for name in ("kernel_init", "normalization")}
    return {**given, **{name: value for name, value in own.items() if value}}
