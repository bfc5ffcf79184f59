"""Loss of plasticity and continual learning in JAX."""

from typing import Any

from cbp_jax import curvature, injection, lora, metrics, tickets
from cbp_jax.contracted import contract_convolutions
from cbp_jax.replacement import Choice, Fresh, GroupView, NewUnits, Policy, ReplacementState, replace_units
from cbp_jax.train_state import TrainState
from cbp_jax.transforms import (
    ContinualBackpropState,
    adam,
    adam_reset,
    adaptive_upgd,
    add_churn_reduction,
    add_kernel_penalty,
    add_l1,
    add_l1_init,
    add_l2_init,
    add_noise,
    clip_weights,
    continual_backprop,
    dash,
    effective_learning_rate,
    eligibility_traces,
    ewc,
    fire,
    hare_and_tortoise,
    mas,
    normalize_and_project,
    obgd,
    orthogonal_penalty,
    parseval_penalty,
    periodic_reset,
    perturbed_gradient_descent,
    proximal_l1_init,
    redo,
    regrama,
    rwalk,
    scale_by_upgd,
    self_normalized_resets,
    shrink_and_perturb,
    spectral_penalty,
    synaptic_intelligence,
    trac,
    upgd,
    wasserstein_penalty,
)
from cbp_jax.units import Consumer, ParamSlice, UnitGroup, Units, discover_units, reset_batch_stats, with_features

__version__ = "0.1.0"

__all__ = [
    "Choice",
    "Consumer",
    "ContinualBackpropState",
    "Fresh",
    "GroupView",
    "NewUnits",
    "ParamSlice",
    "Policy",
    "ReplacementState",
    "TrainState",
    "UnitGroup",
    "Units",
    "adam",
    "adam_reset",
    "adaptive_upgd",
    "add_churn_reduction",
    "add_kernel_penalty",
    "add_l1",
    "add_l1_init",
    "add_l2_init",
    "add_noise",
    "clip_weights",
    "continual_backprop",
    "contract_convolutions",
    "curvature",
    "dash",
    "discover_units",
    "effective_learning_rate",
    "eligibility_traces",
    "ewc",
    "fire",
    "hare_and_tortoise",
    "injection",
    "load_results",
    "lora",
    "mas",
    "metrics",
    "normalize_and_project",
    "obgd",
    "orthogonal_penalty",
    "parseval_penalty",
    "periodic_reset",
    "perturbed_gradient_descent",
    "proximal_l1_init",
    "redo",
    "regrama",
    "replace_units",
    "reset_batch_stats",
    "rwalk",
    "scale_by_upgd",
    "self_normalized_resets",
    "shrink_and_perturb",
    "spectral_penalty",
    "synaptic_intelligence",
    "tickets",
    "trac",
    "upgd",
    "wasserstein_penalty",
    "with_features",
]


def load_results(path: Any) -> Any:
    """Read the results of a run; see :func:`cbp_jax.report.load_results`."""
    from cbp_jax import report  # needs the report extra

    return report.load_results(path)
