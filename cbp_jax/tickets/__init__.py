"""Winning tickets: the part of a network, or of its change, that does the job."""

from cbp_jax.tickets.comparison import Overlap, compare_tickets
from cbp_jax.tickets.dominant import Ticket, dominant_ticket, masked_changes, transplant

__all__ = [
    "Overlap",
    "Ticket",
    "compare_tickets",
    "dominant_ticket",
    "masked_changes",
    "transplant",
]
