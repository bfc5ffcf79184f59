"""Proximal policy optimisation, on the device from environment to update, with any optax transformation."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import cbp_jax
from cbp_jax.envs.episodes import strong
from cbp_jax.numerics.scalars import check_scalar
from cbp_jax.replacement import replaced_units
from cbp_jax.rl.gae import gae
from cbp_jax.training import output_layers, restart, symptoms, train_step
from cbp_jax.units import Units, leaves_by_path


class Environment(Protocol):
    """One environment that starts episode after episode by itself, such as `cbp_jax.envs.Episodes` makes of any.

    States have `obs`, `reward`, `done` and `metrics` as Brax's, and in `info` at least `truncation`, `final_obs`,
    `episode_return` and `episode_length`.
    """

    observation_size: int
    action_size: int

    def reset(self, key: chex.PRNGKey) -> Any:
        """The first state."""

    def step(self, state: Any, action: chex.Array) -> Any:
        """The state after an action [actions], the first of the next episode where this one ended."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of PPO; the defaults are those of Dohare et al. (Nature 2024), with 32 environments for its one.

    Numbers that are not counts may be traced, so that a grid of them is a `vmap`.

    Attributes:
      num_envs: environments of a rollout.
      rollout_length: steps of each environment in a rollout.
      epochs: how often a rollout is learned from.
      minibatches: updates of an epoch; they share all steps of the rollout equally.
      discount: of a step, in [0, 1].
      gae_lambda: of generalised advantage estimation, in [0, 1].
      clip: how far ratios of probabilities go from 1 before their gradient is cut.
      value_coefficient: of the value's squared error in the loss.
      entropy_coefficient: of the policy's entropy in the loss.
      normalize_advantages: whether the advantages of a rollout are brought to mean 0 and standard deviation 1.
      normalize_observations: whether observations are, by their mean and variance in all rollouts before, and clipped
        to [-10, 10].

    Raises:
      ValueError: a setting is out of range.

    Example:
      >>> Settings(minibatches=7)
      Traceback (most recent call last):
      ...
      ValueError: minibatches must divide the 32 x 64 = 2048 steps of a rollout, got 7
    """

    num_envs: int = 32
    rollout_length: int = 64
    epochs: int = 10
    minibatches: int = 16
    discount: chex.Numeric = 0.99
    gae_lambda: chex.Numeric = 0.95
    clip: chex.Numeric = 0.2
    value_coefficient: chex.Numeric = 1.0
    entropy_coefficient: chex.Numeric = 0.0
    normalize_advantages: bool = True
    normalize_observations: bool = False

    def __post_init__(self):
        for name in ("num_envs", "rollout_length", "epochs", "minibatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.steps % self.minibatches:
            raise ValueError(
                f"minibatches must divide the {self.num_envs} x {self.rollout_length} = {self.steps} steps of a "
                f"rollout, got {self.minibatches}"
            )
        check_scalar("discount", self.discount, at_least=0, at_most=1)
        check_scalar("gae_lambda", self.gae_lambda, at_least=0, at_most=1)
        for name in ("clip", "value_coefficient", "entropy_coefficient"):
            check_scalar(name, getattr(self, name), at_least=0)

    @property
    def steps(self) -> int:
        """Steps of the environments in a rollout."""
        return self.num_envs * self.rollout_length


class Statistics(NamedTuple):
    """Running statistics of observations."""

    count: chex.Array  # float32 []
    mean: chex.Array  # float32 [observations]
    squares: chex.Array  # float32 [observations], sum of squared distances from the mean


class State(NamedTuple):
    """All that an agent needs to go on."""

    params: optax.Params
    opt_state: optax.OptState
    env_state: Any  # leaves [num_envs, ...]
    statistics: Statistics
    key: chex.Array  # raw key data
    obs: chex.Array  # [rollout_length, num_envs, observations], what the last rollout saw
    changed: chex.Array  # bool [], whether a period of the environments ended in it


_LARGEST_LOG_RATIO = 20.0

# What an environment tells of its episodes, in the info of its states.
_EPISODE = ("truncation", "final_obs", "episode_return", "episode_length")


class _Steps(NamedTuple):
    """Steps of a rollout, [rollout_length, num_envs, ...], or of a minibatch, [steps, ...]."""

    obs: chex.Array
    actions: chex.Array
    log_probs: chex.Array
    advantages: chex.Array
    targets: chex.Array


def make(
    env: Environment,
    network: nn.Module,
    optimizer: Callable[[Units], optax.GradientTransformation],
    settings: Settings = Settings(),
    *,
    reset: str = "",
) -> tuple[Callable[[chex.PRNGKey], State], Callable[[State], tuple[State, dict[str, chex.Array]]]]:
    r"""An agent as two pure functions: its state of a key, and one rollout with all updates from it.

    The policy is a Gaussian. With :math:`\rho` the ratio of an action's probability to that in the rollout and A its
    advantage, an update descends the mean over a minibatch of

    .. math::
      -\min\left(\rho A, \text{clip}(\rho, 1 - \epsilon, 1 + \epsilon) A\right)
      + c_V (V(s) - \hat{V})^2 - c_H H.

    Args:
      env: one environment; it is vmapped over `num_envs`.
      network: maps observations [..., observations] to (mean [..., actions], log_std [actions] or [..., actions],
        value [...]), as `nets.ActorCritic` does.
      optimizer: makes, of the units of policy and value, an optax transformation. It is given `features` of the
        minibatch as an extra argument, so that continual backpropagation and recycling work. A limit of the
        gradient's norm is `optax.clip_by_global_norm` in a chain with it.
      settings: the settings.
      reset: what is drawn anew when the environments' `info["period"]` has changed, "network" or "head" (the layers
        that make the policy's means and the value, and log-stds that are parameters), with what the optimizer keeps of
        it: before the first rollout after the one in which the period ended. Statistics of observations stay.

    Returns:
      `init(key) -> state` and `update(state) -> (state, metrics)`, to be jitted, scanned and vmapped over seeds.
      Metrics are scalars: over the rollout `episodes`, the number of episodes that ended, the sums
      `return_sum` and `length_sum` of their returns and lengths, and the mean of each of the environment's metrics,
      and of its `friction` where it has one; over the updates the means `policy_loss`, `value_loss`, `entropy`,
      `approx_kl` and `clip_fraction`; `explained_variance`, the fraction of the variance of targets that values
      explain before the updates; and `replaced_units`, how many the updates replaced.

    Raises:
      ValueError: the network's means, log-stds or values are not of these shapes for the environment, `reset` is
        something else, or, from `init`, the environment does not start episodes by itself, or has no periods to reset
        after.

    Example:
      >>> from cbp_jax import nets
      >>> from cbp_jax.envs.episodes import Episodes
      >>> from cbp_jax.envs.slippery import make_brax_env
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
    if reset not in ("", "head", "network"):
        raise ValueError(f"reset must be 'head', 'network' or '', got {reset!r}")
    log_stds = [path for path in leaves_by_path(shapes) if path.endswith("log_std")]
    head = (*output_layers(units), *log_stds) if reset == "head" else ()
    needed = (*_EPISODE, *(("period",) if reset else ()))

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
            statistics=Statistics(jnp.zeros([]), jnp.zeros(size), jnp.zeros(size)),
            key=jax.random.key_data(key),
            obs=jnp.zeros((settings.rollout_length, settings.num_envs, size)),
            changed=jnp.zeros([], bool),
        )

    def update(state: State) -> tuple[State, dict[str, chex.Array]]:
        key, rollout_key, learn_key = jax.random.split(jax.random.wrap_key_data(state.key), 3)
        if reset:
            other_key = jax.random.fold_in(learn_key, settings.epochs)  # than those of the epochs
            worn = state.params, state.opt_state
            anew = restart(reset, tx, *worn, head, fresh(other_key))
            params, opt_state = jax.tree.map(lambda new, old: jnp.where(state.changed, new, old), anew, worn)
            state = state._replace(params=params, opt_state=opt_state)
        seen = lambda obs: _normalized(obs, state.statistics) if settings.normalize_observations else obs
        env_state, steps, found = _rollout(env, network, settings, state.params, state.env_state, seen, rollout_key)

        def learn(carry, batch):
            def loss_fn(params):
                (mean, log_std, value), features = apply(params, batch.obs)
                loss, terms = _loss(settings, mean, log_std, value, batch)
                return loss, (features, terms)

            step = train_step(tx, loss_fn, *carry)
            return (step.params, step.opt_state), (step.found, replaced_units(step.opt_state))

        flat = jax.tree.map(lambda x: x.reshape(settings.steps, *x.shape[2:]), steps)

        def epoch(carry, key):
            order = jax.random.permutation(key, settings.steps)
            batches = jax.tree.map(lambda x: x[order].reshape(settings.minibatches, -1, *x.shape[1:]), flat)
            return jax.lax.scan(learn, carry, batches)

        start = (state.params, state.opt_state)
        (params, opt_state), (terms, replaced) = jax.lax.scan(
            epoch, start, jax.random.split(learn_key, settings.epochs)
        )
        found |= jax.tree.map(jnp.mean, terms) | {"replaced_units": jnp.sum(replaced)}
        obs = found.pop("obs")
        statistics = _counted(obs, state.statistics) if settings.normalize_observations else state.statistics
        periods = [each.info.get("period", 0) for each in (state.env_state, env_state)]
        changed = jnp.any(periods[0] != periods[1])
        return State(params, opt_state, env_state, statistics, jax.random.key_data(key), obs, changed), found

    return init, update


