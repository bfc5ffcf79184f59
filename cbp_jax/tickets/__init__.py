"""Lottery tickets: masks, pruning, training under a mask, rewinding, controls, structured and dominant tickets."""

from cbp_jax.tickets.comparison import Shared, compare_tickets
from cbp_jax.tickets.controls import constant_magnitudes, reinitialize
from cbp_jax.tickets.dominant import Ticket, dominant_ticket, masked_changes, transplant
from cbp_jax.tickets.masked import masked
from cbp_jax.tickets.masks import Mask, Overlap, apply_mask, density, full_mask, overlap, random_mask_like
from cbp_jax.tickets.prune import mask_like, prune
from cbp_jax.tickets.rounds import Round, Trained, Training, iterative_magnitude_pruning
from cbp_jax.tickets.structured import prune_units, shrink_batch_stats, shrink_params, unit_mask
from cbp_jax.transforms.regularization import add_l1_init, proximal_l1_init

__all__ = [
    "Mask",
    "Overlap",
    "Round",
    "Shared",
    "Ticket",
    "Trained",
    "Training",
    "add_l1_init",
    "apply_mask",
    "compare_tickets",
    "constant_magnitudes",
    "density",
    "dominant_ticket",
    "full_mask",
    "iterative_magnitude_pruning",
    "mask_like",
    "masked",
    "masked_changes",
    "overlap",
    "proximal_l1_init",
    "prune",
    "prune_units",
    "random_mask_like",
    "reinitialize",
    "shrink_batch_stats",
    "shrink_params",
    "transplant",
    "unit_mask",
]
