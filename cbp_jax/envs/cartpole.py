"""Cart-pole with changing physics: a continual control problem that needs no extra and runs fast."""

import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import struct

from cbp_jax.envs.episodes import Episodes, check_range
from cbp_jax.envs.periods import Periods

_STEP = 0.02  # seconds
_FARTHEST, _STEEPEST = 2.4, 12 * math.pi / 180
_CART_MASS, _POLE_MASS = 1.0, 0.1


class Physics(NamedTuple):
    """The changing quantities of a cart-pole. The defaults are Gymnasium's. All may be traced."""

    gravity: chex.Numeric = 9.8
    half_length: chex.Numeric = 0.5  # of the pole, in meters
    force: chex.Numeric = 10.0  # of a push; if negative, the two actions are swapped


@struct.dataclass
class State:
    """A state with the fields of Brax's, without depending on Brax."""

    pipeline_state: Any  # of the environment; of cart-pole float32 [4]: position, velocity, angle, angular velocity
    obs: jax.Array  # of cart-pole the same
    reward: jax.Array
    done: jax.Array
    metrics: dict[str, jax.Array] = struct.field(default_factory=dict)
    info: dict[str, Any] = struct.field(default_factory=dict)


class CartPole:
    r"""One episode of cart-pole: a cart is pushed to the left (action 0) or right (1) to keep a pole upright.

    With angle :math:`\theta`, force F, the pole's mass :math:`m_p = 0.1`, total mass m = 1.1, and the pole's half
    length l,

    .. math::
        a &= (F + m_p l \dot\theta^2 \sin\theta) / m, \qquad
        \ddot\theta = \frac{g \sin\theta - a \cos\theta}{l (4/3 - m_p \cos^2\theta / m)}, \qquad
        \ddot x = a - m_p l \ddot\theta \cos\theta / m,

    integrated by Euler steps of 0.02 s. The episode ends if the cart is farther than 2.4 m from the center or the pole
    leans by more than 12 degrees. Each step has reward 1. Initial states are uniform in ±0.05.

    Args:
      physics: initial physics of states, in `info["physics"]`.

    Example:
      >>> env = CartPole()
      >>> state = env.step(env.reset(jax.random.key(0)), jnp.int32(1))
      >>> state.obs.shape, state.reward.item(), bool(state.obs[1] > 0.1)
      ((4,), 1.0, True)

    References:
      Barto, Sutton & Anderson, `Neuronlike adaptive elements that can solve difficult learning control problems
      <https://doi.org/10.1109/TSMC.1983.6313077>`_, IEEE Transactions on Systems, Man, and Cybernetics 1983
    """

    observation_size = 4
    action_size = 2

    def __init__(self, physics: Physics = Physics()):  # noqa: B008, a tuple
        self.physics = physics

    def reset(self, key: chex.PRNGKey) -> State:
        """Return the initial state, drawn with a key."""
        at, zero = jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05), jnp.zeros([])
        return State(at, at, zero, zero, info={"physics": jax.tree.map(jnp.float32, self.physics)})

    def step(self, state: State, action: chex.Array) -> State:
        """Return the state after an action, int [], 0 or 1."""
        physics = state.info["physics"]
        _, speed, angle, turning = state.pipeline_state
        force = jnp.where(action == 1, physics.force, -physics.force)
        mass, arm = _CART_MASS + _POLE_MASS, _POLE_MASS * physics.half_length
        sine, cosine = jnp.sin(angle), jnp.cos(angle)
        pushed = (force + arm * turning**2 * sine) / mass
        inertia = physics.half_length * (4 / 3 - _POLE_MASS * cosine**2 / mass)
        turned = (physics.gravity * sine - pushed * cosine) / inertia
        moved = pushed - arm * turned * cosine / mass
        after = state.pipeline_state + _STEP * jnp.stack([speed, moved, turning, turned])
        lost = (jnp.abs(after[0]) > _FARTHEST) | (jnp.abs(after[2]) > _STEEPEST)
        return state.replace(pipeline_state=after, obs=after, reward=jnp.ones([]), done=jnp.where(lost, 1.0, 0.0))


class ChangingCartPole(Periods):
    """Consecutive episodes of cart-pole, whose physics change periodically.

    In period i, counted from 0, gravity, the pole's length and the force of a push are log-uniform in their ranges,
    drawn with `fold_in(key, i)`. With `swap_actions` the actions are swapped in every second period. A period ends with
    the first episode that ends after `change_every` steps of the period. Observations do not reveal the physics. The
    physics are arrays in the state, so changes need no recompilation.

    Args:
      change_every: number of steps after which physics change.
      gravity_range: smallest and largest gravity, in m/s^2.
      length_range: smallest and largest half of the pole's length, in meters.
      force_range: smallest and largest force, in newtons.
      swap_actions: whether left and right are swapped in the periods 1, 3, 5, ...
      key: seed or key for the physics, may be traced.
      **episodes: `episode_length`, 500 by default, and further arguments of :class:`Episodes`. States are those of
        `Episodes`, with additional `info["physics"]`, `info["period"]` and `info["period_steps"]`.

    Raises:
      ValueError: an argument is out of range.

    Example:
      >>> env = ChangingCartPole(change_every=1000, swap_actions=True, force_range=(10.0, 10.0))
      >>> [round(env.physics_of(period).force.item(), 3) for period in range(3)]
      [10.0, -10.0, 10.0]
    """

    changing = "physics"

    def __init__(
        self,
        *,
        change_every: int = 100_000,
        gravity_range: tuple[float, float] = (5.0, 20.0),
        length_range: tuple[float, float] = (0.25, 1.0),
        force_range: tuple[float, float] = (5.0, 20.0),
        swap_actions: bool = False,
        key: chex.PRNGKey | int = 0,
        **episodes: Any,
    ):
        super().__init__(Episodes(CartPole(), **{"episode_length": 500, **episodes}), change_every, key)
        self.ranges = Physics(gravity_range, length_range, force_range)
        for name, value in zip(("gravity_range", "length_range", "force_range"), self.ranges, strict=True):
            check_range(name, value)
        self.swap_actions = swap_actions

    def physics_of(self, period: chex.Numeric) -> Physics:
        """Return the physics of a period, counted from 0; float32 [] each."""
        return self.of_period(period)

    def drawn(self, period: chex.Numeric, key: chex.PRNGKey) -> Physics:
        """See `Periods`."""
        low, high = jnp.log(jnp.asarray(self.ranges, jnp.float32)).T
        gravity, length, force = jnp.exp(jax.random.uniform(key, (3,), minval=low, maxval=high))
        swapped = self.swap_actions & (jnp.asarray(period) % 2 == 1)
        return Physics(gravity, length, jnp.where(swapped, -force, force))
