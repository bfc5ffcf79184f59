"""Reinforcement learning with any optax transformation: PPO, PQN, and streaming agents."""

from cbp_jax.rl import ppo, pqn, streaming
from cbp_jax.rl.gae import gae

__all__ = ["gae", "ppo", "pqn", "streaming"]
