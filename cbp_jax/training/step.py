"""One training step, for any network and loss, and for a learner on a batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from cbp_jax import curvature, metrics
from cbp_jax.losses import LOSSES
from cbp_jax.training.learner import Learner, weights_of
from cbp_jax.units import Features, reset_batch_stats

#: What `learn` measures in addition if `measured` is set.
OF_UPDATES = ("plasticity", "gradient_l0", "gradient_l1", "gradient_l2")


class Step(NamedTuple):
    """The result of a step."""

    params: optax.Params
    opt_state: optax.OptState
    loss: chex.Array  # [], before the update
    grads: optax.Updates
    found: Any  # what else the loss function returned


def train_step(
    tx: optax.GradientTransformationExtraArgs,
    loss_fn: Callable[[optax.Params], tuple[chex.Array, tuple[Features, Any]]],
    params: optax.Params,
    opt_state: optax.OptState,
    **extra: Any,
) -> Step:
    """Make one update by the gradient of a loss, with the activations of units.

    Args:
      tx: the optimizer.
      loss_fn: `params -> (loss, (features, found))`, with the activations of units and anything else to return.
      params: the parameters to update.
      opt_state: the optimizer's state.
      **extra: further arguments of the optimizer's update.

    Returns:
      the step.

    Example:
      >>> tx = optax.with_extra_args_support(optax.sgd(0.5))
      >>> loss_fn = lambda w: (jnp.sum(w**2), ({}, {"first": w[0]}))
      >>> step = train_step(tx, loss_fn, jnp.ones(2), tx.init(jnp.ones(2)))
      >>> step.params.tolist(), float(step.loss), float(step.found["first"])
      ([0.0, 0.0], 2.0, 1.0)
    """
    (loss, (features, found)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params, features=features, **extra)
    return Step(optax.apply_updates(params, updates), opt_state, loss, grads, found)


def as_it_is(outputs: chex.Array) -> chex.Array:
    """Return the outputs themselves: the default of `head`."""
    return outputs


def learn(
    learner: Learner,
    tx: optax.GradientTransformationExtraArgs,
    loss: str,
    params: optax.Params,
    opt_state: optax.OptState,
    batch: tuple[chex.Array, chex.Array],
    key: chex.PRNGKey,
    *,
    head: Callable[[chex.Array], chex.Array] = as_it_is,
    measured: bool = False,
    reference: chex.Array | None = None,
) -> tuple[optax.Params, optax.OptState, dict[str, chex.Array]]:
    """Take one step of a learner on a batch.

    Args:
      learner: the learner that is trained.
      tx: its optimizer.
      loss: a name of `losses.LOSSES`.
      params: the network's parameters.
      opt_state: the optimizer's state.
      batch: inputs and targets.
      key: key for random parts of training, such as dropout.
      head: a function applied to the outputs before the loss.
      measured: whether to measure plasticity and gradients, which takes an extra forward pass.
      reference: earlier inputs, if the learner needs them.

    Returns:
      the parameters and the optimizer's state after the step; and scalars: `loss` and the loss's own metrics, before
      learning from the batch. With `measured` also `plasticity`, from each example's loss before and after the update,
      and for gradients `gradient_l0`, the fraction that is not 0, `gradient_l1` and `gradient_l2`.
    """
    x, y = batch
    losses_of, _, measures = LOSSES[loss]

    def in_training(params, x):
        """Return outputs, features, and new running statistics, or None if the network has none."""
        outputs, features = learner.train(params, x, key)
        outputs, statistics = outputs if learner.batch_stats else (outputs, None)
        return head(outputs), features, statistics

    def loss_fn(params):
        outputs, features, statistics = in_training(params, x)
        losses = losses_of(outputs, y)
        return jnp.mean(losses), (features, (outputs, losses, statistics))

    extra = {} if reference is None else {"reference": reference}
    if learner.curvature:
        extra["hessian_diag"] = curvature.hesscale(lambda params, x: in_training(params, x)[0], params, x, y, loss)[2]
    params, opt_state, mean, grads, (outputs, losses, statistics) = train_step(tx, loss_fn, params, opt_state, **extra)
    if learner.batch_stats:
        params = _with_statistics(learner, params, opt_state, statistics)
    found = {"loss": mean, **{name: of(outputs, y) for name, of in measures.items()}}
    if measured:
        after = losses_of(in_training(params, x)[0], y)
        grads = weights_of(grads)
        found["plasticity"] = jnp.mean(metrics.plasticity(losses, after))
        nonzero = sum(jnp.count_nonzero(g) for g in jax.tree.leaves(grads))
        found["gradient_l0"] = nonzero / optax.tree.size(grads)
        found["gradient_l1"] = optax.tree.norm(grads, ord=1)
        found["gradient_l2"] = optax.tree.norm(grads)
    return params, opt_state, found


def evaluate(
    learner: Learner,
    loss: str,
    params: optax.Params,
    batch: tuple[chex.Array, chex.Array],
    head: Callable[[chex.Array], chex.Array] = as_it_is,
) -> dict[str, chex.Array]:
    """Return the loss of a learner on a batch, without learning, and the loss's own metrics."""
    x, y = batch
    outputs = head(learner.predict(params, x)[0])
    losses_of, _, measures = LOSSES[loss]
    return {"loss": jnp.mean(losses_of(outputs, y)), **{name: of(outputs, y) for name, of in measures.items()}}


def _with_statistics(
    learner: Learner, params: optax.Params, opt_state: optax.OptState, statistics: Any
) -> optax.Params:
    """Return parameters with new running statistics, reset for replaced units, instead of what the optimizer returned
    for them."""
    found = optax.tree_utils.tree_get_all_with_path(opt_state, "replaced")
    if found:
        statistics = reset_batch_stats(statistics, learner.units, found[0][1])
    return {**params, **statistics}
