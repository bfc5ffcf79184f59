"""Symptoms of lost plasticity in any network."""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import optax

from cbp_jax import metrics
from cbp_jax.units import Features


def symptoms(
    features: Features,
    weights: optax.Params,
    *,
    ranked: Sequence[chex.Array] | None = None,
    matrices: bool = False,
    dormant_threshold: float | None = None,
) -> dict[str, chex.Array]:
    """Measure symptoms of lost plasticity, from activations on some examples and from weights.

    Args:
      features: of each layer, arrays [examples, ..., units].
      weights: what is learned.
      ranked: the layers whose ranks are measured; all by default.
      matrices: whether to measure the weights as matrices too.
      dormant_threshold: largest score of a dormant unit, see `metrics.dormant_fraction`. By default dormant units are
        not counted.

    Returns:
      scalars: `dead_units`, `weight_magnitude`, and `effective_rank` and `stable_rank`, each divided by the number of
      units of a layer and averaged over layers. All but the magnitude are NaN if there are no units. With `matrices`
      also `weight_rank` and `weight_effective_rank`, relative to full rank, `weight_sparsity`, `weight_l1` and
      `weight_l2`; with a threshold `dormant_units`.

    Example:
      >>> import jax.numpy as jnp
      >>> found = symptoms({"hidden": jnp.eye(4)[:, :2]}, {"kernel": jnp.ones((2, 2))}, dormant_threshold=0.0)
      >>> {name: float(value) for name, value in found.items()}
      {'dead_units': 0.0, 'weight_magnitude': 1.0, 'effective_rank': 1.0, 'stable_rank': 1.0, 'dormant_units': 0.0}
    """
    layers = jax.tree.leaves(features) if ranked is None else ranked
    ranks = [(metrics.ranks(h.reshape(-1, h.shape[-1])), h.shape[-1]) for h in layers]
    of_units = lambda value: value() if layers else jnp.float32(jnp.nan)
    measures = {
        "dead_units": of_units(lambda: metrics.dead_fraction(features)),
        "weight_magnitude": metrics.weight_magnitude(weights),
        "effective_rank": of_units(lambda: sum(rank.effective / n for rank, n in ranks) / len(ranks)),
        "stable_rank": of_units(lambda: sum(rank.stable / n for rank, n in ranks) / len(ranks)),
    }
    if dormant_threshold is not None:
        measures["dormant_units"] = of_units(lambda: metrics.dormant_fraction(features, dormant_threshold))
    if matrices:
        measures["weight_rank"] = metrics.weight_rank(weights)
        measures["weight_effective_rank"] = metrics.weight_effective_rank(weights)
        measures["weight_sparsity"] = metrics.weight_sparsity(weights)
        measures["weight_l1"] = optax.tree.norm(weights, ord=1)
        measures["weight_l2"] = optax.tree.norm(weights)
    return measures
