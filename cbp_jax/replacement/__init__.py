"""Replacing units: the loop of Algorithm 1, the policies that it asks, and what it does to weights and optimizers."""

from cbp_jax.replacement.replace import Choice, Policy, ReplacementState, replace_units, replaced_units
from cbp_jax.replacement.utility import UTILITIES, Utility, get_utility
from cbp_jax.replacement.views import GroupView

__all__ = [
    "UTILITIES",
    "Choice",
    "GroupView",
    "Policy",
    "ReplacementState",
    "Utility",
    "get_utility",
    "replace_units",
    "replaced_units",
]
