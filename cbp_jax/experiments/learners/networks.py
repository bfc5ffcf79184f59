"""SGD on modified networks."""

import dataclasses
from typing import ClassVar

from cbp_jax import nets
from cbp_jax.experiments.learners.method import choice, named, ranged
from cbp_jax.experiments.learners.plain import SGD
from cbp_jax.experiments.learners.search import Space
from cbp_jax.report import looks
from cbp_jax.report.looks import Look


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dropout(SGD):
    """SGD with dropout of hidden units."""

    name = "dropout"
    about = "SGD with dropout of hidden units"
    look = Look("Dropout", looks.WINE)

    space: ClassVar[Space] = {"dropout_rate": (0.03, 0.1, 0.3)}  # each value is a separate program

    dropout_rate: float = ranged(0.1, below=1, traced=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerNorm(SGD):
    """SGD with layer normalization."""

    name = "layer_norm"
    about = "SGD with layer normalization"
    look = Look("Layer norm")

    normalization: str = choice("layer", "", *nets.NORMALIZATIONS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineNorm(SGD):
    """SGD with online normalization."""

    name = "online_norm"
    about = "SGD with online normalization"
    look = Look("Online norm")

    normalization: str = choice("online", "", *nets.NORMALIZATIONS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CReLU(SGD):
    """SGD with concatenated ReLU."""

    name = "crelu"
    about = "SGD with concatenated ReLU"
    look = Look("CReLU")

    activation: str = named("crelu", nets.get_activation)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepFourier(SGD):
    """SGD with deep Fourier features: each hidden unit has two outputs, its sine and its cosine."""

    name = "deep_fourier"
    about = "SGD with deep Fourier features, the sine and the cosine of each hidden unit"
    look = Look("Deep Fourier features")

    activation: str = named("fourier", nets.get_activation)
