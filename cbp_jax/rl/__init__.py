"""Reinforcement learning with any optax transformation: PPO, and streaming agents."""

from cbp_jax.rl import ppo, streaming
from cbp_jax.rl.gae import gae

__all__ = ["gae", "ppo", "streaming"]
