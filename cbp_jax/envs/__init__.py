"""Environments of Brax as the experiments need them; those of Brax need `pip install "cbp-jax[rl]"`."""

from cbp_jax.envs.episodes import Episodes
from cbp_jax.envs.slippery import Slippery, SlipperyAnt, with_friction

__all__ = ["Episodes", "Slippery", "SlipperyAnt", "with_friction"]
