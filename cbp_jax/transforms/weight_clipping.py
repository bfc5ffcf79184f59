"""Weight clipping (Elsayed, Lan, Lyle & Mahmood, 2024): keeps weights within a multiple of their initial range."""

import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cbp_jax import units as units_lib
from cbp_jax.numerics.scalars import check_scalar

# (path, parameter) -> the scale of its bound, or None if it is not clipped.
Scale = Callable[[str, chex.Array], chex.Numeric | None]


def clip_weights(
    inner: optax.GradientTransformation,
    bound: chex.Numeric = 1.0,
    scale: Scale | Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Clip the weights after every update of an inner optimizer.

    .. math::
        w \leftarrow \mathrm{clip}(w + u, -\kappa s, \kappa s)

    with u the inner optimizer's update and s a scale for each layer, by default the bound
    :math:`1 / \sqrt{\text{fan-in}}` of the uniform distribution from which PyTorch draws kernels and biases. (Flax's
    `lecun_normal` has that as its standard deviation, and is truncated at 2.3 times it. He et al.'s uniform initializer
    extends to 2.4 times it.)

    By default, an array of two or more axes is a kernel whose last axis is the outputs, as in Flax and Haiku. A vector
    or scalar has the scale of the kernel in the same layer, and is not clipped if there is none (norms). If there are
    several kernels, as in a flat dict of all layers, pass `scale`.

    Clipping is an update like any other: where `w + u` is within the bound, the update is u, bit for bit; elsewhere
    `params + updates` is the bound, or the adjacent floating-point number inside it. The inner optimizer's state is not
    changed. Weights that start outside the bound are clipped by the first update.

    Args:
      inner: the optimizer that trains the network.
      bound: :math:`\kappa`, >= 0; the paper tries 1 to 5. May be traced.
      scale: s: a function of a parameter's path (its keys joined by "/") and the parameter that returns a number, or
        None for no clipping; or a tree of the params' structure whose leaves are numbers or arrays that broadcast to
        the parameters. By default as above.

    Returns:
      a transformation that passes extra arguments on to `inner` and whose state is `inner`'s. Its update needs the
      params.

    Raises:
      ValueError: the bound is negative; in `init` and `update`, a scale has a wrong shape or cannot be inferred; in
        `update`, params are missing.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = clip_weights(optax.sgd(1.0), bound=2.0)
      >>> params = {"layer": {"kernel": jnp.zeros((4, 2)), "bias": jnp.zeros(2)}}
      >>> grads = {"layer": {"kernel": jnp.full((4, 2), -0.75), "bias": jnp.array([3.0, -3.0])}}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> updates["layer"]["kernel"][0].tolist(), updates["layer"]["bias"].tolist()
      ([0.75, 0.75], [-1.0, 1.0])

    References:
      Elsayed, Lan, Lyle & Mahmood, `Weight clipping for deep continual and reinforcement learning
      <https://arxiv.org/abs/2407.01704>`_, RLC 2024
    """
    check_scalar("bound", bound, at_least=0)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> optax.OptState:
        _scales(scale, params)
        return inner.init(params)

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        if params is None:
            raise ValueError("clip_weights needs the params: tx.update(grads, state, params), got params=None")
        updates, state = inner.update(updates, state, params, **extra_args)
        scales = _scales(scale, params)

        def clip(path, update, param):
            factor = scales[units_lib.join_path(path)]
            return update if factor is None else _clip(update, param, bound * jnp.asarray(factor, jnp.float32))

        return jax.tree_util.tree_map_with_path(clip, updates, params), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def kernel_scale(params: optax.Params) -> dict[str, float | None]:
    """Return the default scales, by path.

    Args:
      params: pytree of arrays.

    Returns:
      for each path 1 / sqrt(fan-in) of the layer's kernel, or None for a parameter of a layer that has none.

    Raises:
      ValueError: a vector or scalar is in one layer with several kernels.

    Example:
      >>> import jax.numpy as jnp
      >>> layer = {"kernel": jnp.zeros((3, 3, 1, 5)), "bias": jnp.zeros(5)}
      >>> kernel_scale({"conv": layer, "norm": {"scale": jnp.ones(5)}})
      {'conv/bias': 0.3333333333333333, 'conv/kernel': 0.3333333333333333, 'norm/scale': None}
    """
    leaves = units_lib.leaves_by_path(params)
    kernels: dict[str, list[str]] = {}
    for path, leaf in leaves.items():
        if jnp.ndim(leaf) >= 2:
            kernels.setdefault(_layer(path), []).append(path)
    scales: dict[str, float | None] = {}
    for path, leaf in leaves.items():
        beside = [path] if jnp.ndim(leaf) >= 2 else kernels.get(_layer(path), [])
        if len(beside) > 1:
            raise ValueError(
                f"clip_weights cannot tell the scale of {path!r}, which is next to the kernels {beside}; pass "
                "scale, a function of (path, param) or a tree of numbers"
            )
        scales[path] = 1 / math.sqrt(max(1, math.prod(jnp.shape(leaves[beside[0]])[:-1]))) if beside else None
    return scales


def _layer(path: str) -> str:
    # In the state of an `nnx.split`, a parameter is a node whose array is called "value".
    return path.rpartition("/")[0]


def _scales(scale: Scale | Any | None, params: optax.Params) -> dict[str, chex.Numeric | None]:
    """Return the scale of each parameter by path, checked."""
    leaves = units_lib.leaves_by_path(params)
    if scale is None:
        return kernel_scale(params)
    if callable(scale):
        scales = {path: scale(path, leaf) for path, leaf in leaves.items()}
    else:
        scales = units_lib.leaves_by_path(scale)
        missing = [path for path in leaves if path not in scales]
        if missing:
            raise ValueError(f"scale must be a tree like the params; it has nothing for {missing}")
    for path, leaf in leaves.items():
        factor = scales[path]
        if factor is None:
            continue
        try:
            fits = jnp.broadcast_shapes(jnp.shape(factor), jnp.shape(leaf)) == jnp.shape(leaf)
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"scale of {path!r} must be a number or broadcast to {jnp.shape(leaf)}, got shape {jnp.shape(factor)}"
            )
        if not isinstance(factor, jax.core.Tracer) and not np.all(np.asarray(factor) >= 0):
            raise ValueError(f"scale of {path!r} must not be negative, got {factor}")
    return scales


def _clip(update: chex.Array, param: chex.Array, bound: chex.Array) -> chex.Array:
    """Return an update after which the parameter, in its own precision, is within the bound."""
    # Rounded toward 0, since the bound may not be representable in the parameter's precision.
    rounded = bound.astype(param.dtype)
    bound = jnp.where(rounded > bound, jnp.nextafter(rounded, jnp.zeros_like(rounded)), rounded)
    after = (param + update).astype(param.dtype)
    inward = jnp.clip(after, -bound, bound) - param
    # The difference is rounded, so its sum with the parameter may be too large by less than its last digit.
    inward = jnp.where(jnp.abs(param + inward) <= bound, inward, jnp.nextafter(inward, -jnp.sign(after) * jnp.inf))
    inside = jnp.abs(after) <= bound
    return jnp.where(inside, update, inward)
