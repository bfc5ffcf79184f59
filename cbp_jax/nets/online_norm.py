"""Online normalization: running statistics instead of batch statistics, with a corrected gradient."""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

COLLECTION = "online_stats"


class OnlineNorm(nn.Module):
    r"""Normalizes every unit by its running mean and variance.

    Each call is one time step t. With moments :math:`\mu(\cdot), \sigma^2(\cdot)` of each unit over the examples of the
    batch and over positions,

    .. math::
      y_t &= (x_t - \mu_{t-1}) / \sqrt{\sigma^2_{t-1} + \epsilon} \\
      \mu_t &= \alpha_f \mu_{t-1} + (1 - \alpha_f) \mu(x_t) \\
      \sigma^2_t &= \alpha_f \sigma^2_{t-1} + (1 - \alpha_f) \sigma^2(x_t)
        + \alpha_f (1 - \alpha_f) (\mu(x_t) - \mu_{t-1})^2

    and two accumulated errors keep the gradient, over time, orthogonal to the output and of mean 0:

    .. math::
      \tilde x'_t &= y'_t - (1 - \alpha_b) \varepsilon^{(y)}_{t-1} y_t, &
      \varepsilon^{(y)}_t &= \varepsilon^{(y)}_{t-1} + \mu(\tilde x'_t y_t) \\
      x'_t &= \tilde x'_t / \sqrt{\sigma^2_{t-1} + \epsilon} - (1 - \alpha_b) \varepsilon^{(1)}_{t-1}, &
      \varepsilon^{(1)}_t &= \varepsilon^{(1)}_{t-1} + \mu(x'_t)

    Then a learned scale and offset are applied, and a clamp, which prevents activations of a stack of layers from
    diverging while the statistics lag behind. The paper streams single examples, which is a batch of one. In a larger
    batch, examples are treated like positions of a convolution.

    **State.** The errors are known only after the backward pass, so they cannot be written to a collection in the
    forward pass. Instead all statistics are variables of the collection "online_stats", and *the gradient with respect
    to them is defined to be their change*. A training loop that differentiates with respect to everything that `init`
    returned, and updates it by an optax transformation, needs no knowledge of statistics: wrap the transformation in
    `keep_online_stats`. Scan and vmap over seeds need nothing else. A forward pass changes nothing, and computes the
    same in training and evaluation.

    Attributes:
      forward_decay: alpha_f, decay rate of the statistics, in [0, 1).
      backward_decay: alpha_b, decay rate of the gradient's correction, in [0, 1).
      epsilon: added to the variance.
      clamp: largest absolute value of an output; None for no clamp.
      use_scale: whether to learn a scale, which starts at 1.
      use_bias: whether to learn an offset, which starts at 0.

    Raises:
      ValueError: an attribute is out of range.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> net = nn.Sequential([nn.Dense(8), OnlineNorm(), nn.relu, nn.Dense(1)])
      >>> variables = jax.jit(net.init)(jax.random.key(0), jnp.ones((1, 3)))
      >>> tx = keep_online_stats(optax.sgd(0.01))
      >>> state = tx.init(variables)
      >>> loss = lambda variables: jnp.mean(net.apply(variables, jnp.ones((1, 3))) ** 2)
      >>> updates, state = tx.update(jax.jit(jax.grad(loss))(variables), state, variables)
      >>> variables = optax.apply_updates(variables, updates)
      >>> bool((variables["online_stats"]["layers_1"]["mean"] != 0).any())
      True

    References:
      Chiley et al., `Online Normalization for Training Neural Networks <https://arxiv.org/abs/1905.05894>`_, NeurIPS
      2019; the clamp is that of the authors' program
    """

    forward_decay: float = 0.999
    backward_decay: float = 0.99
    epsilon: float = 1e-5
    clamp: float | None = 5.0
    use_scale: bool = True
    use_bias: bool = True

    def __post_init__(self):
        for name in ("forward_decay", "backward_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not self.epsilon >= 0:
            raise ValueError(f"epsilon must be at least 0, got {self.epsilon}")
        if self.clamp is not None and not self.clamp > 0:
            raise ValueError(f"clamp must be above 0 or None, got {self.clamp}")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [..., units] to an array of the same shape and dtype."""
        shape = x.shape[-1:]
        mean, error_y, error_1 = (
            self.variable(COLLECTION, name, jnp.zeros, shape).value for name in ("mean", "error_y", "error_1")
        )
        variance = self.variable(COLLECTION, "var", jnp.ones, shape).value
        settings = (self.forward_decay, self.backward_decay, self.epsilon)
        y = _normalize(settings, x, mean, variance, error_y, error_1)
        if self.use_scale:
            y = y * self.param("scale", nn.initializers.ones, shape).astype(x.dtype)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, shape).astype(x.dtype)
        return y if self.clamp is None else jnp.clip(y, -self.clamp, self.clamp)


def keep_online_stats(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Apply a transformation to a network's weights, and update the statistics of `OnlineNorm`.

    Transformations outside of it, such as clipping by the global norm, would treat changes of statistics as gradients.
    Only `continual_backprop` belongs outside: replaced units then get the initial mean and variance.

    Args:
      inner: any optax transformation.

    Returns:
      a transformation of all variables, as `init` of a Flax module returns them.
    """

    def label(path, _):
        return "change" if COLLECTION in (getattr(key, "key", None) for key in path) else "gradient"

    # Path by path, because optax also calls this with a placeholder tree without leaves.
    labels = functools.partial(jax.tree_util.tree_map_with_path, label)
    return optax.partition({"gradient": inner, "change": optax.identity()}, labels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalize(settings, x, mean, variance, error_y, error_1):
    return (x - mean.astype(x.dtype)) * jax.lax.rsqrt(variance + settings[2]).astype(x.dtype)


def _normalize_fwd(settings, x, *statistics):
    y = _normalize(settings, x, *statistics)
    return y, (x, y, *statistics)


def _normalize_bwd(settings, residuals, gradient):
    (forward, backward, epsilon), (x, y, mean, variance, error_y, error_1) = settings, residuals
    dtype, axes = x.dtype, tuple(range(x.ndim - 1))
    x, y, gradient = (array.astype(jnp.float32) for array in (x, y, gradient))
    gradient = gradient - (1 - backward) * error_y * y
    change_y = jnp.mean(gradient * y, axes)
    gradient = gradient * jax.lax.rsqrt(variance + epsilon) - (1 - backward) * error_1
    change_1 = jnp.mean(gradient, axes)
    off = jnp.mean(x, axes) - mean
    change_mean = (1 - forward) * off
    change_variance = (1 - forward) * (jnp.var(x, axes) + forward * jnp.square(off) - variance)
    return gradient.astype(dtype), change_mean, change_variance, change_y, change_1


_normalize.defvjp(_normalize_fwd, _normalize_bwd)
