"""What a ticket is compared with: other weights under its mask. Other masks are `random_mask_like`."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax

from cbp_jax.tickets.masks import Mask, apply_mask, prunable
from cbp_jax.units.groups import join_path


def reinitialize(init: Callable[[chex.PRNGKey], optax.Params], key: chex.PRNGKey, mask: Mask) -> optax.Params:
    """The ticket with weights of another draw: whether its first weights matter, or its structure alone.

    Args:
      init: of a key, the weights of a network before training.
      key: another than that of the ticket's weights.
      mask: of the ticket, may be traced.

    Returns:
      fresh weights, dead ones 0.

    Raises:
      ValueError: the mask is of another structure.

    Example:
      >>> init = lambda key: {"w": jax.random.normal(key, (1, 3))}
      >>> weights = reinitialize(init, jax.random.key(1), {"w": jnp.array([[True, False, True]])})
      >>> (weights["w"] != 0).tolist()
      [[True, False, True]]

    References:
      Frankle & Carbin, `The lottery ticket hypothesis: finding sparse, trainable neural networks
      <https://arxiv.org/abs/1803.03635>`_, ICLR 2019
    """
    return apply_mask(init(key), mask)


def constant_magnitudes(params: optax.Params, mask: Mask) -> optax.Params:
    r"""The ticket with its signs alone: all weights of a kernel are of one magnitude.

    A weight :math:`w` becomes :math:`\sigma \, \mathrm{sign}(w)`, with :math:`\sigma` the standard deviation of its
    kernel's weights, dead ones too; what is not pruned stays as it is.

    Args:
      params: the weights that the ticket is rewound to, without its mask: the standard deviation is that of all.
      mask: of the ticket, may be traced.

    Returns:
      weights of the params' dtypes, dead ones 0.

    Raises:
      ValueError: the mask is of another structure.

    Example:
      >>> params = {"w": jnp.array([[3.0, -1.0, 1.0, -3.0]]), "b": jnp.array([0.5])}
      >>> weights = constant_magnitudes(params, {"w": jnp.array([[True, True, False, True]]), "b": jnp.array([True])})
      >>> weights["w"].round(2).tolist(), weights["b"].tolist()
      ([[2.240000009536743, -2.240000009536743, 0.0, -2.240000009536743]], [0.5])

    References:
      Zhou, Lan, Liu & Yosinski, `Deconstructing lottery tickets: zeros, signs, and the supermask
      <https://arxiv.org/abs/1905.01067>`_, NeurIPS 2019
    """
    kernels = prunable(mask)

    def constant(path, leaf):
        return (jnp.std(leaf) * jnp.sign(leaf)).astype(leaf.dtype) if join_path(path) in kernels else leaf

    return apply_mask(jax.tree_util.tree_map_with_path(constant, params), mask)
