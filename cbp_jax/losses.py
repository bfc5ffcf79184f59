"""Losses by name: their value for each example, derivatives with respect to outputs, and further metrics."""

import types
from collections.abc import Callable, Mapping
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax


class Loss(NamedTuple):
    """A loss, as functions of outputs [batch, ..., outputs] and targets."""

    of_examples: Callable[[chex.Array, chex.Array], chex.Array]  # [batch, ...]
    # The mean over examples, its gradient, and the exact diagonal of its Hessian, with respect to the outputs.
    derivatives: Callable[[chex.Array, chex.Array], tuple[chex.Array, chex.Array, chex.Array]]
    metrics: Mapping[str, Callable[[chex.Array, chex.Array], chex.Array]] = types.MappingProxyType({})  # scalars


def accuracy(logits: chex.Array, labels: chex.Array) -> chex.Array:
    """Return the fraction of examples whose label has the largest logit, float32 [].

    Args:
      logits: [batch, classes].
      labels: integers [batch].

    Example:
      >>> float(accuracy(jnp.eye(2), jnp.array([0, 0])))
      0.5
    """
    return jnp.mean(jnp.argmax(logits, -1) == labels, dtype=jnp.float32)


def _derivatives_of_cross_entropy(logits: chex.Array, targets: chex.Array) -> tuple[chex.Array, chex.Array, chex.Array]:
    if jnp.issubdtype(targets.dtype, jnp.integer):
        if targets.shape != logits.shape[:-1]:
            raise ValueError(f"targets must be classes of shape {logits.shape[:-1]}, got shape {targets.shape}")
        targets = jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)
    elif targets.shape != logits.shape:
        raise ValueError(f"targets must be probabilities of shape {logits.shape}, got shape {targets.shape}")
    examples = logits.size // logits.shape[-1]
    log_q = jax.nn.log_softmax(logits)
    q, total = jnp.exp(log_q), jnp.sum(targets, -1, keepdims=True)
    return -jnp.sum(targets * log_q) / examples, (total * q - targets) / examples, total * q * (1 - q) / examples


def _derivatives_of_squared_error(
    outputs: chex.Array, targets: chex.Array
) -> tuple[chex.Array, chex.Array, chex.Array]:
    if targets.shape != outputs.shape:
        raise ValueError(f"targets must have the outputs' shape {outputs.shape}, got shape {targets.shape}")
    examples = outputs.size // outputs.shape[-1]
    errors = outputs - targets
    return jnp.sum(errors**2) / examples, 2 * errors / examples, jnp.full_like(outputs, 2 / examples)


#: Losses by name, for problems, training and curvature. To add a loss, add a line.
LOSSES: dict[str, Loss] = {
    "softmax_cross_entropy": Loss(
        optax.softmax_cross_entropy_with_integer_labels, _derivatives_of_cross_entropy, {"accuracy": accuracy}
    ),
    "squared_error": Loss(
        lambda outputs, targets: jnp.sum(optax.squared_error(outputs, targets), -1), _derivatives_of_squared_error
    ),
}