def train(
    env: Environment,
    network: nn.Module,
    optimizer: Callable[[Units], optax.GradientTransformation],
    settings: Settings = Settings(),
    *,
    updates: int,
) -> Callable[[chex.PRNGKey], tuple[State, dict[str, chex.Array]]]:
    """A whole run as one pure function of a key.

    Args:
      env: as in `make`, like what follows.
      network: maps observations to (mean, log_std, value).
      optimizer: makes an optax transformation of the units.
      settings: the settings.
      updates: number of rollouts, each with its updates.

    Returns:
      a function of a key to (the last state, metrics [updates] by name); `jax.vmap` of it runs many seeds.

    Raises:
      ValueError: `updates` is less than 1, or as in `make`.

    Example:
      >>> from cbp_jax import nets
      >>> from cbp_jax.envs.episodes import Episodes
      >>> from cbp_jax.envs.slippery import make_brax_env
      >>> env = Episodes(make_brax_env("fast", "spring"), episode_length=4)
      >>> adam = lambda units: cbp_jax.adam(3e-4)
      >>> run = train(env, nets.ActorCritic(env.action_size, (8,)), adam, Settings(2, 8, 1, 2), updates=3)
      >>> state, metrics = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 2))
      >>> metrics["episodes"].tolist()
      [[4.0, 4.0, 4.0], [4.0, 4.0, 4.0]]
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
    """The actions of a policy.

    Args:
      network: maps observations to (mean, log_std, value).
      params: its parameters.
      obs: observations [..., observations].
      key: to draw actions with; without it they are the policy's means.
      statistics: of the agent's state, where it normalises observations.

    Returns:
      actions [..., actions].

    Example:
      >>> from cbp_jax import nets
      >>> network = nets.ActorCritic(action_size=8)
      >>> params = network.init(jax.random.key(0), jnp.zeros((1, 27)))
      >>> act(network, params, jnp.zeros(27)).shape, act(network, params, jnp.zeros((4, 27)), jax.random.key(1)).shape
      ((8,), (4, 8))
    """
    mean, log_std, _ = network.apply(params, obs if statistics is None else _normalized(obs, statistics))
    return mean if key is None else mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)


def measure(
    network: nn.Module, state: State, *, normalize_observations: bool = False, dormant_threshold: float = 0.01
) -> dict[str, chex.Array]:
    """The symptoms of lost plasticity in a policy, on the observations of its last rollout.

    Two are defined otherwise by the program of Dohare et al.: it counts units that are active in at most 1% of steps,
    where `metrics.dormant_fraction` compares mean activations with the layer's; and its weight magnitude is of the
    second layer's kernel, here it is of all of the policy's parameters.

    Args:
      network: as in `make`, with the policy's parameters named "actor..." as in `nets.ActorCritic`.
      state: after an update.
      normalize_observations: as in the settings.
      dormant_threshold: as in `metrics.dormant_fraction`.

    Returns:
      scalars: `dormant_units` and `weight_magnitude` of the policy, and `stable_rank` of its last hidden layer over
      that layer's number of units.

    Example:
      >>> from cbp_jax import nets
      >>> from cbp_jax.envs.episodes import Episodes
      >>> from cbp_jax.envs.slippery import make_brax_env
      >>> env = Episodes(make_brax_env("fast", "spring"))
      >>> network = nets.ActorCritic(env.action_size, hidden=(8, 8))
      >>> init, _ = make(env, network, lambda units: cbp_jax.adam(3e-4))
      >>> sorted(jax.eval_shape(lambda key: measure(network, init(key)), jax.random.key(0)))
      ['dormant_units', 'stable_rank', 'weight_magnitude']
    """
    obs = state.obs.reshape(-1, state.obs.shape[-1])
    obs = _normalized(obs, state.statistics) if normalize_observations else obs
    policy = lambda params, obs: network.apply(params, obs)[0]
    _, features = cbp_jax.with_features(policy, cbp_jax.discover_units(policy, state.params, obs[:1]))(
        state.params, obs
    )
    actor = {name: leaves for name, leaves in state.params["params"].items() if name.startswith("actor")}
    last = list(features.values())[-1:]
    found = symptoms(features, actor, ranked=last, dormant_threshold=dormant_threshold)
    return {name: found[name] for name in ("dormant_units", "stable_rank", "weight_magnitude")}


def _rollout(
    env: Environment,
    network: nn.Module,
    settings: Settings,
    params: optax.Params,
    env_state: Any,
    seen: Callable[[chex.Array], chex.Array],
    key: chex.PRNGKey,
) -> tuple[Any, _Steps, dict[str, chex.Array]]:
    """Goes through all environments; also what was found on the way, and the observations as they came."""

    def step(env_state, key):
        obs = env_state.obs
        mean, log_std, _ = network.apply(params, seen(obs))
        actions = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
        ground = {name: env_state.info[name] for name in ("friction",) if name in env_state.info}  # of this step
        env_state = strong(jax.vmap(env.step)(env_state, actions))
        info = env_state.info
        kept = {name: info[name] for name in _EPISODE} | {
            "interrupted": info.get("interrupted", jnp.zeros_like(env_state.done))
        }
        further = env_state.metrics | ground
        ended = (env_state.reward, env_state.done)
        return env_state, (obs, actions, _log_prob(mean, log_std, actions), ended, kept, further)

    keys = jax.random.split(key, settings.rollout_length)
    env_state, (obs, actions, log_probs, (rewards, dones), info, further) = jax.lax.scan(step, env_state, keys)
    values = network.apply(params, seen(obs))[2]
    gained = gae(
        rewards,
        values,
        network.apply(params, seen(info["final_obs"]))[2],
        dones * (1 - info["truncation"]),
        info["truncation"],
        discount=settings.discount,
        gae_lambda=settings.gae_lambda,
    )
    targets = gained + values
    whole = dones * (1 - info["interrupted"])
    found = {name: jnp.mean(values) for name, values in further.items()} | {
        "obs": obs,
        "episodes": jnp.sum(whole),
        "return_sum": jnp.sum(whole * info["episode_return"]),
        "length_sum": jnp.sum(whole * info["episode_length"]),
        "explained_variance": 1 - jnp.var(gained) / jnp.maximum(jnp.var(targets), 1e-12),
    }
    if settings.normalize_advantages:
        gained = (gained - jnp.mean(gained)) / (jnp.std(gained) + 1e-8)
    return env_state, _Steps(seen(obs), actions, log_probs, gained, targets), found


def _loss(
    settings: Settings, mean: chex.Array, log_std: chex.Array, value: chex.Array, batch: _Steps
) -> tuple[chex.Array, dict[str, chex.Array]]:
    log_ratio = _log_prob(mean, log_std, batch.actions) - batch.log_probs
    # A policy that has become nearly deterministic can go past the largest float, and one such step would end the run.
    ratio = jnp.exp(jnp.minimum(log_ratio, _LARGEST_LOG_RATIO))
    clipped = jnp.clip(ratio, 1 - settings.clip, 1 + settings.clip)
    policy_loss = -jnp.mean(jnp.minimum(ratio * batch.advantages, clipped * batch.advantages))
    value_loss = jnp.mean(jnp.square(value - batch.targets))
    entropy = jnp.mean(jnp.sum(log_std + 0.5 * jnp.log(2 * jnp.pi * jnp.e), -1))
    loss = policy_loss + settings.value_coefficient * value_loss - settings.entropy_coefficient * entropy
    return loss, {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        # An estimate of the divergence with little variance, as J. Schulman proposes ("Approximating KL divergence").
        "approx_kl": jnp.mean(ratio - 1 - log_ratio),
        "clip_fraction": jnp.mean(jnp.abs(ratio - 1) > settings.clip, dtype=jnp.float32),
    }


def _log_prob(mean: chex.Array, log_std: chex.Array, actions: chex.Array) -> chex.Array:
    """Logarithm of a Gaussian's density at actions [..., actions]."""
    scaled = (actions - mean) / jnp.exp(log_std)
    return jnp.sum(-0.5 * jnp.square(scaled) - log_std - 0.5 * jnp.log(2 * jnp.pi), -1)


def _normalized(obs: chex.Array, statistics: Statistics) -> chex.Array:
    variance = statistics.squares / jnp.maximum(statistics.count, 1)
    std = jnp.where(statistics.count > 0, jnp.sqrt(variance), 1)
    return jnp.clip((obs - statistics.mean) / jnp.maximum(std, 1e-6), -10, 10)


def _counted(obs: chex.Array, statistics: Statistics) -> Statistics:
    """Statistics of all observations so far and these, by Chan's parallel form."""
    obs = obs.reshape(-1, obs.shape[-1])
    count = statistics.count + len(obs)
    mean, apart = jnp.mean(obs, 0), jnp.mean(obs, 0) - statistics.mean
    squares = jnp.sum(jnp.square(obs - mean), 0) + jnp.square(apart) * statistics.count * len(obs) / count
    return Statistics(count, statistics.mean + apart * len(obs) / count, statistics.squares + squares)
