"""A transformation as another package may define it: of cbp_jax it uses only the name of a search space."""

import optax

from cbp_jax.experiments.learners import LogUniform


def signed(learning_rate, momentum=0.9):
    return optax.chain(optax.trace(momentum), optax.scale_by_sign(), optax.scale(-learning_rate))


signed.space = {"learning_rate": LogUniform(1e-4, 1e-2)}


def plain(learning_rate=0.01):
    return optax.sgd(learning_rate)
