"""Optax transformations that maintain plasticity, one algorithm per file."""

from cbp_jax.transforms.adam import adam, scale_by_adam
from cbp_jax.transforms.adam_reset import adam_reset, scale_by_adam_reset
from cbp_jax.transforms.churn_reduction import add_churn_reduction
from cbp_jax.transforms.consolidation import add_consolidation, ewc, mas, rwalk, synaptic_intelligence
from cbp_jax.transforms.continual_backprop import ContinualBackpropState, continual_backprop
from cbp_jax.transforms.dash import dash
from cbp_jax.transforms.fire import fire
from cbp_jax.transforms.hare_and_tortoise import hare_and_tortoise
from cbp_jax.transforms.kernel_penalties import (
    Penalty,
    add_kernel_penalty,
    orthogonal_penalty,
    parseval_penalty,
    spectral_penalty,
    wasserstein_penalty,
)
from cbp_jax.transforms.normalize_and_project import effective_learning_rate, normalize_and_project
from cbp_jax.transforms.obgd import TracesState, eligibility_traces, obgd
from cbp_jax.transforms.periodic_reset import PeriodicResetState, periodic_reset
from cbp_jax.transforms.perturbed_gradient_descent import add_noise, perturbed_gradient_descent
from cbp_jax.transforms.redo import RedoState, redo
from cbp_jax.transforms.regrama import regrama
from cbp_jax.transforms.regularization import add_l1, add_l1_init, add_l2_init, proximal_l1_init
from cbp_jax.transforms.self_normalized_resets import SelfNormalizedResetsState, self_normalized_resets
from cbp_jax.transforms.shrink_and_perturb import shrink_and_perturb
from cbp_jax.transforms.trac import TracState, trac
from cbp_jax.transforms.upgd import adaptive_upgd, scale_by_upgd, upgd
from cbp_jax.transforms.weight_clipping import clip_weights

__all__ = [
    "ContinualBackpropState",
    "Penalty",
    "PeriodicResetState",
    "RedoState",
    "SelfNormalizedResetsState",
    "TracState",
    "TracesState",
    "adam",
    "adam_reset",
    "adaptive_upgd",
    "add_churn_reduction",
    "add_consolidation",
    "add_kernel_penalty",
    "add_l1",
    "add_l1_init",
    "add_l2_init",
    "add_noise",
    "clip_weights",
    "continual_backprop",
    "dash",
    "effective_learning_rate",
    "eligibility_traces",
    "ewc",
    "fire",
    "hare_and_tortoise",
    "mas",
    "normalize_and_project",
    "obgd",
    "orthogonal_penalty",
    "parseval_penalty",
    "periodic_reset",
    "perturbed_gradient_descent",
    "proximal_l1_init",
    "redo",
    "regrama",
    "rwalk",
    "scale_by_adam",
    "scale_by_adam_reset",
    "scale_by_upgd",
    "self_normalized_resets",
    "shrink_and_perturb",
    "spectral_penalty",
    "synaptic_intelligence",
    "trac",
    "upgd",
    "wasserstein_penalty",
]
