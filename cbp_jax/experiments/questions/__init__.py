"""Experiments on open questions about units, tickets, ranks and adapters."""
