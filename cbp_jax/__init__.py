"""Loss of plasticity and continual learning in JAX."""

from cbp_jax.transforms.continual_backprop import ContinualBackpropState, continual_backprop
from cbp_jax.units import UnitGroup, discover_units, with_features

__version__ = "0.1.0"

__all__ = [
    "ContinualBackpropState",
    "UnitGroup",
    "continual_backprop",
    "discover_units",
    "with_features",
]
