"""Reinforcement learning: proximal policy optimisation with any optax transformation."""

from cbp_jax.rl import ppo
from cbp_jax.rl.gae import gae

__all__ = ["gae", "ppo"]
