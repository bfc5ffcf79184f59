"""Controls of a ticket: other weights under its mask. For random masks see `random_mask_like`."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax

from cbp_jax.tickets.masks import Mask, apply_mask, prunable
from cbp_jax.units.groups import join_path


def reinitialize(init: Callable[[chex.PRNGKey], optax.Params], key: chex.PRNGKey, mask: Mask) -> optax.Params:
    """Return the ticket with newly drawn weights, to test whether its initial weights matter, or only its structure.

    Args:
      init: maps a key to the weights of a network before training.
      key: a key other than that of the ticket's weights.
      mask: the ticket's mask, may be traced.

    Returns:
      fresh weights, where pruned ones are 0.

    Raises:
      ValueError: the mask has another structure.

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
    r"""Return the ticket with only its signs: all weights of a kernel get the same magnitude.

    A weight :math:`w` becomes :math:`\sigma \, \mathrm{sign}(w)`, with :math:`\sigma` the standard deviation of its
    kernel's weights, including pruned ones. Parameters that are not prunable stay as they are.

    Args:
      params: the weights to which the ticket is rewound, without its mask, since the standard deviation is that of all.
      mask: the ticket's mask, may be traced.

    Returns:
      weights with the params' dtypes, where pruned ones are 0.

    Raises:
      ValueError: the mask has another structure.

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
