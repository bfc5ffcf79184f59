"""Streaming EWC, MAS, synaptic intelligence and RWalk: important weights are pulled toward their running mean.

All are built by :func:`add_consolidation`. They differ in their :class:`Importance`: which quantities are averaged over
updates, and how the importance of a weight is computed from the means.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cbp_jax.numerics.rounding import rounded
from cbp_jax.numerics.scalars import check_like, check_scalar


class Step(NamedTuple):
    """Inputs of an importance for one parameter at an update; arrays of its shape, float32 (float64 for float64
    params)."""

    gradient: chex.Array  # of the loss at the current weights
    sensitivity: chex.Array  # what the caller passed; by default the gradient
    change: chex.Array  # current weights minus those at the previous update; 0 at the first
    cause: chex.Array  # gradient of the update that made this change; 0 at the first
    means: tuple[chex.Array, ...]  # at the update that made this change, bias-corrected; 0 at the first


@dataclasses.dataclass(frozen=True)
class Importance:
    """How the importance of weights is computed.

    Attributes:
      observe: takes a `Step` and returns the quantities to be averaged.
      combine: takes their bias-corrected means and returns the importance.
      means: how many quantities there are.
      follows_path: whether `observe` uses `change` and `cause`, which need two copies of the params.
    """

    observe: Callable[[Step], tuple[chex.Array, ...]]
    combine: Callable[..., chex.Array]
    means: int
    follows_path: bool = False


class ConsolidationState(NamedTuple):
    """State of consolidation: trees of the params' structure and shapes, float32 (float64 for float64 params).

    A rate is the weight of the last update in a bias-corrected running mean, (1 - beta) / (1 - beta**n) after n
    updates, and 0 before the first. There is one for each weight, so that a replaced weight restarts.
    """

    params_mean: optax.Params  # bias-corrected running mean of the weights
    params_rate: optax.Updates  # rate of that mean
    importance_means: tuple[optax.Updates, ...]  # bias-corrected running means of what the importance observes
    importance_rate: optax.Updates  # rate of these means
    previous: tuple[optax.Updates, ...]  # weights and gradient of the last update, or () if not needed


def add_consolidation(
    importance: Importance,
    strength: chex.Numeric = 1.0,
    *,
    beta_weight: chex.Numeric = 0.999,
    beta_importance: chex.Numeric = 0.999,
) -> optax.GradientTransformationExtraArgs:
    r"""Add the gradient of a penalty on the distance to the mean of past weights, weighted by importance.

    .. math::
        g \leftarrow g + \lambda\,\Omega\,(w - \bar w)

    for a penalty of :math:`\frac{\lambda}{2} \sum \Omega (w - \bar w)^2` with :math:`\bar w` and :math:`\Omega` held
    fixed. :math:`\bar w` is the running mean of the weights, including the current ones, and :math:`\Omega` is computed
    from running means too. All are bias-corrected like Adam's. So no tasks and no task boundaries need to be known.

    Args:
      importance: `EWC`, `MAS`, `synaptic_intelligence_importance()`, `rwalk_importance()`, or your own.
      strength: :math:`\lambda`, >= 0. May be traced, like the others.
      beta_weight: decay rate of the running mean of weights, in [0, 1). At 0 there is no pull.
      beta_importance: decay rate of the running means that make up the importance, in [0, 1).

    Returns:
      an optax transformation to chain before an optimizer. Its update needs the params and takes the extra argument
      `sensitivity`, a tree like the gradients, which some importances use instead of the gradients.

    Raises:
      ValueError: a setting is out of range; in `update`, params are missing or the sensitivity is not such a tree.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = add_consolidation(EWC, strength=2.0, beta_weight=0.5, beta_importance=0.0)
      >>> state = tx.init(jnp.array([0.0, 0.0]))
      >>> _, state = tx.update(jnp.ones(2), state, jnp.array([0.0, 0.0]))
      >>> updates, state = tx.update(jnp.array([1.0, 0.0]), state, jnp.array([3.0, 3.0]))
      >>> state.params_mean.tolist(), updates.tolist()
      ([2.0, 2.0], [3.0, 0.0])
    """
    check_scalar("strength", strength, at_least=0)
    check_scalar("beta_weight", beta_weight, at_least=0, below=1)
    check_scalar("beta_importance", beta_importance, at_least=0, below=1)

    def init_fn(params: optax.Params) -> ConsolidationState:
        # In bfloat16, adding a thousandth of a weight to the mean would be rounded away.
        zeros = lambda w: jnp.zeros(jnp.shape(w), _wide(w))
        # Initialized to the weights of the first update, so that the first change is 0, not w - 0.
        # Copies, so that params and state can both be donated to a jitted step.
        copy = lambda w: jnp.array(w, _wide(w), copy=True)
        return ConsolidationState(
            params_mean=jax.tree.map(zeros, params),
            params_rate=jax.tree.map(zeros, params),
            importance_means=tuple(jax.tree.map(zeros, params) for _ in range(importance.means)),
            importance_rate=jax.tree.map(zeros, params),
            previous=(jax.tree.map(copy, params), jax.tree.map(zeros, params)) if importance.follows_path else (),
        )

    def update_fn(updates, state, params=None, *, sensitivity: optax.Updates | None = None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError("consolidation needs the params: tx.update(grads, state, params), got params=None")
        sensitivity = updates if sensitivity is None else sensitivity
        check_like("sensitivity", sensitivity, updates)

        def consolidate(update, sensitive, param, params_mean, params_rate, importance_rate, *rest):
            old_means, previous = rest[: importance.means], rest[importance.means :]
            g, s, w = (x.astype(params_mean.dtype) for x in (update, sensitive, param))
            change, cause = (w - previous[0], previous[1]) if importance.follows_path else (jnp.zeros_like(w),) * 2
            params_rate, importance_rate = _next(params_rate, beta_weight), _next(importance_rate, beta_importance)
            params_mean = params_mean + rounded(params_rate * (w - params_mean))
            observed = importance.observe(Step(g, s, change, cause, old_means))
            means = tuple(m + rounded(importance_rate * (y - m)) for m, y in zip(old_means, observed, strict=True))
            new_update = (g + rounded(strength * importance.combine(*means) * (w - params_mean))).astype(update.dtype)
            previous = (w, g) if importance.follows_path else ()
            return new_update, ConsolidationState(params_mean, params_rate, means, importance_rate, previous)

        results = jax.tree.map(
            consolidate,
            updates,
            sensitivity,
            params,
            state.params_mean,
            state.params_rate,
            state.importance_rate,
            *state.importance_means,
            *state.previous,
        )
        if not jax.tree.leaves(updates):  # a mask may leave no parameter
            return updates, state
        previous = (0, 0) if importance.follows_path else ()
        one = (0, ConsolidationState(0, 0, (0,) * importance.means, 0, previous))
        return jax.tree.transpose(jax.tree.structure(updates), jax.tree.structure(one), results)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def ewc(
    learning_rate: optax.ScalarOrSchedule,
    strength: chex.Numeric = 1.0,
    *,
    beta_weight: chex.Numeric = 0.999,
    beta_importance: chex.Numeric = 0.999,
) -> optax.GradientTransformationExtraArgs:
    r"""Create streaming elastic weight consolidation: SGD with weights held by their empirical Fisher information.

    .. math::
        w \leftarrow w - \eta\,(g + \lambda\,\Omega\,(w - \bar w)), \qquad \Omega = \overline{g^2}

    where bars are bias-corrected running means, including the current weights and gradient. The original keeps a Fisher
    diagonal and weights for each past task, with the penalty :math:`\frac{\lambda}{2} \Omega (w - \bar w)^2`;
    :math:`\lambda` is the same here.

    Args:
      learning_rate: :math:`\eta`: a number, a tracer, or an optax schedule.
      strength: :math:`\lambda`, >= 0. May be traced, like the others.
      beta_weight: decay rate of the mean of weights, in [0, 1). At 0 there is no pull.
      beta_importance: decay rate of the mean of squared gradients, in [0, 1).

    Returns:
      an optax transformation, the chain of :func:`add_consolidation` and `optax.scale_by_learning_rate`. Its update
      needs the params.

    Raises:
      ValueError: a setting is out of range; in `update`, params are missing.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = ewc(0.5, strength=1.0, beta_weight=0.5)
      >>> params = jnp.array([1.0, 2.0])
      >>> updates, state = tx.update(2 * params, tx.init(params), params)  # the mean is still the weights: SGD
      >>> optax.apply_updates(params, updates).tolist()
      [0.0, 0.0]

    References:
      Kirkpatrick et al., `Overcoming catastrophic forgetting in neural networks <https://arxiv.org/abs/1612.00796>`_,
      2017, equation 3

      Elsayed & Mahmood, `Addressing loss of plasticity and catastrophic forgetting in continual learning
      <https://arxiv.org/abs/2404.00781>`_, ICLR 2024 (the streaming forms)
    """
    return _descend(EWC, learning_rate, strength, beta_weight, beta_importance)


def mas(
    learning_rate: optax.ScalarOrSchedule,
    strength: chex.Numeric = 1.0,
    *,
    beta_weight: chex.Numeric = 0.999,
    beta_importance: chex.Numeric = 0.999,
) -> optax.GradientTransformationExtraArgs:
    r"""Create streaming memory aware synapses: SGD with weights held by how strongly the network's output depends on
    them.

    .. math::
        w \leftarrow w - \eta\,(g + \lambda\,\Omega\,(w - \bar w)), \qquad \Omega = \overline{|s|}

    where bars are bias-corrected running means. In the original, s is the gradient of the squared norm of the network's
    output, which needs no labels, and the penalty is :math:`\lambda_{\mathrm{MAS}} \Omega (w - \bar w)^2`, so
    :math:`\lambda = 2 \lambda_{\mathrm{MAS}}`. The streaming form of Elsayed & Mahmood uses s = g, the gradient of the
    loss, which saves a second backward pass. So does this one, unless s is given.

    Args:
      learning_rate: :math:`\eta`: a number, a tracer, or an optax schedule.
      strength: :math:`\lambda`, >= 0. May be traced, like the others.
      beta_weight: decay rate of the mean of weights, in [0, 1). At 0 there is no pull.
      beta_importance: decay rate of the mean of absolute sensitivities, in [0, 1).

    Returns:
      an optax transformation, the chain of :func:`add_consolidation` and `optax.scale_by_learning_rate`. Its update
      needs the params, and takes s as `tx.update(grads, state, params, sensitivity=s)`. The mean of |s| runs over
      updates: within a batch, values of opposite sign cancel first.

    Raises:
      ValueError: a setting is out of range; in `update`, params are missing or s is not a tree like the gradients.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> tx = mas(0.5, strength=1.0, beta_weight=0.5)
      >>> params, x = jnp.array([1.0, -2.0]), jnp.array([[3.0, 1.0]])
      >>> sensitivity = jax.grad(lambda w: jnp.sum((x @ w) ** 2))(params)
      >>> updates, state = tx.update(jnp.zeros(2), tx.init(params), params, sensitivity=sensitivity)
      >>> state[0].importance_means[0].tolist()
      [6.0, 2.0]

    References:
      Aljundi et al., `Memory aware synapses: learning what (not) to forget <https://arxiv.org/abs/1711.09601>`_, 2018

      Elsayed & Mahmood, `Addressing loss of plasticity and catastrophic forgetting in continual learning
      <https://arxiv.org/abs/2404.00781>`_, ICLR 2024 (the streaming forms)
    """
    return _descend(MAS, learning_rate, strength, beta_weight, beta_importance)


def synaptic_intelligence(
    learning_rate: optax.ScalarOrSchedule,
    strength: chex.Numeric = 1.0,
    *,
    beta_weight: chex.Numeric = 0.999,
    beta_importance: chex.Numeric = 0.999,
    epsilon: chex.Numeric = 1e-3,
) -> optax.GradientTransformationExtraArgs:
    r"""Create streaming synaptic intelligence: SGD with weights held by how much their changes reduced the loss.

    .. math::
        w \leftarrow w - \eta\,(g + \lambda\,\Omega\,(w - \bar w)), \qquad
        \Omega = \frac{\overline{-g' \Delta}}{\overline{\Delta}^{\,2} + \epsilon}

    where bars are bias-corrected running means, :math:`\Delta` is the change of the weight since the last update, and
    g' is the gradient of that update, which made the change. To first order, the change reduced the loss by :math:`-g'
    \Delta`. The original sums it, and :math:`\Delta`, over a task (its equations 3 to 5), and its penalty is
    :math:`c\,\Omega (w - \bar w)^2`, so :math:`\lambda = 2c`. At the first update the change counts as 0.

    As in the original, :math:`\Omega` may become negative. Under plain SGD, :math:`-g' \Delta = \eta g'^2` is never
    negative. But under a strong pull, or with momentum after this transformation, a weight may move up its gradient,
    and while such moves prevail it is pushed away instead of pulled. For a lower bound of 0, give
    :func:`add_consolidation` an :class:`Importance` that has one.

    Args:
      learning_rate: :math:`\eta`: a number, a tracer, or an optax schedule.
      strength: :math:`\lambda`, >= 0. May be traced, like the others.
      beta_weight: decay rate of the mean of weights, in [0, 1). At 0 there is no pull.
      beta_importance: decay rate of the means of :math:`-g' \Delta` and :math:`\Delta`, in [0, 1).
      epsilon: :math:`\epsilon`, which bounds the importance of weights that hardly move, > 0.

    Returns:
      an optax transformation, the chain of :func:`add_consolidation` and `optax.scale_by_learning_rate`. Its update
      needs the params.

    Raises:
      ValueError: a setting is out of range; in `update`, params are missing.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = synaptic_intelligence(0.5, beta_importance=0.0, epsilon=0.5)
      >>> params = jnp.array([1.0, 2.0])
      >>> state = tx.init(params)
      >>> for grads in (jnp.array([1.0, 0.0]), jnp.zeros(2)):
      ...   updates, state = tx.update(grads, state, params)
      ...   params = optax.apply_updates(params, updates)
      >>> [mean.tolist() for mean in state[0].importance_means]  # of -g' change, and of the change
      [[0.5, 0.0], [-0.5, 0.0]]

    References:
      Zenke, Poole & Ganguli, `Continual learning through synaptic intelligence <https://arxiv.org/abs/1703.04200>`_,
      2017, equations 3 to 5

      Elsayed & Mahmood, `Addressing loss of plasticity and catastrophic forgetting in continual learning
      <https://arxiv.org/abs/2404.00781>`_, ICLR 2024 (the streaming forms)
    """
    importance = synaptic_intelligence_importance(epsilon)
    return _descend(importance, learning_rate, strength, beta_weight, beta_importance)


def rwalk(
    learning_rate: optax.ScalarOrSchedule,
    strength: chex.Numeric = 1.0,
    *,
    beta_weight: chex.Numeric = 0.999,
    beta_importance: chex.Numeric = 0.999,
    epsilon: chex.Numeric = 1e-3,
) -> optax.GradientTransformationExtraArgs:
    r"""Create streaming Riemannian walk: SGD with weights held by their Fisher information and by their path.

    .. math::
        w \leftarrow w - \eta\,(g + \lambda\,\Omega\,(w - \bar w)), \qquad
        \Omega = \overline{g^2} + \overline{\frac{\max(0, -g' \Delta)}{\frac12 F' \Delta^2 + \epsilon}}

    where bars are bias-corrected running means, :math:`\Delta` is the change of the weight since the last update, and
    g' and F' are the gradient and the mean of squared gradients of that update, which made the change. The fraction is
    how much the change reduced the loss per step on the Riemannian manifold, or 0 if the loss rose. The original keeps
    the Fisher information as a running mean, sums the scores over a task, halves them from task to task (its equations
    8 to 10), and has the penalty :math:`\lambda_{\mathrm{RW}} \Omega (w - \bar w)^2`, so :math:`\lambda = 2
    \lambda_{\mathrm{RW}}`. At the first update the score is 0.

    Args:
      learning_rate: :math:`\eta`: a number, a tracer, or an optax schedule.
      strength: :math:`\lambda`, >= 0. May be traced, like the others.
      beta_weight: decay rate of the mean of weights, in [0, 1). At 0 there is no pull.
      beta_importance: decay rate of the means of squared gradients and of scores, in [0, 1).
      epsilon: :math:`\epsilon`, which bounds the score of weights that hardly move, > 0.

    Returns:
      an optax transformation, the chain of :func:`add_consolidation` and `optax.scale_by_learning_rate`. Its update
      needs the params.

    Raises:
      ValueError: a setting is out of range; in `update`, params are missing.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = rwalk(0.5, beta_importance=0.0, epsilon=0.375)
      >>> params = jnp.array([1.0, 2.0])
      >>> state = tx.init(params)
      >>> for grads in (jnp.array([1.0, 0.0]), jnp.zeros(2)):
      ...   updates, state = tx.update(grads, state, params)
      ...   params = optax.apply_updates(params, updates)
      >>> [mean.tolist() for mean in state[0].importance_means]  # of g**2, and of scores: 0.5 / (0.125 + 0.375)
      [[0.0, 0.0], [1.0, 0.0]]

    References:
      Chaudhry et al., `Riemannian walk for incremental learning: understanding forgetting and intransigence
      <https://arxiv.org/abs/1801.10112>`_, 2018, equations 8 to 10

      Elsayed & Mahmood, `Addressing loss of plasticity and catastrophic forgetting in continual learning
      <https://arxiv.org/abs/2404.00781>`_, ICLR 2024 (the streaming forms)
    """
    return _descend(rwalk_importance(epsilon), learning_rate, strength, beta_weight, beta_importance)


EWC = Importance(observe=lambda step: (rounded(step.gradient**2),), combine=lambda fisher: fisher, means=1)
MAS = Importance(observe=lambda step: (jnp.abs(step.sensitivity),), combine=lambda sensitivity: sensitivity, means=1)


def synaptic_intelligence_importance(epsilon: chex.Numeric = 1e-3) -> Importance:
    """Return the importance of :func:`synaptic_intelligence`, for :func:`add_consolidation`.

    Args:
      epsilon: as there, > 0.

    Returns:
      the importance.

    Raises:
      ValueError: `epsilon` is not positive.
    """
    _check_epsilon(epsilon)
    return Importance(
        observe=lambda step: (rounded(-step.cause * step.change), step.change),
        combine=lambda gain, change: gain / (rounded(change**2) + epsilon),
        means=2,
        follows_path=True,
    )


def rwalk_importance(epsilon: chex.Numeric = 1e-3) -> Importance:
    """Return the importance of :func:`rwalk`, for :func:`add_consolidation`.

    Args:
      epsilon: as there, > 0.

    Returns:
      the importance.

    Raises:
      ValueError: `epsilon` is not positive.
    """
    _check_epsilon(epsilon)

    def observe(step: Step) -> tuple[chex.Array, chex.Array]:
        fisher, _ = step.means  # includes the gradient that caused the change, but not the current one
        distance = rounded(0.5 * fisher * step.change**2) + epsilon
        return rounded(step.gradient**2), jnp.maximum(0, -step.cause * step.change) / distance

    return Importance(observe, combine=lambda fisher, score: fisher + score, means=2, follows_path=True)


def _descend(importance, learning_rate, strength, beta_weight, beta_importance):
    if not callable(learning_rate):
        check_scalar("learning_rate", learning_rate)
    return optax.chain(
        add_consolidation(importance, strength, beta_weight=beta_weight, beta_importance=beta_importance),
        optax.scale_by_learning_rate(learning_rate),
    )


def _next(rate: chex.Array, beta: chex.Numeric) -> chex.Array:
    """Return the rate at an update, from the previous one. Needs no power, and has no sum of products that a compiler
    could fuse."""
    return jnp.where(rate == 0, 1, rate / (rate + beta)).astype(rate.dtype)


def _wide(param: chex.Array) -> jnp.dtype:
    return jnp.promote_types(jnp.result_type(param), jnp.float32)


def _check_epsilon(epsilon: chex.Numeric) -> None:
    # Positive in float32: if a weight does not move, the rest of the denominator is 0.
    check_scalar("epsilon", epsilon, at_least=float(np.finfo(np.float32).tiny))
