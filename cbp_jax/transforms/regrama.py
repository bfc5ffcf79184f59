"""ReGraMa (Liu et al., 2025): periodically recycles units with small gradients."""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import optax

from cbp_jax import replacement
from cbp_jax import units as units_lib
from cbp_jax.replacement import resample
from cbp_jax.transforms.redo import redo


def regrama(
    inner: optax.GradientTransformation,
    units: Sequence[units_lib.UnitGroup],
    *,
    threshold: chex.Numeric = 0.01,
    every: chex.Numeric = 1000,
    initializer: resample.Initializer | None = None,
    reset_inner_state: bool = True,
    key: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Periodically recycle units that hardly learn.

    This is :func:`redo` with another score: how much a unit learns, not how active it is. With the gradient of the
    incoming weights :math:`W_i` of unit i in a group of H units,

    .. math:: G_i = \frac{E|\nabla_{W_i} L|}{\frac{1}{H} \sum_k E|\nabla_{W_k} L|} \le \tau.

    The gradient is the one passed to this transformation in this update. Clipping by the global norm beforehand changes
    no score. Biases do not count. The mean runs over all kernels that write the group.

    Our choice is not to recycle a group whose gradient is 0 or not finite, because a batch that is fitted perfectly has
    no gradient and says nothing about units. With a small number added to the denominator, as in public programs, such
    a group would be recycled as a whole, and :func:`metrics.gradient_dormant_units` counts it as dormant. The batch
    must be large enough for meaningful scores: on one example, silent ReLU units have no gradient.

    Args:
      inner: the optimizer that trains the network.
      units: groups of units, from `discover_units` or written by hand.
      threshold: :math:`\tau`, largest score of a unit that is recycled, >= 0. May be traced.
      every: number of updates between recyclings, a whole number >= 1. May be traced.
      initializer: of incoming weights, see :func:`redo`.
      reset_inner_state: set the inner optimizer's moments of all replaced weights to their initial values.
      key: int or jax key for the fresh weights.

    Returns:
      a transformation like that of :func:`redo`, whose state is a `RedoState`. Its update needs no `features`.

    Raises:
      ValueError: as :func:`redo`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, cbp_jax
      >>> def apply_fn(params, x):
      ...   return jax.nn.relu(x @ params["w1"]) @ params["w2"]
      >>> params = {"w1": jnp.ones((4, 3)).at[:, 1].set(-1.0), "w2": jnp.ones((3, 2))}
      >>> units = cbp_jax.discover_units(apply_fn, params, jnp.ones((5, 4)))
      >>> grads = jax.grad(lambda params: apply_fn(params, jnp.ones((5, 4))).sum())(params)
      >>> tx = cbp_jax.regrama(optax.sgd(0.01), units, every=1)
      >>> _, state = tx.update(grads, tx.init(params), params)
      >>> state.replaced["w1"].tolist()
      [False, True, False]

    References:
      Liu et al., `Measure gradients, not activations! Enhancing neuronal activity in deep reinforcement learning
      <https://arxiv.org/abs/2505.24061>`_, NeurIPS 2025
    """
    return redo(
        inner,
        units,
        threshold=threshold,
        every=every,
        score=gradient_score,
        initializer=initializer,
        reset_inner_state=reset_inner_state,
        key=key,
    )


def gradient_score(view: replacement.GroupView) -> chex.Array:
    """Return the mean absolute gradient of each unit's incoming weights divided by the group's.

    Args:
      view: the group, at one step.

    Returns:
      float32 [units]; NaN if the group's gradient is 0 or not finite.
    """
    # Sums serve as well as means: all units of a group have the same number of incoming weights.
    size = view.incoming_gradient()
    mean = jnp.mean(size)
    return jnp.where(jnp.isfinite(mean) & (mean > 0), size / mean, jnp.nan)
