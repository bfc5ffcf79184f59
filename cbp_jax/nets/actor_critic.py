"""Policy and value networks of an agent with continuous actions."""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from cbp_jax.nets.activations import Activation, get_activation
from cbp_jax.nets.mlp import NORMALIZATIONS

_LEAST_STD = 1e-6  # softplus underflows to 0, whose logarithm is not finite


class ActorCritic(nn.Module):
    """A Gaussian policy and a value function, two separate multilayer perceptrons.

    Layers are named `actor_0`, `actor_1`, ... and `actor_mean`, `critic_0`, `critic_1`, ... and `critic_value`. By
    default, standard deviations do not depend on the observation; their logarithms are the parameter `actor_log_std`.
    With `state_std` they are the softplus of a layer `actor_std` next to `actor_mean`.

    Attributes:
      action_size: number of actions, which are continuous.
      hidden: number of units of each hidden layer, of the policy and of the value.
      activation: a name of `get_activation`, or a function of one array.
      kernel_init: a `jax.nn.initializers` function, LeCun's by default; biases start at 0.
      initial_log_std: initial logarithm of the standard deviation of each action.
      policy_scale: factor of the initial weights of `actor_mean`. With a small factor, initial actions are near 0 for
        all observations. Of all choices about networks, this one matters most for whether PPO learns to walk, according
        to Andrychowicz et al., `What Matters In On-Policy Reinforcement Learning? <https://arxiv.org/abs/2006.05990>`_,
        2020.
      value_scale: factor of the initial weights of `critic_value`.
      normalization: normalization of hidden layers before their activation, "layer" or "bare_layer" as in `MLP`, or
        None.
      state_std: whether standard deviations depend on the observation. Then `initial_log_std` is not used.

    Raises:
      ValueError: an attribute is out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> net = ActorCritic(action_size=8)
      >>> params = net.init(jax.random.key(0), jnp.zeros((1, 27)))
      >>> mean, log_std, value = net.apply(params, jnp.zeros((32, 27)))
      >>> mean.shape, log_std.shape, value.shape
      ((32, 8), (8,), (32,))
    """

    action_size: int
    hidden: Sequence[int] = (256, 256)
    activation: str | Activation = "relu"
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    initial_log_std: float = 0.0
    policy_scale: float = 1.0
    value_scale: float = 1.0
    normalization: Literal["layer", "bare_layer"] | None = None
    state_std: bool = False

    def __post_init__(self):
        if self.action_size < 1:
            raise ValueError(f"action_size must be at least 1, got {self.action_size}")
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"hidden must be sizes of at least one hidden layer, got {self.hidden}")
        get_activation(self.activation)
        for name in ("policy_scale", "value_scale"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.normalization not in (None, "layer", "bare_layer"):
            raise ValueError(f"normalization must be 'layer', 'bare_layer' or None, got {self.normalization!r}")
        super().__post_init__()

    @nn.compact
    def __call__(self, obs: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Map observations [..., inputs] to means [..., actions], log-stds [actions] and values [...].

        With `state_std` log-stds are [..., actions].
        """
        dense = lambda size, scale, name: nn.Dense(
            size, kernel_init=lambda *args: scale * self.kernel_init(*args), name=name
        )
        actor = self._torso("actor", obs)
        mean = dense(self.action_size, self.policy_scale, "actor_mean")(actor)
        if self.state_std:
            std = nn.softplus(dense(self.action_size, 1.0, "actor_std")(actor))
            log_std = jnp.log(jnp.maximum(std, _LEAST_STD))
        else:
            initial = nn.initializers.constant(self.initial_log_std)
            log_std = self.param("actor_log_std", initial, (self.action_size,))
        value = dense(1, self.value_scale, "critic_value")(self._torso("critic", obs))
        return mean, log_std, value[..., 0]

    def _torso(self, name: str, x: jax.Array) -> jax.Array:
        for number, size in enumerate(self.hidden):
            x = nn.Dense(size, kernel_init=self.kernel_init, name=f"{name}_{number}")(x)
            if self.normalization is not None:
                x = NORMALIZATIONS[self.normalization](name=f"{name}_norm_{number}")(x)
            x = get_activation(self.activation)(x)
        return x
