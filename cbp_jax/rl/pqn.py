"""PQN (Gallici et al., ICLR 2025): Q-learning from parallel environments, with any optax transformation.

There is no replay buffer and no target network: the agent learns from its last rollout, by Q(lambda) returns, and layer
normalization keeps the network's values stable.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import cbp_jax
from cbp_jax.envs.episodes import strong
from cbp_jax.numerics.scalars import check_scalar
from cbp_jax.rl.epochs import run_epochs
from cbp_jax.rl.gae import gae
from cbp_jax.rl.rollout import EPISODE, Environment, episode_info, episode_sums
from cbp_jax.rl.settings import Rollout
from cbp_jax.rl.streaming import Exploration
from cbp_jax.rl.symptoms import symptoms_of
from cbp_jax.units import Units


@dataclasses.dataclass(frozen=True)
class Settings(Rollout):
    """Settings of PQN. The defaults are those of the public program for MinAtar.

    Numbers that are not counts may be traced, so that a grid of them is a `vmap`.

    Attributes:
      num_envs: number of environments in a rollout.
      rollout_length: number of steps of each environment in a rollout.
      epochs: number of epochs over a rollout.
      minibatches: number of minibatches, and so of updates, in an epoch. They divide the steps of the rollout equally.
      discount: discount for each step, in [0, 1].
      trace_decay: lambda of Q(lambda), in [0, 1]: 0 for one-step targets, 1 for returns of the whole rollout.
      max_grad_norm: maximum norm of gradients, by clipping; None for no clipping.

    Raises:
      ValueError: a setting is out of range.

    Example:
      >>> Settings(num_envs=3, rollout_length=5, minibatches=4)
      Traceback (most recent call last):
      ...
      ValueError: minibatches must divide the 3 x 5 = 15 steps of a rollout, got 4
    """

    num_envs: int = 128
    rollout_length: int = 32
    epochs: int = 2
    minibatches: int = 32
    trace_decay: chex.Numeric = 0.65
    max_grad_norm: chex.Numeric | None = 10.0

    def __post_init__(self):
        super().__post_init__()
        check_scalar("trace_decay", self.trace_decay, at_least=0, at_most=1)
        if self.max_grad_norm is not None:
            check_scalar("max_grad_norm", self.max_grad_norm, at_least=0)


DEFAULTS = Settings()
EXPLORATION = Exploration(1.0, 0.05, steps=1_000_000)


class State(NamedTuple):
    """State needed to resume an agent."""

    params: optax.Params
    opt_state: optax.OptState
    env_state: Any  # leaves [num_envs, ...]
    key: chex.Array  # raw key data
    rollouts: chex.Array  # int32 [], so far
    obs: chex.Array  # [rollout_length, num_envs, observations] of the last rollout


def make(
    env: Environment,
    network: nn.Module,
    optimizer: Callable[[Units], optax.GradientTransformation],
    settings: Settings = DEFAULTS,
    exploration: Exploration = EXPLORATION,
) -> tuple[Callable[[chex.PRNGKey], State], Callable[[State], tuple[State, dict[str, chex.Array]]]]:
    r"""Return PQN as two pure functions: one creates an agent's state, the other runs a rollout with all its updates.

    In a rollout, actions are greedy, or random with the probability of exploration. The target of Q(s, a) is the
    lambda-return

    .. math::
      G_t = r_t + \gamma \left((1 - \lambda) \max_{a'} Q(s'_t, a') + \lambda G_{t+1}\right),

    whose bracket is 0 after the end of an episode, and :math:`\max_{a'} Q(s'_t, a')` at a time limit and at the
    rollout's end. (The public program treats a time limit as an end. So does this function if the environment's time
    limit is terminal.) An update minimizes the mean of :math:`\tfrac12 (Q(s, a) - G)^2` over a minibatch.

    Args:
      env: a single environment, whose `action_size` is the number of actions and whose `step` takes the index of an
        action; it is vmapped over `num_envs`.
      network: maps observations [..., observations] to values [..., actions]. The paper's have layer normalization.
      optimizer: maps the units of the network to an optax transformation, which gets `features` of the minibatch as
        an extra argument. The public program has RAdam with a step size of 5e-4 that decays to 0.
      settings: the settings.
      exploration: probability of random actions. Its steps are those of all environments together.

    Returns:
      `init(key) -> state` and `update(state) -> (state, metrics)`, to be jitted, scanned and vmapped over seeds.
      Metrics are scalars: over the rollout `episodes`, the number of episodes that ended, `return_sum` and
      `length_sum`, the sums of their returns and lengths, `reward`, the mean over steps, and `exploration`; over the
      updates `td_error`, the mean squared difference of values and targets, `value`, the mean of values, and
      `replaced_units`, the number of units replaced.

    Raises:
      ValueError: the network does not have one value for each action, or, from `init`, the environment does not start
        episodes by itself.

    Example:
      >>> from cbp_jax import envs, nets
      >>> net = nets.MLP((16,), 2, normalization="layer")
      >>> tx = lambda units: cbp_jax.continual_backprop(cbp_jax.adam(1e-3), units)
      >>> init, update = make(envs.ChangingCartPole(), net, tx, Settings(num_envs=4, rollout_length=8, minibatches=2))
      >>> state, metrics = jax.eval_shape(lambda key: update(init(key)), jax.random.key(0))
      >>> state.obs.shape, metrics["td_error"].shape
      ((8, 4, 4), ())

    References:
      Gallici et al., `Simplifying Deep Temporal Difference Learning <https://arxiv.org/abs/2407.04811>`_, ICLR 2025
    """
    example = jax.ShapeDtypeStruct((1, env.observation_size), jnp.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), example)
    values = jax.eval_shape(network.apply, shapes, example)
    if getattr(values, "shape", None) != (1, env.action_size):
        raise ValueError(f"network must give a value for each of {env.action_size} actions, got {values}")
    units = cbp_jax.discover_units(network.apply, shapes, example, check=True)
    apply = cbp_jax.with_features(network.apply, units)
    tx = optax.with_extra_args_support(optimizer(units))
    if settings.max_grad_norm is not None:
        tx = optax.chain(optax.clip_by_global_norm(settings.max_grad_norm), tx)

    def init(key: chex.PRNGKey) -> State:
        params_key, env_key, key = jax.random.split(key, 3)
        params = network.init(params_key, jnp.zeros(example.shape))
        env_state = jax.vmap(env.reset)(jax.random.split(env_key, settings.num_envs))
        if missing := [name for name in EPISODE if name not in env_state.info]:
            raise ValueError(f"env must have {missing} in its states' info, as cbp_jax.envs.Episodes(env) has")
        obs = jnp.zeros((settings.rollout_length, settings.num_envs, env.observation_size))
        return State(params, tx.init(params), strong(env_state), jax.random.key_data(key), jnp.int32(0), obs)

    def rollout(params: optax.Params, env_state: Any, fraction: chex.Numeric, key: chex.PRNGKey) -> Any:
        """Run all environments. Return their state, observations, actions and targets, and metrics."""

        def step(env_state, key):
            random_key, action_key = jax.random.split(key)
            obs = env_state.obs
            values = network.apply(params, obs)
            drawn = jax.random.randint(action_key, values.shape[:1], 0, env.action_size)
            random = jax.random.bernoulli(random_key, fraction, values.shape[:1])
            actions = jnp.where(random, drawn, jnp.argmax(values, -1))
            env_state = strong(jax.vmap(env.step)(env_state, actions))
            found = env_state.reward, env_state.done, episode_info(env_state)
            return env_state, (obs, actions, jnp.max(values, -1), found)

        keys = jax.random.split(key, settings.rollout_length)
        env_state, (obs, actions, best, (rewards, dones, info)) = jax.lax.scan(step, env_state, keys)
        # The lambda-return is the advantage over the best actions' values plus these values.
        gained = gae(
            rewards,
            best,
            jnp.max(network.apply(params, info["final_obs"]), -1),
            dones * (1 - info["truncation"]),
            info["truncation"],
            discount=settings.discount,
            gae_lambda=settings.trace_decay,
        )
        found = episode_sums(dones, info) | {"reward": jnp.mean(rewards)}
        return env_state, (obs, actions, best + gained), found

    def loss_fn(params: optax.Params, batch: tuple[chex.Array, ...]) -> tuple[chex.Array, tuple[Any, Any]]:
        obs, actions, targets = batch
        values, features = apply(params, obs)
        chosen = jnp.take_along_axis(values, actions[:, None], -1)[:, 0]
        error = jnp.mean(jnp.square(chosen - targets))
        return 0.5 * error, (features, {"td_error": error, "value": jnp.mean(chosen)})

    def update(state: State) -> tuple[State, dict[str, chex.Array]]:
        key, rollout_key, learn_key = jax.random.split(jax.random.wrap_key_data(state.key), 3)
        fraction = exploration.at(state.rollouts * settings.steps)
        env_state, steps, found = rollout(state.params, state.env_state, fraction, rollout_key)
        params, opt_state, terms = run_epochs(settings, tx, loss_fn, state.params, state.opt_state, steps, learn_key)
        found |= terms | {"exploration": fraction}
        return State(params, opt_state, env_state, jax.random.key_data(key), state.rollouts + 1, steps[0]), found

    return init, update


def measure(network: nn.Module, state: State, *, dormant_threshold: float = 0.01) -> dict[str, chex.Array]:
    """Return symptoms of lost plasticity in an agent's network, on the observations of its last rollout.

    Args:
      network: as in `make`.
      state: a state after an update.
      dormant_threshold: as in `metrics.dormant_fraction`.

    Returns:
      scalars: `dormant_units`, `weight_magnitude`, and `stable_rank` of the last hidden layer divided by that layer's
      number of units.

    Example:
      >>> from cbp_jax import envs, nets
      >>> net = nets.MLP((8, 8), 2, normalization="layer")
      >>> init, _ = make(envs.ChangingCartPole(), net, lambda units: cbp_jax.adam(1e-3))
      >>> sorted(jax.eval_shape(lambda key: measure(net, init(key)), jax.random.key(0)))
      ['dormant_units', 'stable_rank', 'weight_magnitude']
    """
    obs = state.obs.reshape(-1, state.obs.shape[-1])
    return symptoms_of(network.apply, state.params, obs, dormant_threshold=dormant_threshold)
