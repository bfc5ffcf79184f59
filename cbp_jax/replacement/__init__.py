"""Replacing units: the loop of Algorithm 1, its policies, and the edits to weights and optimizer states."""

from cbp_jax.replacement.reinitialization import (
    REINITIALIZATIONS,
    Fresh,
    NewUnits,
    Reinitialization,
    get_reinitialization,
)
from cbp_jax.replacement.replace import Choice, Policy, ReplacementState, replace_units, replaced_units
from cbp_jax.replacement.utility import UTILITIES, Utility, get_utility, needs_curvature
from cbp_jax.replacement.views import GroupView

__all__ = [
    "REINITIALIZATIONS",
    "UTILITIES",
    "Choice",
    "Fresh",
    "GroupView",
    "NewUnits",
    "Policy",
    "Reinitialization",
    "ReplacementState",
    "Utility",
    "get_reinitialization",
    "get_utility",
    "needs_curvature",
    "replace_units",
    "replaced_units",
]
