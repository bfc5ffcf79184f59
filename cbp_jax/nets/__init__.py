"""Networks of the experiments, as Flax linen modules."""

from cbp_jax.nets.activations import get_activation
from cbp_jax.nets.convnet import ConvNet
from cbp_jax.nets.mlp import MLP

__all__ = ["MLP", "ConvNet", "get_activation"]
