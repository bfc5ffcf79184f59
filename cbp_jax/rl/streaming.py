"""Streaming reinforcement learning (Elsayed et al., 2024): one environment, with one update at every step.

There is no replay and no batch: the agent learns from each step immediately, with eligibility traces, and then discards
it. The environment should normalize observations and rewards online: `envs.Normalized(env, unbiased=True, bound=inf)`.
The networks of the paper have sparse initial weights (`nets.sparse`) and normalization without parameters
(`normalization="bare_layer"`) before leaky ReLUs. (In its programs, continuous agents also observe how much of the
episode has passed; here that is left to the environment.)
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
from cbp_jax.replacement import replaced_units
from cbp_jax.rl.rollout import EPISODE, Environment, log_prob
from cbp_jax.units import Units

Optimizer = Callable[[Units], optax.GradientTransformation]


class State(NamedTuple):
    """State needed to resume an agent."""

    params: optax.Params
    opt_state: optax.OptState
    env_state: Any  # of one environment
    key: chex.Array  # raw key data
    steps: chex.Array  # int32 [], so far


Init = Callable[[chex.PRNGKey], State]
Step = Callable[[State], tuple[State, dict[str, chex.Array]]]


@dataclasses.dataclass(frozen=True)
class Exploration:
    """How often Stream Q(lambda) takes a random action: a fraction that decreases linearly, and then stays constant.

    Attributes:
      start: the initial fraction, in [0, 1].
      end: the final fraction, in [0, 1].
      steps: number of steps in which it decreases.

    Raises:
      ValueError: an attribute is out of range.

    Example:
      >>> Exploration(1.0, 0.5, steps=10).at(5).item()
      0.75
    """

    start: chex.Numeric = 1.0
    end: chex.Numeric = 0.01
    steps: int = 50_000

    def __post_init__(self):
        check_scalar("start", self.start, at_least=0, at_most=1)
        check_scalar("end", self.end, at_least=0, at_most=1)
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    def at(self, step: chex.Numeric) -> chex.Array:
        """Return the fraction after a number of steps: float32 []."""
        return self.start + (self.end - self.start) * jnp.minimum(step / self.steps, 1.0)


class _Rule(NamedTuple):
    """The differences between agents. "Outputs" are those of the network for one observation."""

    one: Callable[[Any], Any]  # outputs of the only observation of a batch
    # The action, and whether it resets traces.
    act: Callable[[Any, chex.PRNGKey, chex.Array], tuple[chex.Array, chex.Array]]
    value: Callable[[Any, chex.Array], chex.Array]  # value of an action: []
    best: Callable[[Any], chex.Array]  # value of the next state: []
    # (outputs, action, TD error) -> the function whose gradient enters the traces: []
    followed: Callable[[Any, chex.Array, chex.Array], chex.Array]


def make_q(
    env: Environment,
    network: nn.Module,
    optimizer: Optimizer,
    exploration: Exploration = Exploration(),
    *,
    discount: chex.Numeric = 0.99,
) -> tuple[Init, Step]:
    r"""Create Stream Q(lambda) as two pure functions: one creates its state, the other runs a step with its update.

    Actions are greedy, or random with the probability of exploration. The TD error

    .. math:: \delta = r + \gamma (1 - \text{ended}) \max_{a'} Q(s', a') - Q(s, a)

    and the gradient of Q(s, a) are passed to the optimizer. As in the public program, traces are reset at the end of an
    episode, and after a step whose action was not greedy. (Watkins' Q(lambda) resets them before such a step.) At a
    time limit, the value of the last state replaces the remaining return. In the public program it counts as 0, as here
    if the environment's time limit is terminal.

    Args:
      env: an environment whose `action_size` is the number of actions and whose `step` takes the index of an action,
        such as `envs.ChangingCartPole`.
      network: maps observations [..., observations] to values [..., actions].
      optimizer: maps the units of the network to an optax transformation. Its update gets the gradient of Q(s, a), not
        of a loss, and the extra arguments `td_error`, `reset_traces` and `features`. Use `obgd`, or
        `eligibility_traces` before any other optimizer, or continual backpropagation around either.
      exploration: probability of random actions.
      discount: gamma, for each step, in [0, 1]. The optimizer's traces should use the same.

    Returns:
      `init(key) -> state` and `step(state) -> (state, metrics)`, to be jitted, scanned and vmapped over seeds. Metrics
      are those of the step: `obs`, the observation before it; `td_error`; `episodes`, `return_sum` and `length_sum`,
      which are 1 and the return and length of an episode that ended with the step, otherwise 0; and `replaced_units`.

    Raises:
      ValueError: the network does not have one value for each action, a setting is out of range, or, from `init`, the
        environment does not start episodes by itself.

    Example:
      >>> from cbp_jax import envs, nets
      >>> env = envs.Normalized(envs.ChangingCartPole(), unbiased=True, bound=jnp.inf)
      >>> net = nets.MLP((32,), 2, "leaky_relu", kernel_init=nets.sparse(), normalization="bare_layer")
      >>> init, step = make_q(env, net, lambda units: cbp_jax.obgd())
      >>> state, metrics = jax.lax.scan(lambda state, _: step(state), init(jax.random.key(0)), length=100)
      >>> metrics["episodes"].shape, bool(metrics["episodes"].sum() > 1)
      ((100,), True)

    References:
      Elsayed, Vasan & Mahmood, `Streaming deep reinforcement learning finally works
      <https://arxiv.org/abs/2410.14606>`_, 2024
    """
    actions = env.action_size

    def act(values: chex.Array, key: chex.PRNGKey, steps: chex.Array) -> tuple[chex.Array, chex.Array]:
        random_key, action_key = jax.random.split(key)
        best = jnp.argmax(values)
        drawn = jax.random.randint(action_key, (), 0, actions)
        action = jnp.where(jax.random.bernoulli(random_key, exploration.at(steps)), drawn, best)
        return action, action != best

    rule = _Rule(
        one=lambda values: values[0],
        act=act,
        value=lambda values, action: values[action],
        best=jnp.max,
        followed=lambda values, action, td_error: values[action],
    )

    def check(values: Any) -> None:
        if getattr(values, "shape", None) != (1, actions):
            raise ValueError(f"network must give a value for each of {actions} actions, got {values}")

    return _make(env, network, optimizer, discount, rule, check)


def make_actor_critic(
    env: Environment,
    network: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    discount: chex.Numeric = 0.99,
    entropy_coefficient: chex.Numeric = 0.01,
) -> tuple[Init, Step]:
    r"""Create Stream AC(lambda) as two pure functions: one creates its state, the other runs a step with its update.

    With a separate Gaussian policy and value function, and :math:`\delta = r + \gamma (1 - \text{ended}) V(s') - V(s)`,
    the gradients passed to the optimizer are those of the value V(s) and of

    .. math:: \log \pi(a | s) + c_H \, \text{sign}(\delta) H(\pi(\cdot | s)),

    so that the entropy increases for either sign of the TD error.

    Args:
      env: one environment with continuous actions, such as `envs.Walker`.
      network: maps observations [..., observations] to (mean [..., actions], log_std [actions] or [..., actions],
        value [...]), as `nets.ActorCritic` does.
      optimizer: as in `make_q`; by default `obgd_of_actor_and_critic`.
      discount: gamma, for each step, in [0, 1]. The optimizer's traces should use the same.
      entropy_coefficient: c_H, >= 0.

    Returns:
      `init` and `step`, as in `make_q`.

    Raises:
      ValueError: as in `make_q`.

    Example:
      >>> from cbp_jax import envs, nets
      >>> env = envs.Episodes(envs.walker.make_brax_env("fast", "spring"))
      >>> net = nets.ActorCritic(1, (32,), "leaky_relu", nets.sparse(), normalization="bare_layer", state_std=True)
      >>> init, step = make_actor_critic(env, net)
      >>> state, metrics = jax.eval_shape(lambda key: step(init(key)), jax.random.key(0))
      >>> metrics["td_error"].shape
      ()

    References:
      Elsayed, Vasan & Mahmood, `Streaming deep reinforcement learning finally works
      <https://arxiv.org/abs/2410.14606>`_, 2024
    """
    check_scalar("entropy_coefficient", entropy_coefficient, at_least=0)
    actions = env.action_size

    def act(outputs: Any, key: chex.PRNGKey, steps: chex.Array) -> tuple[chex.Array, chex.Array]:
        mean, log_std, _ = outputs
        return mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape), jnp.zeros([], bool)

    def followed(outputs: Any, action: chex.Array, td_error: chex.Array) -> chex.Array:
        mean, log_std, value = outputs
        entropy = jnp.sum(log_std)  # up to a constant
        return value + log_prob(mean, log_std, action) + entropy_coefficient * jnp.sign(td_error) * entropy

    def one(outputs: Any) -> Any:
        mean, log_std, value = outputs
        return mean[0], jnp.broadcast_to(log_std, mean.shape)[0], value[0]

    rule = _Rule(one, act, lambda outputs, action: outputs[2], lambda outputs: outputs[2], followed)

    def check(outputs: Any) -> None:
        found = [getattr(each, "shape", None) for each in outputs] if isinstance(outputs, tuple) else outputs
        if found not in ([(1, actions), (actions,), (1,)], [(1, actions), (1, actions), (1,)]):
            raise ValueError(
                f"network must give means and log_stds of {actions} actions and a value, of shapes (1, {actions}), "
                f"({actions},) or (1, {actions}), and (1,) for one observation, got {found}"
            )

    return _make(env, network, optimizer or obgd_of_actor_and_critic(discount=discount), discount, rule, check)


def obgd_of_actor_and_critic(
    learning_rate: chex.Numeric = 1.0,
    *,
    discount: chex.Numeric = 0.99,
    trace_decay: chex.Numeric = 0.8,
    kappa_policy: chex.Numeric = 3.0,
    kappa_value: chex.Numeric = 2.0,
) -> Optimizer:
    """Create separate `obgd` optimizers for the policy and the value of `nets.ActorCritic`, as in Stream AC(lambda).

    Args:
      learning_rate: of both.
      discount: of both.
      trace_decay: of both.
      kappa_policy: kappa for parameters whose layer is named "actor...".
      kappa_value: kappa for all others.

    Returns:
      a function that maps units, which it ignores, to an optax transformation.

    Example:
      >>> params = {"params": {"actor_0": jnp.ones(2), "critic_0": jnp.ones(2)}}
      >>> tx = obgd_of_actor_and_critic()(())
      >>> updates, _ = tx.update(params, tx.init(params), params, td_error=1.0)
      >>> [round(u[0].item(), 4) for u in updates["params"].values()]  # 1 / (kappa * 2)
      [0.1667, 0.25]
    """
    same = {"discount": discount, "trace_decay": trace_decay}
    each = {
        "policy": cbp_jax.obgd(learning_rate, kappa=kappa_policy, **same),
        "value": cbp_jax.obgd(learning_rate, kappa=kappa_value, **same),
    }

    def labels(params: optax.Params) -> Any:
        of = lambda path, _: "policy" if any(str(key.key).startswith("actor") for key in path) else "value"
        return jax.tree_util.tree_map_with_path(of, params)

    return lambda units: optax.partition(each, labels)


def _make(
    env: Environment,
    network: nn.Module,
    optimizer: Optimizer,
    discount: chex.Numeric,
    rule: _Rule,
    check: Callable[[Any], None],
) -> tuple[Init, Step]:
    check_scalar("discount", discount, at_least=0, at_most=1)
    example = jax.ShapeDtypeStruct((1, env.observation_size), jnp.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), example)
    check(jax.eval_shape(network.apply, shapes, example))
    units = cbp_jax.discover_units(network.apply, shapes, example, check=True)
    apply = cbp_jax.with_features(network.apply, units)
    tx = optax.with_extra_args_support(optimizer(units))

    def init(key: chex.PRNGKey) -> State:
        params_key, env_key, key = jax.random.split(key, 3)
        params = network.init(params_key, jnp.zeros(example.shape))
        env_state = env.reset(env_key)
        if missing := [name for name in EPISODE if name not in env_state.info]:
            raise ValueError(f"env must have {missing} in its states' info, as cbp_jax.envs.Episodes(env) has")
        return State(params, tx.init(params), strong(env_state), jax.random.key_data(key), jnp.int32(0))

    def of_one(params: optax.Params, obs: chex.Array) -> tuple[Any, Any]:
        outputs, features = apply(params, obs[None])
        return rule.one(outputs), features

    def step(state: State) -> tuple[State, dict[str, chex.Array]]:
        key, act_key = jax.random.split(jax.random.wrap_key_data(state.key))
        obs = state.env_state.obs
        outputs, pull_back, features = jax.vjp(lambda params: of_one(params, obs), state.params, has_aux=True)
        action, cut = rule.act(outputs, act_key, state.steps)
        env_state = strong(env.step(state.env_state, action))
        info, done = env_state.info, env_state.done
        led_to = rule.best(of_one(state.params, info["final_obs"])[0])
        ended = done * (1 - info["truncation"])
        td_error = env_state.reward + discount * (1 - ended) * led_to - rule.value(outputs, action)
        (grads,) = pull_back(jax.grad(rule.followed)(outputs, action, td_error))
        updates, opt_state = tx.update(
            grads, state.opt_state, state.params, features=features, td_error=td_error, reset_traces=cut | (done > 0)
        )
        params = optax.apply_updates(state.params, updates)
        whole = done * (1 - info.get("interrupted", jnp.zeros([])))
        metrics = {
            "obs": obs,
            "td_error": td_error,
            "episodes": whole,
            "return_sum": whole * info["episode_return"],
            "length_sum": whole * info["episode_length"],
            "replaced_units": replaced_units(opt_state),
        }
        return State(params, opt_state, env_state, jax.random.key_data(key), state.steps + 1), metrics

    return init, step
