"""Measures of plasticity: pure functions of activations, parameters and losses.

All of them can be jitted and vmapped. Inputs of any float type are converted to float32. Activations are what
``cbp_jax.with_features`` returns: arrays whose last axis runs over the units of a layer. Other axes (examples,
positions) are averaged over.

Dead and dormant are different things. A unit is *dead* if it is exactly zero on the whole batch, which cannot happen
with a saturating or leaky activation. It is *dormant* if it is small compared with the rest of its layer, which can
happen to any unit.

The three ranks are computed from the singular values of the activations of one layer. These come from
``jnp.linalg.svd``, not from the eigenvalues of the Gram matrix. The eigenvalues are squares, so in float32 all singular
values below about 3e-4 of the largest are lost in rounding errors, and the rank of a collapsed representation, which is
what we want to measure, becomes too large (the effective rank by 1% for a 2000 x 100 matrix of rank 10, and the stable
rank by one for a ReLU layer of 2000 units). On a CPU the Gram matrix would save a few milliseconds at 2000 x 100 and
nothing at 2000 x 2000.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cbp_jax.network_metrics import churn, tangent_kernel, weight_change
from cbp_jax.numerics import by_unit

__all__ = [
    "Ranks",
    "approximate_rank",
    "churn",
    "dead_fraction",
    "dormant_fraction",
    "effective_rank",
    "gradient_dormant_units",
    "linearized_fraction",
    "ntk_ranks",
    "plasticity",
    "ranks",
    "stable_rank",
    "tangent_kernel",
    "weight_change",
    "weight_effective_rank",
    "weight_magnitude",
    "weight_rank",
    "weight_sparsity",
]

# Tolerance for ties in the integer ranks: a few times the relative error of a float32 sum.
_TIE_TOLERANCE = 1e-6


def dead_fraction(features: Any) -> jax.Array:
    """Return the fraction of units that are exactly zero on the whole batch.

    Dohare et al., "Loss of plasticity in deep continual learning", Nature 2024.

    Args:
      features: array [..., units], or a pytree of such arrays, one for each group of units.

    Returns:
      float32 scalar in [0, 1]: dead units over all units of all groups.

    Raises:
      ValueError: if there are no features, or a group has no units or no examples.

    >>> import jax.numpy as jnp
    >>> float(dead_fraction(jnp.array([[0.0, 0.0, 1.0, 2.0], [0.0, 3.0, 0.0, 1.0]])))
    0.25
    """
    dead = [jnp.all(h == 0, axis=by_unit.all_but_units(h)) for h in _groups(features)]
    return jnp.mean(jnp.concatenate(dead), dtype=jnp.float32)


def dormant_fraction(features: Any, threshold: float | jax.Array = 0.025) -> jax.Array:
    r"""Return the fraction of units whose activation is small compared with their layer's.

    The score of unit i of a layer with H units is its mean absolute activation divided by the layer's average,

    .. math:: s_i = \frac{E|h_i|}{\frac{1}{H} \sum_k E|h_k|},

    where means run over examples and positions. The unit is dormant if :math:`s_i \le` ``threshold``. If the whole
    layer is silent, every score is 0. Sokar et al., "The dormant neuron phenomenon in deep reinforcement learning",
    ICML 2023; thresholds from 0 to 0.1 are usual.

    Args:
      features: array [..., units], or a pytree of such arrays, one for each group of units. Each array is normalized
        separately.
      threshold: largest score of a dormant unit; may be traced.

    Returns:
      float32 scalar in [0, 1]: dormant units over all units of all groups.

    Raises:
      ValueError: if there are no features, a group has no units or no examples, or the threshold is negative.

    >>> import jax.numpy as jnp
    >>> h = jnp.array([[1.0, -1.0, 0.01, 0.0], [1.0, 1.0, -0.01, 0.0]])
    >>> float(dormant_fraction(h, threshold=0.1)), float(dormant_fraction(h, threshold=0.0))
    (0.5, 0.25)
    """
    return _small_beside_their_layer(_groups(features), threshold)


def gradient_dormant_units(grads: Any, threshold: float | jax.Array = 0.01) -> jax.Array:
    r"""Return the fraction of units whose incoming weights have small gradients, compared with their layer's.

    The score of unit i of a layer with H units is

    .. math:: G_i = \frac{E|\nabla_{W_i} L|}{\frac{1}{H} \sum_k E|\nabla_{W_k} L|},

    where means run over the unit's incoming weights. The unit counts as dormant if :math:`G_i \le` ``threshold``. If
    the gradient of a whole layer is 0, every score is 0. Liu et al., "Measure gradients, not activations!", NeurIPS
    2025, who call it GraMa. Silent ReLU units of a small batch have no gradient either; units with small weights may
    have large ones.

    Args:
      grads: gradient of a kernel [..., units], or a pytree of gradients, one kernel for each layer, such as those of
        a Flax network. Arrays of fewer than two axes, such as biases and scales, are ignored. The output layer counts
        like any other: leave out its kernel to count only hidden units.
      threshold: largest score of a dormant unit; may be traced.

    Returns:
      float32 scalar in [0, 1]: dormant units over all units of all layers.

    Raises:
      ValueError: if there is no kernel, or one is empty, or the threshold is negative.

    >>> import jax.numpy as jnp
    >>> grads = {"kernel": jnp.array([[1.0, 0.0, -2.0], [1.0, 0.01, 2.0]]), "bias": jnp.zeros(3)}
    >>> round(float(gradient_dormant_units(grads)), 4)
    0.3333
    """
    kernels = [g for g in map(_as_array, jax.tree.leaves(grads)) if g.ndim > 1]
    if not kernels:
        raise ValueError(f"grads must hold at least one kernel's gradient; got {jax.tree.structure(grads)}")
    return _small_beside_their_layer(_groups(kernels), threshold)


def linearized_fraction(features: Any) -> jax.Array:
    r"""Return the fraction of units that are active, and therefore linear, on the whole batch.

    .. math:: \frac{1}{H} \sum_i \big[\, h_i(x) > 0 \text{ for all } x \,\big]

    For ReLU and other activations that are linear above 0, such as leaky ReLU: there such a unit is a linear function
    of its inputs, and a network of such units is linear. Lyle et al., "Disentangling the causes of plasticity loss in
    neural networks", 2024, count these *linearized* units besides dead ones.

    Args:
      features: array [..., units] of activations, or a pytree of such arrays, one for each group of units.

    Returns:
      float32 scalar in [0, 1]: linearized units over all units of all groups. After max pooling, the maxima are tested.
      Units of concatenated ReLU always have an inactive position.

    Raises:
      ValueError: if there are no features, or a group has no units or no examples.

    >>> import jax.numpy as jnp
    >>> float(linearized_fraction(jnp.array([[0.0, 0.5, 1.0, 2.0], [0.0, 3.0, 0.0, 0.0]])))
    0.25
    """
    on = [jnp.all(h > 0, axis=by_unit.all_but_units(h)) for h in _groups(features)]
    return jnp.mean(jnp.concatenate(on), dtype=jnp.float32)


def effective_rank(x: jax.Array) -> jax.Array:
    r"""Return the exponential of the entropy of the normalized singular values.

    .. math:: \exp\Big(-\sum_i p_i \log p_i\Big), \qquad p_i = \sigma_i / \sum_j \sigma_j

    Roy & Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.

    Args:
      x: matrix [examples, units]; it is not centered.

    Returns:
      float32 scalar in [1, min(examples, units)]; 0 for a zero matrix, NaN if x is not finite. Within 1e-5 of float64
      for matrices of full rank, of low rank, and ReLU activations. Singular values below about 1e-7 of the largest are
      dominated by rounding errors of float32.

    Raises:
      ValueError: if x is not a matrix, or is empty.

    >>> import jax.numpy as jnp
    >>> round(float(effective_rank(jnp.eye(5, 3))), 4)
    3.0
    """
    return _entropy_rank(_singular_values(x))


def approximate_rank(x: jax.Array, threshold: float | jax.Array = 0.99) -> jax.Array:
    r"""Return how many of the largest *squared* singular values it takes to reach a fraction of their sum.

    .. math:: \min\Big\{k : \sum_{i \le k} \sigma_i^2 \ge \tau \sum_j \sigma_j^2 \Big\}

    In other words, how many principal directions (without centering) hold that fraction of the variance. Yang et
    al., "Harnessing structures for value-based planning and reinforcement learning", ICLR 2020.

    Args:
      x: matrix [examples, units]; it is not centered.
      threshold: :math:`\tau`, the fraction, in (0, 1]; may be traced.

    Returns:
      float32 scalar, a whole number from 1 to min(examples, units); 0 for a zero matrix, NaN if x is not finite. Sums
      that miss the threshold by less than 1e-6 of the total count as reaching it, since float32 cannot distinguish
      them. So with a threshold closer to 1 than that, the last directions are not counted.

    Raises:
      ValueError: if x is not a matrix or is empty, or the threshold is outside (0, 1].

    >>> import jax.numpy as jnp
    >>> float(approximate_rank(jnp.diag(jnp.array([10.0, 1.0, 0.1]))))
    1.0
    """
    return _least_sufficient(jnp.square(_singular_values(x)), threshold)


def stable_rank(x: jax.Array, threshold: float | jax.Array = 0.99) -> jax.Array:
    r"""Return how many of the largest singular values it takes to reach a fraction of their sum.

    .. math:: \min\Big\{k : \sum_{i \le k} \sigma_i \ge \tau \sum_j \sigma_j \Big\}

    This is the definition of Dohare et al., Nature 2024, not the ratio of squared Frobenius to squared spectral norm
    that has the same name in numerical linear algebra.

    Arguments, result and errors are those of :func:`approximate_rank`.

    >>> import jax.numpy as jnp
    >>> float(stable_rank(jnp.diag(jnp.array([10.0, 1.0, 0.1]))))
    2.0
    """
    return _least_sufficient(_singular_values(x), threshold)


class Ranks(NamedTuple):
    """The three ranks of one matrix, float32 scalars."""

    effective: jax.Array
    approximate: jax.Array
    stable: jax.Array


def ranks(x: jax.Array, threshold: float | jax.Array = 0.99) -> Ranks:
    """Return the effective, approximate and stable rank of a matrix, from one singular value decomposition.

    Args:
      x: matrix [examples, units]; it is not centered.
      threshold: threshold of the approximate and the stable rank, in (0, 1]; may be traced.

    Returns:
      the results of ``effective_rank``, ``approximate_rank`` and ``stable_rank``.

    Raises:
      ValueError: if x is not a matrix or is empty, or the threshold is outside (0, 1].

    >>> import jax.numpy as jnp
    >>> [round(float(rank), 2) for rank in ranks(jnp.diag(jnp.array([10.0, 1.0, 0.1])))]
    [1.42, 1.0, 2.0]
    """
    values = _singular_values(x)
    return Ranks(
        _entropy_rank(values),
        _least_sufficient(jnp.square(values), threshold),
        _least_sufficient(values, threshold),
    )


def ntk_ranks(
    apply_fn: Callable[[Any, jax.Array], jax.Array], params: Any, x: jax.Array, threshold: float | jax.Array = 0.99
) -> Ranks:
    r"""Return the ranks of the empirical neural tangent kernel's Gram matrix on a batch.

    A network whose Gram matrix, :func:`tangent_kernel`, has low rank can change its outputs on the batch in few
    directions, however many weights it has. Its rank falls with plasticity: Lyle et al., "Disentangling the causes of
    plasticity loss in neural networks", 2024; Tang et al., "Mitigating plasticity loss in continual reinforcement
    learning by reducing churn", ICML 2025. The matrix is not centered, and its rows are not scaled.

    Args:
      apply_fn: `(params, x [n, ...]) -> outputs [n, ...]`, as in :func:`tangent_kernel`.
      params: pytree of arrays.
      x: examples [n, ...].
      threshold: of the approximate and the stable rank, in (0, 1]; may be traced.

    Returns:
      the :func:`ranks` of the matrix, each at most n times the number of outputs. Singular values of this matrix are
      the squares of the Jacobian's.

    Raises:
      ValueError: there are no examples or no float leaves, or the threshold is outside (0, 1].

    >>> import jax.numpy as jnp
    >>> linear = lambda w, x: x @ w
    >>> float(ntk_ranks(linear, jnp.ones(3), jnp.eye(4, 3)).stable)  # three weights, whatever the examples
    3.0
    """
    return ranks(tangent_kernel(apply_fn, params, x), threshold)


def weight_magnitude(params: Any) -> jax.Array:
    """Return the mean absolute value of all entries of all parameters.

    Every entry counts the same, so large layers have more weight. Biases are included.

    Args:
      params: pytree of arrays. Leaves that are not of a float type (counters, keys) are ignored.

    Returns:
      float32 scalar.

    Raises:
      ValueError: if there is no float leaf.

    >>> import jax.numpy as jnp
    >>> float(weight_magnitude({"kernel": jnp.array([[-1.0, 2.0]]), "bias": jnp.array([0.0])}))
    1.0
    """
    leaves = [w for w in map(_as_array, jax.tree.leaves(params)) if jnp.issubdtype(w.dtype, jnp.floating)]
    count = sum(w.size for w in leaves)
    if count == 0:
        raise ValueError(f"params must hold at least one float array; got {jax.tree.structure(params)}")
    return jnp.asarray(sum(jnp.sum(jnp.abs(w.astype(jnp.float32))) for w in leaves)) / count


def weight_rank(params: Any) -> jax.Array:
    """Return the rank of the kernels, relative to full rank.

    The sum of the ranks of all kernels divided by the sum of their smaller sides, as in Elsayed & Mahmood, ICLR 2024. A
    kernel of more than two axes is treated as a matrix of its last axis, the outputs, by all others. Singular values
    count if they exceed NumPy's threshold: float32's epsilon times the larger side times the largest singular value.

    Args:
      params: pytree of arrays. Leaves with fewer than two axes, or not of a float type, are ignored.

    Returns:
      float32 scalar in [0, 1].

    Raises:
      ValueError: if there is no kernel.

    >>> import jax.numpy as jnp
    >>> float(weight_rank({"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}))
    0.5
    """
    kernels = _kernels(params)
    ranks = sum(jnp.linalg.matrix_rank(w) for w in kernels)
    return ranks / np.float32(sum(min(w.shape) for w in kernels))


def weight_effective_rank(params: Any) -> jax.Array:
    """Return the effective rank of the kernels, relative to full rank.

    The sum of the effective ranks of all kernels divided by the sum of their smaller sides. Trained kernels usually
    have full rank. Unlike :func:`weight_rank`, this measure then still distinguishes directions of small weight.

    Args:
      params: as in :func:`weight_rank`, with the same errors.

    Returns:
      float32 scalar in [0, 1].

    >>> import jax.numpy as jnp
    >>> float(weight_effective_rank({"kernel": jnp.eye(3)[:2], "bias": jnp.zeros(3)}))
    1.0
    """
    kernels = _kernels(params)
    return jnp.asarray(sum(effective_rank(w) for w in kernels)) / np.float32(sum(min(w.shape) for w in kernels))


def weight_sparsity(params: Any, threshold: float | jax.Array = 0.01) -> jax.Array:
    """Return the fraction of the kernels' weights that are far smaller than the kernel's root mean square.

    Together these weights hold at most threshold**2 of the kernel's squared norm, so they can be pruned. The scale of a
    kernel does not matter: a penalty that shrinks all weights alike does not increase this measure.

    Args:
      params: as in :func:`weight_rank`, with the same errors.
      threshold: largest absolute value of a weight that counts, relative to the root mean square. 0 counts weights that
        are exactly 0.

    Returns:
      float32 scalar in [0, 1], over all kernels together. A kernel of zeros counts as sparse.

    >>> import jax.numpy as jnp
    >>> float(weight_sparsity({"kernel": jnp.array([[1.0, 1e-4], [0.0, -1.0]])}))
    0.5
    """
    kernels = _kernels(params)
    small = sum(jnp.sum(jnp.abs(w) <= threshold * jnp.sqrt(jnp.mean(jnp.square(w)))) for w in kernels)
    return jnp.asarray(small) / np.float32(sum(w.size for w in kernels))


def _kernels(params: Any) -> list[jax.Array]:
    """Return leaves of at least two axes as float32 matrices of their last axis by all others."""
    leaves = [w for w in map(_as_array, jax.tree.leaves(params)) if jnp.issubdtype(w.dtype, jnp.floating)]
    kernels = [w.astype(jnp.float32).reshape(-1, w.shape[-1]) for w in leaves if w.ndim > 1 and w.size]
    if not kernels:
        raise ValueError(f"params must hold at least one kernel; got {jax.tree.structure(params)}")
    return kernels


def plasticity(loss_before: jax.typing.ArrayLike, loss_after: jax.typing.ArrayLike, epsilon: float = 1e-8) -> jax.Array:
    r"""Return the fraction of the loss on a sample that one update on that sample removes.

    .. math:: \max\Big(1 - \frac{L(W', Z)}{\max(L(W, Z), \epsilon)},\ 0\Big) \in [0, 1]

    1 means that the update fitted the sample, 0 that it made no progress or made things worse. Elsayed &
    Mahmood, "Addressing loss of plasticity and catastrophic forgetting in continual learning", ICLR 2024.
    Measure both losses on the same batch and in the same mode (dropout, normalization). Otherwise the difference
    between modes is measured too.

    Args:
      loss_before: non-negative losses before the update, any shape, one for each sample (or scalar).
      loss_after: losses on the same samples after the update, of the same shape.
      epsilon: smallest loss to divide by.

    Returns:
      float32 array of that shape in [0, 1]. Average it over samples; do not average the losses before calling.

    Raises:
      ValueError: if the shapes differ.

    >>> import jax.numpy as jnp
    >>> [float(p) for p in plasticity(jnp.array([2.0, 1.0, 0.0]), jnp.array([0.5, 3.0, 0.0]))]
    [0.75, 0.0, 1.0]
    """
    before, after = jnp.asarray(loss_before, jnp.float32), jnp.asarray(loss_after, jnp.float32)
    if before.shape != after.shape:
        raise ValueError(f"loss_before and loss_after must have the same shape; got {before.shape} and {after.shape}")
    return jnp.clip(1.0 - after / jnp.maximum(before, epsilon), 0.0, 1.0)


def _groups(features: Any) -> list[jax.Array]:
    groups = [_as_array(h) for h in jax.tree.leaves(features)]
    if not groups:
        raise ValueError("features must be an array [..., units] or a pytree of such arrays; it holds none")
    for h in groups:
        if h.ndim == 0 or h.size == 0:
            raise ValueError(f"features must be arrays [..., units] that are not empty; got shape {h.shape}")
    return groups


def _small_beside_their_layer(layers: list[jax.Array], threshold: float | jax.Array) -> jax.Array:
    """Return the fraction of the units of arrays [..., units] whose mean absolute value is small relative to the
    array's."""
    if isinstance(threshold, int | float | np.number) and not threshold >= 0:
        raise ValueError(f"threshold must not be negative; got {threshold}")

    is_small = [by_unit.relative(by_unit.mean_abs(array)) <= threshold for array in layers]
    return jnp.mean(jnp.concatenate(is_small), dtype=jnp.float32)


def _as_array(leaf: Any) -> jax.Array:
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


def _singular_values(x: jax.Array) -> jax.Array:
    """Return the singular values in descending order, scaled so that the largest is 1 (all 0 for a zero matrix)."""
    x = jnp.asarray(x, jnp.float32)
    if x.ndim != 2 or x.size == 0:
        raise ValueError(f"x must be a matrix [examples, units] that is not empty; got shape {x.shape}")
    values = jnp.linalg.svd(x, compute_uv=False)
    # Scaling keeps squares and sums inside the range of float32 for activations of any size.
    return values / jnp.where(values[0] == 0, 1.0, values[0])


def _entropy_rank(values: jax.Array) -> jax.Array:
    total = jnp.sum(values)
    share = values / jnp.where(total == 0, 1.0, total)
    entropy = -jnp.sum(share * jnp.log(jnp.where(share == 0, 1.0, share)))
    return jnp.where(total == 0, 0.0, jnp.exp(entropy))


def _least_sufficient(values: jax.Array, threshold: float | jax.Array) -> jax.Array:
    """Return the smallest k such that values[:k] sum to the threshold's fraction of all; values are descending and not
    negative."""
    if isinstance(threshold, int | float | np.number) and not 0 < threshold <= 1:
        raise ValueError(f"threshold must be in (0, 1]; got {threshold}")
    sums = jnp.cumsum(values)
    total = sums[-1]
    short = sums < total * (threshold * (1.0 - _TIE_TOLERANCE))
    rank = 1.0 + jnp.sum(short, dtype=jnp.float32)
    return jnp.where(total == 0, 0.0, jnp.where(jnp.isfinite(total), rank, jnp.nan))
