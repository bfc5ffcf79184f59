"""Plasticity injection on a stream of tasks: before one task, the head is frozen and a fresh one is added."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cbp_jax import injection
from cbp_jax.training.head import output_layers, restart
from cbp_jax.training.learner import INJECTION, Learner
from cbp_jax.units import Units, leaves_by_path


def last_layers(units: Units, count: int) -> tuple[str, ...]:
    """Return the layers of a network's head: the output layer and, before it, those that compute the last hidden units.

    Args:
      units: of `discover_units`.
      count: number of layers: 1 for only the output layer, 2 for it and the last hidden layer, and so on.

    Returns:
      paths of layers and of parameters: kernels, biases and scales of normalization.

    Raises:
      ValueError: there are too few hidden layers, or no output layer was found.

    Example:
      >>> import jax, jax.numpy as jnp, cbp_jax
      >>> net = cbp_jax.nets.MLP((5, 4), 2)
      >>> params = jax.eval_shape(net.init, jax.random.key(0), jnp.ones((1, 3)))
      >>> last_layers(cbp_jax.discover_units(net.apply, params, jnp.ones((1, 3))), 2)
      ('params/Dense_1/kernel', 'params/Dense_1/bias', 'params/Dense_2')
    """
    if count - 1 > len(units):
        raise ValueError(
            f"the head has {count} layers, and the network has {len(units)} hidden layers and the output's"
        )
    hidden = list(units)[len(units) - (count - 1) :]
    paths = [part.path for group in hidden for part in (*group.incoming, *group.biases, *group.scales)]
    return (*dict.fromkeys(paths), *output_layers(units))


def with_injection(learner: Learner, layers: Collection[str], at: int) -> Learner:
    """Return a learner whose head is frozen before a task, when a fresh one is added. See `injection.inject`.

    The frozen heads are a collection of the network's variables, "injection", which no optimizer sees. Until that task
    they are 0, so their outputs are 0 too.

    Args:
      learner: a learner whose variables are a dict of collections, without running statistics.
      layers: paths of the head's layers and parameters.
      at: the number of the task, from 0, before which the head is injected.

    Returns:
      the learner. The optimizer's state for the head is reset together with the head.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from cbp_jax.experiments.learners import make_learner, parse_method
      >>> learner = make_learner([parse_method("injection")], (5, 4), "relu", (3,), 2)
      >>> sorted(jax.eval_shape(learner.init, jax.random.key(0))["injection"])
      ['params/Dense_1/bias', 'params/Dense_1/kernel', 'params/Dense_2/bias', 'params/Dense_2/kernel']
    """

    def init(key):
        params = learner.init(key)
        _, frozen = injection.inject(params, params, layers)
        return {**params, INJECTION: jax.tree.map(jnp.zeros_like, frozen)}

    def summed(apply):
        def call(params, *inputs):
            params, frozen = _apart(params)
            outputs, features = injection.heads_of(apply)(params, frozen, *inputs)
            return outputs[0] + outputs[1] - outputs[2], jax.tree.map(lambda h: h[0], features)

        return call

    def begin_task(tx, key, task, params, opt_state):
        old, frozen = _apart(params)
        fresh = learner.init(key)
        head = [path for path in leaves_by_path(old) if path in frozen]
        new, new_frozen = injection.inject(old, fresh, head)
        _, new_state = restart("head", tx, old, opt_state, head, fresh)
        injected = ({**new, INJECTION: new_frozen}, new_state)
        return jax.tree.map(lambda new, old: jnp.where(task == at, new, old), injected, (params, opt_state))

    return learner._replace(
        init=init,
        predict=summed(learner.predict),
        train=summed(learner.train),
        optimizer=lambda numbers, key: _beside_frozen(learner.optimizer(numbers, key)),
        begin_task=begin_task,
    )


def _apart(params: optax.Params) -> tuple[optax.Params, injection.FrozenHeads]:
    return {name: leaves for name, leaves in params.items() if name != INJECTION}, params[INJECTION]


def _beside_frozen(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Return an optimizer that does not change the frozen heads. Its state is that of the optimizer of the other
    parameters."""
    tx = optax.with_extra_args_support(tx)
    # Optax passes placeholders for params to find the parts of a state that belong to them.
    without = lambda tree: _apart(tree)[0] if isinstance(tree, dict) and INJECTION in tree else tree

    def update(grads: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any):
        updates, state = tx.update(without(grads), state, without(params), **extra_args)
        return {**updates, INJECTION: jax.tree.map(jnp.zeros_like, grads[INJECTION])}, state

    return optax.GradientTransformationExtraArgs(lambda params: tx.init(without(params)), update)
