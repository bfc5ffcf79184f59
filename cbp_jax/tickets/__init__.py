"""Lottery tickets: masks, pruning, training under a mask, rounds of pruning with rewinding, and controls."""

from cbp_jax.tickets.masked import masked
from cbp_jax.tickets.masks import Mask, Overlap, apply_mask, density, full_mask, overlap, random_mask_like
from cbp_jax.tickets.prune import prune

__all__ = [
    "Mask",
    "Overlap",
    "apply_mask",
    "density",
    "full_mask",
    "masked",
    "overlap",
    "prune",
    "random_mask_like",
]
