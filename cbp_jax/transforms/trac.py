"""TRAC (Muppidi et al., 2024): scales the displacement of an optimizer from the initial weights by a learned factor."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cbp_jax.numerics.rounding import rounded
from cbp_jax.numerics.scalars import check_like, check_scalar

BETAS = (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999)

_TINY = float(np.finfo(np.float32).tiny)
_FIRST_SUM = 1e-8
_LARGEST = 9.0  # erfi(9) is 1e34; soon above it float32 overflows
_WIDTH = 0.35  # step of the trapezoidal rule for erfi, whose relative error is then below float32's
_NODES = np.arange(1, 39, 2, dtype=np.float32)
_ERFI_OF_ROOT_HALF = 0.95343827  # erfi(1 / sqrt(2))


class TracState(NamedTuple):
    """State of :func:`trac`; trees are of the params' structure and shapes, float32 (float64 for float64 params)."""

    reference: optax.Params  # the params at init
    displacement: optax.Params  # the sum of the inner optimizer's updates
    sums: chex.Array  # float32 [betas], discounted sums of -h
    variances: chex.Array  # float32 [betas], discounted sums of h**2
    scale: chex.Array  # float32 [], of the displacement
    inner_state: optax.OptState


def trac(
    inner: optax.GradientTransformation,
    *,
    betas: Sequence[float] = BETAS,
    s_init: chex.Numeric = 1e-8,
    eps: chex.Numeric = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    r"""Scale an inner optimizer's total displacement from the initial weights by a learned factor.

    With gradient g at the weights w, the initial weights :math:`w_0`, and the sum :math:`\Delta` of the inner
    optimizer's updates u so far, a tuner for each discount :math:`\beta_j` computes a scale, and the scales add up:

    .. math::
        h &= \langle g, \Delta \rangle, \qquad
        v_j \leftarrow \beta_j^2 v_j + h^2, \qquad
        \sigma_j \leftarrow \beta_j \sigma_j - h, \\
        s_j &= \frac{s_{init}}{\mathrm{erfi}(1 / \sqrt 2)}
            \mathrm{erfi}\Big(\frac{\sigma_j}{\sqrt{2 v_j} + \epsilon}\Big), \qquad
        \Delta \leftarrow \Delta + u, \qquad
        w \leftarrow w_0 + \max\Big(0, \sum_j s_j\Big) \Delta.

    If the displacement points downhill, the scale grows exponentially from almost 0. If a new task makes it point
    uphill, the weights are drawn back to :math:`w_0`. Nothing needs tuning except the inner optimizer.

    Where the paper and its programs differ or leave something open, our choices are as follows. :math:`\Delta` is kept
    in the state, as in the paper. The public programs compute it as :math:`(w - w_0) / (\sum_j s_j + \epsilon)`. But
    float32 cannot represent a relative change of 1e-8 of a weight, and once the scale is 0 the displacement would be
    lost: all later h would be 0, and the weights would stay at :math:`w_0` forever. As in the public PyTorch program,
    the scale is at least 0 (the JAX program has no bound). As in both, :math:`\sigma_j` starts at 1e-8. The argument of
    erfi is clipped to ±9, beyond which float32 overflows.

    Args:
      inner: the optimizer to tune. It gets gradients and params as usual.
      betas: the discounts, each in [0, 1]. By default the paper's six.
      s_init: the scale of each discount when its :math:`\sigma_j^2 = v_j`, >= 0. May be traced.
      eps: added to the denominator, > 0. May be traced.

    Returns:
      a transformation that passes extra arguments on to `inner`. Its state is a `TracState`, and its update needs the
      params. Changes of the weights by transformations after it in a chain are undone by its next update.

    Raises:
      ValueError: an argument is out of range; in `update`, params are missing, or their shapes differ from the
        gradients'.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> tx = trac(optax.sgd(0.1))
      >>> params = jnp.array([3.0, -4.0])
      >>> state = tx.init(params)
      >>> for _ in range(60):
      ...   updates, state = tx.update(2 * params, state, params)  # of a loss of the sum of squares
      ...   params = optax.apply_updates(params, updates)
      >>> bool(jnp.abs(params).max() < 1.0)
      True

    References:
      Muppidi, Zhang & Yang, `Fast TRAC: a parameter-free optimizer for lifelong reinforcement learning
      <https://arxiv.org/abs/2405.16642>`_, NeurIPS 2024

      Cutkosky, Defazio & Mehta, `Mechanic: a learning rate tuner <https://arxiv.org/abs/2306.00144>`_, NeurIPS 2023
    """
    betas = tuple(betas)
    if not betas:
        raise ValueError("betas must hold at least one discount, got ()")
    for beta in betas:
        check_scalar("betas", beta, at_least=0, at_most=1)
    check_scalar("s_init", s_init, at_least=0)
    check_scalar("eps", eps, at_least=_TINY)
    inner = optax.with_extra_args_support(inner)
    discounts = np.asarray(betas, np.float32)

    def init_fn(params: optax.Params) -> TracState:
        # Copies, so that params and state can both be donated to a jitted step.
        return TracState(
            reference=jax.tree.map(lambda w: jnp.array(w, _wide(w), copy=True), params),
            displacement=jax.tree.map(lambda w: jnp.zeros(jnp.shape(w), _wide(w)), params),
            sums=jnp.full(len(betas), _FIRST_SUM, jnp.float32),
            variances=jnp.zeros(len(betas), jnp.float32),
            scale=jnp.zeros([], jnp.float32),
            inner_state=inner.init(params),
        )

    def update_fn(
        updates: optax.Updates, state: TracState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, TracState]:
        if params is None:
            raise ValueError("trac needs the params: tx.update(grads, state, params), got params=None")
        check_like("params", params, updates)
        products = jax.tree.map(lambda g, d: jnp.sum(g.astype(d.dtype) * d), updates, state.displacement)
        h = jnp.float32(sum(jax.tree.leaves(products), start=0.0))
        sums = rounded(discounts * state.sums) - h
        variances = rounded(discounts**2 * state.variances) + rounded(h * h)
        arguments = sums / (jnp.sqrt(2 * variances) + jnp.asarray(eps, jnp.float32))
        factor = jnp.asarray(s_init, jnp.float32) / np.float32(_ERFI_OF_ROOT_HALF)
        scale = jnp.maximum(jnp.sum(factor * erfi(arguments)), 0)

        updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        displacement = jax.tree.map(lambda d, u: d + u.astype(d.dtype), state.displacement, updates)
        updates = jax.tree.map(
            lambda u, w, w0, d: (rounded(scale.astype(d.dtype) * d) + (w0 - w.astype(d.dtype))).astype(u.dtype),
            updates,
            params,
            state.reference,
            displacement,
        )
        return updates, TracState(state.reference, displacement, sums, variances, scale, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def erfi(x: chex.Array) -> chex.Array:
    r"""Return the imaginary error function :math:`\frac{2}{\sqrt\pi} \int_0^x e^{t^2} dt`, to a relative error of 1e-5.

    Rybicki's sum: :math:`\frac{4}{\pi} \sum_{n = 1, 3, 5, \dots} \frac{1}{n} e^{-n^2 d^2} \sinh(2 n d x)`.

    Args:
      x: float32 array; values are clipped to ±9.

    Returns:
      float32 array of its shape.

    Example:
      >>> import jax.numpy as jnp
      >>> [f"{y:.3f}" for y in erfi(jnp.array([0.0, 1.0, -2.0]))]
      ['0.000', '1.650', '-18.565']

    References:
      Rybicki, `Dawson's integral and the sampling theorem <https://doi.org/10.1063/1.4822832>`_, Computers in Physics
      1989
    """
    size = jnp.minimum(jnp.abs(x), _LARGEST)[..., None]
    steps = _WIDTH * _NODES
    # Not sinh times a factor, since one of the two would overflow.
    halves = jnp.exp(2 * steps * size - steps**2) * -jnp.expm1(-4 * steps * size)
    return jnp.sign(x) * np.float32(2 / math.pi) * jnp.sum(halves / _NODES, -1)


def _wide(leaf: chex.Array) -> jnp.dtype:
    # In bfloat16, adding a step to the displacement would be rounded away.
    return jnp.promote_types(jnp.result_type(leaf), jnp.float32)
