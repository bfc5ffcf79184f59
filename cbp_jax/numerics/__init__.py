"""Helpers of the transformations: random keys and noise, exact rounding, reductions by unit, checks of arguments."""
