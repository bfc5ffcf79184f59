"""Networks of the experiments, as Flax linen modules."""

from cbp_jax.nets.activations import crelu, get_activation
from cbp_jax.nets.convnet import ConvNet, lenet
from cbp_jax.nets.initializers import fan_in_uniform, kaiming_uniform
from cbp_jax.nets.mlp import MLP
from cbp_jax.nets.online_norm import OnlineNorm, keep_online_stats

__all__ = [
    "MLP",
    "ConvNet",
    "OnlineNorm",
    "crelu",
    "fan_in_uniform",
    "get_activation",
    "kaiming_uniform",
    "keep_online_stats",
    "lenet",
]
