"""Adam with a step count for each weight, so that replaced weights restart while the others continue."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cbp_jax.numerics.rounding import rounded
from cbp_jax.numerics.scalars import check_scalar

# Interpolates (2**r - 1) / r at the Chebyshev nodes of [-1/2, 1/2], relative error 5e-7. Lowest power first.
_EXP2 = (0.69314718, 0.24022349, 0.05550381, 0.00966637, 0.00133813)


class ScaleByAdamState(NamedTuple):
    """State of :func:`scale_by_adam`; all fields are pytrees of the params' structure and shapes."""

    count: optax.Updates  # int32, updates since the weight was made
    mu: optax.Updates  # running mean of the gradient, float32 (float64 for float64 params)
    nu: optax.Updates  # running mean of its square, in the same precision


def scale_by_adam(
    b1: chex.Numeric = 0.9, b2: chex.Numeric = 0.999, eps: chex.Numeric = 1e-8
) -> optax.GradientTransformation:
    """Rescale gradients like Adam, with a step count for each weight. See :func:`adam`.

    Args:
      b1: decay rate of the mean of gradients, in [0, 1).
      b2: decay rate of the mean of squared gradients, in [0, 1).
      eps: added to the root of the mean square, >= 0.

    Returns:
      an optax transformation; its updates have the gradients' dtype.

    Raises:
      ValueError: a setting is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = scale_by_adam()
      >>> state = tx.init(jnp.zeros(2))
      >>> updates, state = tx.update(jnp.array([3.0, -0.1]), state)
      >>> updates.round(4).tolist(), state.count.tolist()
      ([1.0, -1.0], [1, 1])
    """
    check_scalar("b1", b1, at_least=0, below=1)
    check_scalar("b2", b2, at_least=0, below=1)
    check_scalar("eps", eps, at_least=0)

    def init_fn(params: optax.Params) -> ScaleByAdamState:
        # In bfloat16, adding (1 - b2) g**2 to the mean would be rounded away.
        zeros = lambda p: jnp.zeros(jnp.shape(p), jnp.promote_types(jnp.result_type(p), jnp.float32))
        return ScaleByAdamState(
            count=jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), jnp.int32), params),
            mu=jax.tree.map(zeros, params),
            nu=jax.tree.map(zeros, params),
        )

    def update_fn(
        updates: optax.Updates, state: ScaleByAdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByAdamState]:
        del params
        wide = jax.tree.map(lambda g, m: g.astype(m.dtype), updates, state.mu)
        # One product in the sum, since of two a compiler may fuse either: vmapped seeds are bit for bit equal to solo
        # runs.
        mu = jax.tree.map(lambda g, m: (m + (1 - b1) * (g - m)).astype(m.dtype), wide, state.mu)
        nu = jax.tree.map(lambda g, v: (v + (1 - b2) * (g * g - v)).astype(v.dtype), wide, state.nu)
        count = jax.tree.map(lambda n: jnp.minimum(n, np.int32(2**30)) + 1, state.count)  # never overflows

        def rescale(g: chex.Array, m: chex.Array, v: chex.Array, n: chex.Array) -> chex.Array:
            # Both corrections in one division, the most expensive of these operations.
            start_m, start_v = _one_minus_power(b1, n, m.dtype), _one_minus_power(b2, n, v.dtype)
            return (m * start_v / (start_m * (jnp.sqrt(v * start_v) + rounded(eps * start_v)))).astype(g.dtype)

        return jax.tree.map(rescale, updates, mu, nu, count), ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init_fn, update_fn)


def adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    r"""Create Adam with a step count for each weight.

    With gradient g, and n the number of updates since the weight was made or last reset,

    .. math::
        m \leftarrow b_1 m + (1 - b_1) g, \quad v \leftarrow b_2 v + (1 - b_2) g^2, \quad
        u = -\eta \frac{m / (1 - b_1^n)}{\sqrt{v / (1 - b_2^n)} + \epsilon}.

    `optax.adam` has one n for all weights. Once it is large, a weight whose moments were set to 0 takes a first step of
    :math:`(1 - b_1) / \sqrt{1 - b_2}` (3.16 for the defaults) learning rates instead of one, and the steps after it are
    too large for some time. Where nothing is reset, the two are equal up to rounding.

    Args:
      learning_rate: a number, a tracer, or an optax schedule. A schedule's own count is shared by all weights.
      b1: decay rate of the mean of gradients, in [0, 1). May be traced, as b2 and eps.
      b2: decay rate of the mean of squared gradients, in [0, 1).
      eps: added to the root of the mean square, >= 0.

    Returns:
      an optax transformation, the chain of :func:`scale_by_adam` and `optax.scale_by_learning_rate`.

    Raises:
      ValueError: a setting is out of range.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = adam(0.5)
      >>> params = jnp.array([1.0, 2.0])
      >>> updates, state = tx.update(2 * params, tx.init(params), params)
      >>> optax.apply_updates(params, updates).round(4).tolist()
      [0.5, 1.5]

    References:
      Kingma & Ba, `Adam: a method for stochastic optimization <https://arxiv.org/abs/1412.6980>`_, 2015
    """
    if not callable(learning_rate):
        check_scalar("learning_rate", learning_rate)
    return optax.chain(scale_by_adam(b1, b2, eps), optax.scale_by_learning_rate(learning_rate))


def _one_minus_power(base: chex.Numeric, exponent: chex.Array, dtype: jnp.dtype) -> chex.Array:
    """Return `1 - base**exponent` for exponents >= 1, elementwise, to a relative error of 1e-6.

    `jnp.power` with an exponent for each weight makes a step ten times slower than `optax.adam`'s, and `1 - exp(n log
    b)` loses digits while n (1 - b) is small. Here 2**y = 2**k 2**r with k an integer and |r| <= 1/2, and 1 - 2**k is
    exact.
    """
    log2: chex.Array
    if isinstance(base, jax.Array):
        log2 = jnp.log1p(base.astype(jnp.float32) - 1) / np.float32(np.log(2))
    else:
        with np.errstate(divide="ignore"):
            log2 = np.float32(np.log2(np.float64(base)))
    y = jnp.maximum(exponent.astype(jnp.float32) * log2, np.float32(-126))
    k = jnp.round(y)
    r = y - k
    power = jax.lax.bitcast_convert_type((k.astype(jnp.int32) + 127) << 23, jnp.float32)
    polynomial = jnp.full_like(r, _EXP2[-1])
    for coefficient in _EXP2[-2::-1]:
        polynomial = polynomial * r + np.float32(coefficient)
    return ((1 - power) - power * (r * polynomial)).astype(dtype)
