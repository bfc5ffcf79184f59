"""Networks by name, or by the import path of a Flax module."""

import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cbp_jax import by_path
from cbp_jax.nets.convnet import ConvNet
from cbp_jax.nets.lenet import LeNet
from cbp_jax.nets.mlp import MLP
from cbp_jax.nets.resnet import ResNet
from cbp_jax.nets.transformer import ViT

# Each row is a network: a Flax module whose attributes are its settings, including `num_outputs`.
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "mlp": functools.partial(MLP, hidden=(100, 100, 100)),
    "convnet": ConvNet,
    "lenet": LeNet,
    "resnet18": ResNet,
    "vit": ViT,
}

_NAMED = re.compile(r"(\w+)(?::(?P<plain>.*)|\((?P<call>.*)\))?", re.DOTALL)


def make(name: str, input_shape: tuple[int, ...], num_outputs: int, **options: Any) -> nn.Module:
    """Make a network.

    For every network, `net.init(key, x)` creates its variables, and `net.apply(variables, x)` maps inputs [batch,
    *input_shape] to outputs [batch, num_outputs]. Networks that behave differently in training take `train=True`, with
    `rngs={"dropout": key}` for dropout and `mutable=["batch_stats"]` for running statistics. All named networks accept
    `train`.

    Your own Flax module is given by its path, as in `"my_package.my_module:MyNet(width=64)"`: its class, or a function
    that creates it. It gets `num_outputs` if the class has an attribute, or the function an argument, of this name.
    Modules in the current directory are found.

    Args:
      name: "mlp", "convnet", "lenet", "resnet18" or "vit", or a path. Settings may follow: `"vit:depth=2,width=32"`, or
        `"vit(depth=2, width=32)"`, which is the same.
      input_shape: shape of one example: (height, width, channels) or (features,). A multilayer perceptron flattens
        images.
      num_outputs: number of outputs.
      **options: further settings, which override those after the name.

    Returns:
      the network, a Flax module.

    Raises:
      ValueError: there is no such network, module or setting, a setting is out of range, inputs of that shape do not
        fit, or the path does not name a Flax module or its outputs have another shape.

    Example:
      >>> net = make("vit:depth=2", (28, 28, 1), 10, width=32)
      >>> variables = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
      >>> jax.eval_shape(net.apply, variables, jnp.zeros((32, 28, 28, 1))).shape
      (32, 10)
    """
    return read(name).make(input_shape, num_outputs, **options)


def read(name: str | Callable[..., nn.Module]) -> "Network":
    """Read the name of a network, or its path, and the settings that follow it.

    Args:
      name: as in `make`; or a Flax module's class, or a function that creates it.

    Raises:
      ValueError: there is no such network, module or setting.

    Example:
      >>> read("vit(depth=2)").settings
      {'depth': 2}
    """
    if callable(name):
        return Network(getattr(name, "__name__", repr(name)), name)
    try:
        return _read(name)
    except ValueError as error:
        raise ValueError(f"network {name!r}: {error}") from error


def _read(text: str) -> "Network":
    match = _NAMED.fullmatch(text.strip())
    if match is not None and match[1] in NETWORKS:
        return Network(match[1], NETWORKS[match[1]], by_path.read_settings(match["plain"] or match["call"] or ""))
    found = by_path.read(text, "network")
    if found is None:
        raise ValueError(
            f"the network must be one of {list(NETWORKS)}, or a Flax module's path as in my_module:MyNet(width=64)"
        )
    if not callable(found.value):
        raise ValueError(f"it must be a Flax module's class, or a function that makes one, got {found.value!r}")
    return Network(found.path, found.value, found.settings)


@dataclasses.dataclass(frozen=True)
class Network:
    """The specification of a network.

    Attributes:
      name: what it is called.
      factory: makes the Flax module of its settings.
      settings: that were given with its name.

    Raises:
      ValueError: there is no such setting.
    """

    name: str
    factory: Callable[..., nn.Module]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self._check(self.settings)

    @property
    def about(self) -> str:
        """The first line of its documentation, and the names of its settings."""
        made = self.factory.func if isinstance(self.factory, functools.partial) else self.factory
        lines = (inspect.getdoc(made) or self.name).splitlines()
        return f"{lines[0]} ({', '.join(name for name in self._parameters if name != 'num_outputs')})"

    def takes(self, name: str, value: Any = None) -> bool:
        """Return whether the network has a setting.

        Args:
          name: name of the setting.
          value: the value it would get. A setting that is a single number does not accept sizes of layers.
        """
        parameter = self._parameters.get(name)
        if parameter is None:
            return self._takes_anything
        number = isinstance(parameter.default, int) or parameter.annotation in (int, "int")
        return not (number and isinstance(value, tuple))

    def own(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of the settings that the network has and that were not given with its name."""
        return {
            name: value for name, value in settings.items() if name not in self.settings and self.takes(name, value)
        }

    def make(self, input_shape: tuple[int, ...], num_outputs: int, **options: Any) -> nn.Module:
        """Make the network; see `nets.make`."""
        flatten = {"flatten": True} if len(input_shape) > 1 and "flatten" in self._parameters else {}
        return self._make(input_shape, num_outputs, {**flatten, **options})

    def takes_images(self, image_shape: tuple[int, ...], num_outputs: int, **options: Any) -> bool:
        """Return whether the network accepts images directly, instead of flattened.

        Raises:
          ValueError: it accepts neither images nor flattened images.

        Example:
          >>> read("mlp").takes_images((28, 28, 1), 10), read("vit").takes_images((28, 28, 1), 10)
          (False, True)
        """
        try:
            self._make(image_shape, num_outputs, options)
        except ValueError:
            try:
                self._make((math.prod(image_shape),), num_outputs, options)
            except ValueError:
                pass
            else:
                return False
            raise
        return True

    def _make(self, input_shape: tuple[int, ...], num_outputs: int, options: Mapping[str, Any]) -> nn.Module:
        self._check(options)
        outputs = {"num_outputs": num_outputs} if "num_outputs" in self._parameters or self._takes_anything else {}
        try:
            net = self.factory(**{**self.settings, **options, **outputs})
            if not (callable(getattr(net, "init", None)) and callable(getattr(net, "apply", None))):
                raise ValueError(f"it must make a Flax module, got {type(net).__name__}")
            x = jax.ShapeDtypeStruct((2, *input_shape), jnp.float32)
            found = jax.eval_shape(lambda key, x: net.apply(net.init(key, x), x), jax.random.key(0), x)
        except Exception as error:
            told = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise ValueError(f"network {self.name!r}: {told}") from error
        if getattr(found, "shape", None) != (2, num_outputs):
            raise ValueError(
                f"network {self.name!r} must map inputs {[2, *input_shape]} to outputs {[2, num_outputs]}, "
                f"got {list(found.shape) if hasattr(found, 'shape') else type(found).__name__}"
            )
        return net

    @functools.cached_property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        try:
            found = inspect.signature(self.factory).parameters
        except (TypeError, ValueError) as error:
            raise ValueError(f"network {self.name!r}: its arguments cannot be determined ({error})") from error
        return {name: each for name, each in found.items() if name not in ("parent", "name")}

    @property
    def _takes_anything(self) -> bool:
        return any(each.kind is each.VAR_KEYWORD for each in self._parameters.values())

    def _check(self, settings: Mapping[str, Any]) -> None:
        for name in settings:
            if name == "num_outputs" or not self.takes(name):
                known = [each for each in self._parameters if each != "num_outputs"]
                raise ValueError(f"network {self.name!r} has the settings {known}, got {name!r}")
