"""Reinforcement learning with any optax transformation: PPO, and agents of a stream."""

from cbp_jax.rl import ppo, streaming
from cbp_jax.rl.gae import gae

__all__ = ["gae", "ppo", "streaming"]
