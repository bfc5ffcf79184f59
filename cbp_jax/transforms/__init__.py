"""Optax transformations that keep networks plastic."""
