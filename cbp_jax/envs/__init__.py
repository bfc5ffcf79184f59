"""Environments of the experiments.

Those of Brax need `pip install "cbp-jax[rl]"`, MinAtar's games `pip install "cbp-jax[games]"`.
"""

from cbp_jax.envs.cartpole import CartPole, ChangingCartPole, Physics
from cbp_jax.envs.episodes import Episodes
from cbp_jax.envs.games import ChangingGame, Game
from cbp_jax.envs.normalized import Normalized
from cbp_jax.envs.render import episode, save_html
from cbp_jax.envs.slippery import Slippery, SlipperyAnt, set_friction, with_friction
from cbp_jax.envs.walker import Walker

__all__ = [
    "CartPole",
    "ChangingCartPole",
    "ChangingGame",
    "Episodes",
    "Game",
    "Normalized",
    "Physics",
    "Slippery",
    "SlipperyAnt",
    "Walker",
    "episode",
    "save_html",
    "set_friction",
    "with_friction",
]
