"""Loss of plasticity and continual learning in JAX."""

from typing import Any

from cbp_jax import curvature, metrics
from cbp_jax.transforms.adam import adam
from cbp_jax.transforms.consolidation import ewc, mas, rwalk, synaptic_intelligence
from cbp_jax.transforms.continual_backprop import ContinualBackpropState, continual_backprop
from cbp_jax.transforms.perturbed_gradient_descent import add_noise, perturbed_gradient_descent
from cbp_jax.transforms.redo import redo
from cbp_jax.transforms.regularization import add_l1, add_l2_init
from cbp_jax.transforms.shrink_and_perturb import shrink_and_perturb
from cbp_jax.transforms.upgd import adaptive_upgd, scale_by_upgd, upgd
from cbp_jax.transforms.weight_clipping import clip_weights
from cbp_jax.units import Consumer, ParamSlice, UnitGroup, Units, discover_units, reset_batch_stats, with_features

__version__ = "0.1.0"

__all__ = [
    "Consumer",
    "ContinualBackpropState",
    "ParamSlice",
    "UnitGroup",
    "Units",
    "adam",
    "adaptive_upgd",
    "add_l1",
    "add_l2_init",
    "add_noise",
    "clip_weights",
    "continual_backprop",
    "curvature",
    "discover_units",
    "ewc",
    "load_results",
    "mas",
    "metrics",
    "perturbed_gradient_descent",
    "redo",
    "reset_batch_stats",
    "rwalk",
    "scale_by_upgd",
    "shrink_and_perturb",
    "synaptic_intelligence",
    "upgd",
    "with_features",
]


def load_results(path: Any) -> Any:
    """Reads the results of a run; see :func:`cbp_jax.report.load_results`."""
    from cbp_jax import report  # needs the report extra

    return report.load_results(path)
