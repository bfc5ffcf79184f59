"""Lottery tickets: masks, pruning, training under a mask, rounds of pruning with rewinding, and controls."""

from cbp_jax.tickets.controls import constant_magnitudes, reinitialize
from cbp_jax.tickets.masked import masked
from cbp_jax.tickets.masks import Mask, Overlap, apply_mask, density, full_mask, overlap, random_mask_like
from cbp_jax.tickets.prune import prune
from cbp_jax.tickets.rounds import Round, Trained, Training, iterative_magnitude_pruning

__all__ = [
    "Mask",
    "Overlap",
    "Round",
    "Trained",
    "Training",
    "apply_mask",
    "constant_magnitudes",
    "density",
    "full_mask",
    "iterative_magnitude_pruning",
    "masked",
    "overlap",
    "prune",
    "random_mask_like",
    "reinitialize",
]
