"""Experiments that answer open questions, one a file."""
