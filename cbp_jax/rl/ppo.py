"""Proximal policy optimization, entirely on the device, with any optax transformation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import cbp_jax
from cbp_jax.envs.episodes import strong
from cbp_jax.numerics.running import Statistics, counted, unseen
from cbp_jax.rl.epochs import run_epochs
from cbp_jax.rl.loss import ppo_loss
from cbp_jax.rl.rollout import EPISODE, Environment, normalized, rollout
from cbp_jax.rl.settings import DEFAULTS, Settings
from cbp_jax.rl.symptoms import symptoms_of
from cbp_jax.training import output_layers, restart
from cbp_jax.units import Units, leaves_by_path


class State(NamedTuple):
    """State needed to resume an agent."""

    params: optax.Params
    opt_state: optax.OptState
    env_state: Any  # leaves [num_envs, ...]
    statistics: Statistics
    key: chex.Array  # raw key data
    obs: chex.Array  # [rollout_length, num_envs, observations] of the last rollout
    changed: chex.Array  # bool [], whether a period of the environments ended in the last rollout


def make(
    env: Environment,
    network: nn.Module,
    optimizer: Callable[[Units], optax.GradientTransformation],
    settings: Settings = DEFAULTS,
    *,
    reset: str = "",
) -> tuple[Callable[[chex.PRNGKey], State], Callable[[State], tuple[State, dict[str, chex.Array]]]]:
    r"""Create an agent as two pure functions: one creates its state, the other runs a rollout with all its updates.

    The policy is Gaussian. With :math:`\rho` the ratio of an action's probability to that in the rollout and A its
    advantage, an update minimizes the mean over a minibatch of

    .. math::
      -\min\left(\rho A, \text{clip}(\rho, 1 - \epsilon, 1 + \epsilon) A\right)
      + c_V (V(s) - \hat{V})^2 - c_H H.

    With `clip_values`, where V_old is the value in the rollout, the squared error is the larger of that and

    .. math::
      \left(V_\text{old}(s) + \text{clip}(V(s) - V_\text{old}(s), -\epsilon, \epsilon) - \hat{V}\right)^2.

    Args:
      env: a single environment; it is vmapped over `num_envs`.
      network: maps observations [..., observations] to (mean [..., actions], log_std [actions] or [..., actions],
        value [...]), as `nets.ActorCritic` does.
      optimizer: maps the units of policy and value to an optax transformation. Its update gets the gradients after
        clipping by `max_grad_norm` and, as an extra argument, `features` of the minibatch, which continual
        backpropagation and ReDo need.
      settings: the settings.
      reset: what to reinitialize after the environments' `info["period"]` has changed, before the next rollout:
        "network" or "head" (the layers that compute the policy's means and the value, and log-stds that are
        parameters), together with the optimizer's state for it. Statistics of observations are kept.

    Returns:
      `init(key) -> state` and `update(state) -> (state, metrics)`, to be jitted, scanned and vmapped over seeds.
      Metrics are scalars: over the rollout `episodes`, the number of episodes that ended, the sums
      `return_sum` and `length_sum` of their returns and lengths, and the mean of each of the environment's metrics, and
      of its `friction` if it has one; over the updates the means `policy_loss`, `value_loss`, `entropy`, `approx_kl`
      and `clip_fraction`; `explained_variance`, the fraction of the variance of targets that values explain before the
      updates; and `replaced_units`, the number of units replaced by the updates.

    Raises:
      ValueError: the network's means, log-stds or values have wrong shapes for the environment, `reset` is unknown, or,
        from `init`, the environment does not start episodes by itself, or has no periods to reset after.

    Example:
      >>> from cbp_jax import nets
      >>> from cbp_jax.envs.episodes import Episodes
      >>> from cbp_jax.envs.walker import make_brax_env
      >>> env = Episodes(make_brax_env("fast", "spring"))
      >>> cbp = lambda units: cbp_jax.continual_backprop(cbp_jax.adam(3e-4), units)
      >>> init, update = make(env, nets.ActorCritic(env.action_size), cbp)
      >>> state, metrics = jax.eval_shape(lambda key: update(init(key)), jax.random.key(0))
      >>> state.obs.shape, metrics["policy_loss"].shape
      ((64, 32, 2), ())

    References:
      Schulman et al., `Proximal Policy Optimization Algorithms <https://arxiv.org/abs/1707.06347>`_, 2017; the settings
      are of Dohare et al., `Loss of plasticity in deep continual learning
      <https://doi.org/10.1038/s41586-024-07711-7>`_, Nature 2024
    """
    example = jax.ShapeDtypeStruct((1, env.observation_size), jnp.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), example)
    mean, log_std, value = (array.shape for array in jax.eval_shape(network.apply, shapes, example))
    if mean != (1, env.action_size):
        raise ValueError(f"network must give means of the environment's {env.action_size} actions, got shape {mean}")
    if log_std not in ((env.action_size,), (1, env.action_size)):
        raise ValueError(f"network must give a log_std for each of {env.action_size} actions, got shape {log_std}")
    if value != (1,):
        raise ValueError(f"network must give one value for each observation, of shape (1,) for one, got shape {value}")
    units = cbp_jax.discover_units(network.apply, shapes, example, check=True)
    apply = cbp_jax.with_features(network.apply, units)
    tx = optax.with_extra_args_support(optimizer(units))
    if settings.max_grad_norm is not None:
        tx = optax.chain(optax.clip_by_global_norm(settings.max_grad_norm), tx)
    if reset not in ("", "head", "network"):
        raise ValueError(f"reset must be 'head', 'network' or '', got {reset!r}")
    log_stds = [path for path in leaves_by_path(shapes) if path.endswith("log_std")]
    head = (*output_layers(units), *log_stds) if reset == "head" else ()
    needed = (*EPISODE, *(("period",) if reset else ()))

    def fresh(key: chex.PRNGKey) -> optax.Params:
        return network.init(key, jnp.zeros(example.shape))

    def init(key: chex.PRNGKey) -> State:
        params_key, env_key, key = jax.random.split(key, 3)
        params = fresh(params_key)
        size = env.observation_size
        env_state = jax.vmap(env.reset)(jax.random.split(env_key, settings.num_envs))
        if missing := [name for name in needed if name not in env_state.info]:
            raise ValueError(f"env must have {missing} in its states' info, as cbp_jax.envs.Episodes(env) has")
        return State(
            params=params,
            opt_state=tx.init(params),
            env_state=strong(env_state),
            statistics=unseen((size,)),
            key=jax.random.key_data(key),
            obs=jnp.zeros((settings.rollout_length, settings.num_envs, size)),
            changed=jnp.zeros([], bool),
        )

    def update(state: State) -> tuple[State, dict[str, chex.Array]]:
        key, rollout_key, learn_key = jax.random.split(jax.random.wrap_key_data(state.key), 3)
        if reset:
            other_key = jax.random.fold_in(learn_key, settings.epochs)  # different from those of the epochs
            worn = state.params, state.opt_state
            anew = restart(reset, tx, *worn, head, fresh(other_key))
            params, opt_state = jax.tree.map(lambda new, old: jnp.where(state.changed, new, old), anew, worn)
            state = state._replace(params=params, opt_state=opt_state)
        seen = lambda obs: normalized(obs, state.statistics) if settings.normalize_observations else obs
        env_state, steps, found = rollout(env, network, settings, state.params, state.env_state, seen, rollout_key)

        def loss_fn(params, batch):
            (mean, log_std, value), features = apply(params, batch.obs)
            loss, terms = ppo_loss(settings, mean, log_std, value, batch)
            return loss, (features, terms)

        params, opt_state, terms = run_epochs(settings, tx, loss_fn, state.params, state.opt_state, steps, learn_key)
        found |= terms
        obs = found.pop("obs")
        statistics = (
            counted(state.statistics, obs.reshape(-1, obs.shape[-1]))
            if settings.normalize_observations
            else state.statistics
        )
        periods = [each.info.get("period", 0) for each in (state.env_state, env_state)]
        changed = jnp.any(periods[0] != periods[1])
        return State(params, opt_state, env_state, statistics, jax.random.key_data(key), obs, changed), found

    return init, update


def train(
    env: Environment,
    network: nn.Module,
    optimizer: Callable[[Units], optax.GradientTransformation],
    settings: Settings = DEFAULTS,
    *,
    updates: int,
) -> Callable[[chex.PRNGKey], tuple[State, dict[str, chex.Array]]]:
    """Create a complete run as one pure function of a key.

    Args:
      env: as in `make`, like the next arguments.
      network: maps observations to (mean, log_std, value).
      optimizer: maps the units to an optax transformation.
      settings: the settings.
      updates: number of rollouts, each followed by its updates.

    Returns:
      a function that maps a key to (the last state, metrics [updates] by name); `jax.vmap` of it runs many seeds.

    Raises:
      ValueError: `updates` is less than 1, or as in `make`.

    Example:
      >>> from cbp_jax import nets
      >>> from cbp_jax.envs.episodes import Episodes
      >>> from cbp_jax.envs.walker import make_brax_env
      >>> env = Episodes(make_brax_env("fast", "spring"), episode_length=4)
      >>> adam = lambda units: cbp_jax.adam(3e-4)
      >>> run = train(env, nets.ActorCritic(env.action_size, (8,)), adam, Settings(2, 8, 1, 2), updates=3)
      >>> state, metrics = jax.eval_shape(jax.vmap(run), jax.random.split(jax.random.key(0), 2))
      >>> metrics["episodes"].shape
      (2, 3)
    """
    if updates < 1:
        raise ValueError(f"updates must be at least 1, got {updates}")
    init, update = make(env, network, optimizer, settings)
    return lambda key: jax.lax.scan(lambda state, _: update(state), init(key), length=updates)


def act(
    network: nn.Module,
    params: optax.Params,
    obs: chex.Array,
    key: chex.PRNGKey | None = None,
    statistics: Statistics | None = None,
) -> chex.Array:
    """Return the actions of a policy.

    Args:
      network: maps observations to (mean, log_std, value).
      params: its parameters.
      obs: observations [..., observations].
      key: key for sampling actions; without it they are the policy's means.
      statistics: from the agent's state, if it normalizes observations.

    Returns:
      actions [..., actions].

    Example:
      >>> from cbp_jax import nets
      >>> network = nets.ActorCritic(action_size=8)
      >>> params = network.init(jax.random.key(0), jnp.zeros((1, 27)))
      >>> act(network, params, jnp.zeros(27)).shape, act(network, params, jnp.zeros((4, 27)), jax.random.key(1)).shape
      ((8,), (4, 8))
    """
    mean, log_std, _ = network.apply(params, obs if statistics is None else normalized(obs, statistics))
    return mean if key is None else mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)


def measure(
    network: nn.Module, state: State, *, normalize_observations: bool = False, dormant_threshold: float = 0.01
) -> dict[str, chex.Array]:
    """Measure symptoms of lost plasticity in a policy, on the observations of its last rollout.

    The program of Dohare et al. defines two of them differently: it counts units that are active in at most 1% of
    steps, while `metrics.dormant_fraction` compares mean activations with the layer's; and its weight magnitude is that
    of the second layer's kernel, while here it is that of all of the policy's parameters.

    Args:
      network: as in `make`, with the policy's parameters named "actor..." as in `nets.ActorCritic`.
      state: after an update.
      normalize_observations: as in the settings.
      dormant_threshold: as in `metrics.dormant_fraction`.

    Returns:
      scalars: `dormant_units` and `weight_magnitude` of the policy, and `stable_rank` of its last hidden layer divided
      by that layer's number of units.

    Example:
      >>> from cbp_jax import nets
      >>> from cbp_jax.envs.episodes import Episodes
      >>> from cbp_jax.envs.walker import make_brax_env
      >>> env = Episodes(make_brax_env("fast", "spring"))
      >>> network = nets.ActorCritic(env.action_size, hidden=(8, 8))
      >>> init, _ = make(env, network, lambda units: cbp_jax.adam(3e-4))
      >>> sorted(jax.eval_shape(lambda key: measure(network, init(key)), jax.random.key(0)))
      ['dormant_units', 'stable_rank', 'weight_magnitude']
    """
    obs = state.obs.reshape(-1, state.obs.shape[-1])
    obs = normalized(obs, state.statistics) if normalize_observations else obs
    policy = lambda params, obs: network.apply(params, obs)[0]
    actor = {name: leaves for name, leaves in state.params["params"].items() if name.startswith("actor")}
    return symptoms_of(policy, state.params, obs, weights=actor, dormant_threshold=dormant_threshold)
