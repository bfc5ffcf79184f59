"""Helpers of the transformations: random keys and noise, exact rounding, checks of arguments."""
