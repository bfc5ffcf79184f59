"""Symptoms of lost plasticity in an agent's network."""

from collections.abc import Callable
from typing import Any

import chex
import optax

import cbp_jax
from cbp_jax.training import symptoms


def symptoms_of(
    apply: Callable[[optax.Params, chex.Array], Any],
    params: optax.Params,
    obs: chex.Array,
    *,
    weights: optax.Params | None = None,
    dormant_threshold: float = 0.01,
) -> dict[str, chex.Array]:
    """Measure symptoms of lost plasticity on observations.

    Args:
      apply: maps params and observations [n, observations] to outputs, without random numbers.
      params: the parameters.
      obs: observations [n, observations].
      weights: the part of the parameters whose magnitude is measured, by default all.
      dormant_threshold: as in `metrics.dormant_fraction`.

    Returns:
      scalars: `dormant_units`, `weight_magnitude`, and `stable_rank` of the last hidden layer divided by that layer's
      number of units.
    """
    units = cbp_jax.discover_units(apply, params, obs[:1])
    features = cbp_jax.with_features(apply, units)(params, obs)[1]
    last = list(features.values())[-1:]
    weights = params if weights is None else weights
    found = symptoms(features, weights, ranked=last, dormant_threshold=dormant_threshold)
    return {name: found[name] for name in ("dormant_units", "stable_rank", "weight_magnitude")}
