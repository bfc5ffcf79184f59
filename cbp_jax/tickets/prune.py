"""Pruning: removes living weights from a mask."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cbp_jax.numerics.scalars import check_scalar
from cbp_jax.tickets import ranking
from cbp_jax.tickets.masks import Mask, check_mask, matching, prunable, replace
from cbp_jax.units.groups import leaves_by_path

#: `(path, kernel) -> score` of the kernel's shape, or a tree of such arrays.
Score = Callable[[str, chex.Array], chex.Array] | Any


def prune(
    params: optax.Params,
    mask: Mask,
    fraction: chex.Numeric,
    *,
    scope: Literal["layer", "global"] = "layer",
    rates: Mapping[str, float] | None = None,
    score: Score | None = None,
) -> Mask:
    r"""Remove a fraction of the living weights from a mask, those of smallest score.

    Exactly :math:`\mathrm{round}(p \, a)` of :math:`a` living weights are removed, with p the fraction, and halves
    rounded to even. Of equal scores the first are removed, by position. Dead weights stay dead and are not counted.
    Nothing is sorted, and nothing leaves the device.

    Args:
      params: pytree of arrays, the trained weights. May be traced.
      mask: mask of the params, from `full_mask`, which says what may be pruned. May be traced.
      fraction: p, in [0, 1). A traced fraction is used in its own precision.
      scope: "layer" prunes the fraction of each kernel; "global" that of all kernels together, whose scores are
        compared.
      rates: factors of the fraction by pattern, as in `fnmatch`, of the path of a kernel or an enclosing layer. The
        last match counts; without a match it is 1. Lottery tickets prune the output layer at half the rate:
        `{"*Dense_2": 0.5}`. With "global", kernels with the same factor are compared with each other.
      score: `(path, weight) -> score`, by default `|weight|`; or a tree of the params' structure, such as `|g w|` of
        gradients, or random numbers. Scores are real arrays of the kernel's shape; NaN counts as infinite.

    Returns:
      the mask of the remaining weights.

    Raises:
      ValueError: the fraction, or its product with a rate, is out of range; the mask has another structure or is not
        bool; a pattern matches no kernel; a score has another shape; nothing is left to prune.

    Example:
      >>> import cbp_jax
      >>> params = {"kernel": jnp.array([[3.0, -1.0], [0.5, 2.0]]), "bias": jnp.zeros(2)}
      >>> mask = prune(params, cbp_jax.tickets.full_mask(params), 0.5)
      >>> mask["kernel"].tolist(), prune(params, mask, 0.5)["kernel"].tolist()
      ([[True, False], [False, True]], [[True, False], [False, False]])

    References:
      Frankle & Carbin, `The lottery ticket hypothesis: finding sparse, trainable neural networks
      <https://arxiv.org/abs/1803.03635>`_, ICLR 2019
    """
    if scope not in ("layer", "global"):
        raise ValueError(f"scope must be 'layer' or 'global', got {scope!r}")
    check_scalar("fraction", fraction, at_least=0, below=1)
    check_mask(mask, params)
    masks, leaves = prunable(mask), leaves_by_path(params)
    factors = _factors(rates, list(masks))
    scores = _scores(score, params, {path: leaves[path] for path in masks})
    pools: dict[Any, list[str]] = {}
    for path in masks:
        pools.setdefault(factors[path] if scope == "global" else path, []).append(path)
    new: dict[str, chex.Array] = {}
    for paths in pools.values():
        share = _share(fraction, factors[paths[0]], paths)
        living = [masks[path] for path in paths]
        alive = sum(jnp.sum(leaf, dtype=jnp.int32) for leaf in living)
        if not isinstance(alive, jax.core.Tracer) and not int(alive) and not _is_zero(share):
            raise ValueError(f"mask has no living weight left in {', '.join(paths)}: there is nothing to prune")
        dtype = jnp.result_type(*(scores[path] for path in paths))
        left = ranking.without_least(
            [scores[path].astype(dtype) for path in paths], living, rounded_count(share, alive)
        )
        new |= dict(zip(paths, left, strict=True))
    return replace(mask, new)


def mask_like(params: optax.Params, mask: Mask, *, score: Score | None = None) -> Mask:
    """Return a mask with the same number of living weights in each array, those of largest score.

    With the weights of a single dense training, this is one-shot pruning to the densities of another mask. With random
    scores, it is `random_mask_like`.

    Args:
      params: pytree of arrays, may be traced.
      mask: mask of the params, which gives the numbers of living weights; may be traced.
      score: as in `prune`.

    Returns:
      a mask of the same structure and shapes. Weights that may not be pruned live. Of equal scores the last live.

    Raises:
      ValueError: as in `prune`, for the mask and the scores.

    Example:
      >>> params, mask = {"w": jnp.array([[3.0, -1.0, 0.5]])}, {"w": jnp.array([[False, True, True]])}
      >>> mask_like(params, mask)["w"].tolist()
      [[True, True, False]]
    """
    check_mask(mask, params)
    masks, leaves = prunable(mask), leaves_by_path(params)
    scores = _scores(score, params, {path: leaves[path] for path in masks})
    new = {}
    for path, living in masks.items():
        dead = living.size - jnp.sum(living, dtype=jnp.int32)
        (new[path],) = ranking.without_least([scores[path]], [jnp.ones(living.shape, bool)], dead)
    return replace(mask, new)


def _factors(rates: Mapping[str, float] | None, paths: list[str]) -> dict[str, float]:
    """Return the factor of each path, from the last pattern that matches it."""
    factors = dict.fromkeys(paths, 1.0)
    for pattern, factor in (rates or {}).items():
        check_scalar(f"rates[{pattern!r}]", factor, at_least=0)
        factors |= dict.fromkeys(matching("rates", pattern, paths), float(factor))
    return factors


def _scores(score: Score | None, params: optax.Params, kernels: dict[str, chex.Array]) -> dict[str, chex.Array]:
    if score is None:
        return {path: jnp.abs(leaf) for path, leaf in kernels.items()}
    if callable(score):
        scores = {path: jnp.asarray(score(path, leaf)) for path, leaf in kernels.items()}
    else:
        found = leaves_by_path(score)
        missing = [path for path in leaves_by_path(params) if path not in found]
        if missing:
            raise ValueError(f"score must be a tree of the structure of the params; it has nothing for {missing}")
        scores = {path: jnp.asarray(found[path]) for path in kernels}
    for path, values in scores.items():
        if values.shape != jnp.shape(kernels[path]) or jnp.issubdtype(values.dtype, jnp.complexfloating):
            raise ValueError(
                f"score of {path!r} must be real numbers of its shape {jnp.shape(kernels[path])}, got "
                f"{values.dtype}{list(values.shape)}"
            )
    return scores


def _share(fraction: chex.Numeric, factor: float, paths: list[str]) -> chex.Numeric:
    """Return the fraction for kernels that are pruned together."""
    if isinstance(fraction, jax.core.Tracer):
        return fraction * factor
    share = float(fraction) * factor
    if share >= 1:
        raise ValueError(
            f"rates must leave some weights: fraction {fraction} times {factor} is {share:g} of {', '.join(paths)}"
        )
    return share


def _is_zero(share: chex.Numeric) -> bool:
    return not isinstance(share, jax.core.Tracer) and share == 0


def rounded_count(share: chex.Numeric, alive: chex.Array) -> chex.Array:
    """Return `round(share * alive)`, int32 [], rounded as in Python. float32 would be inexact for large counts."""
    with jax.enable_x64(True):
        product = jax.lax.convert_element_type(alive, np.float64) * jax.lax.convert_element_type(share, np.float64)
        whole = jax.lax.round(product, jax.lax.RoundingMethod.TO_NEAREST_EVEN)
        return jnp.minimum(jax.lax.convert_element_type(whole, np.int32), alive)
