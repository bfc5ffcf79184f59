"""Lottery tickets: masks, pruning, training under a mask, rounds of pruning with rewinding, controls,
and structured tickets."""

from cbp_jax.tickets.controls import constant_magnitudes, reinitialize
from cbp_jax.tickets.masked import masked
from cbp_jax.tickets.masks import Mask, Overlap, apply_mask, density, full_mask, overlap, random_mask_like
from cbp_jax.tickets.prune import mask_like, prune
from cbp_jax.tickets.rounds import Round, Trained, Training, iterative_magnitude_pruning
from cbp_jax.tickets.structured import prune_units, shrink_batch_stats, shrink_params, unit_mask

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
    "mask_like",
    "masked",
    "overlap",
    "prune",
    "prune_units",
    "random_mask_like",
    "reinitialize",
    "shrink_batch_stats",
    "shrink_params",
    "unit_mask",
]
