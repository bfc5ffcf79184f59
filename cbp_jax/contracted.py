"""Convolutions as matrix products, and pooling with a faster derivative, for CPUs."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.extend import core

from cbp_jax import jaxprs, pooling

# If a kernel reads fewer channels than this, its patches are concatenated first: products of few columns are slow.
_FEW_CHANNELS = 33


def contract_convolutions(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compute the convolutions of a network as matrix products on a CPU. On other devices the network is unchanged.

    Inside a loop, such as training steps under `jax.lax.scan`, XLA runs convolutions on a CPU as naive loops on one
    thread, while matrix products stay fast. With products, steps of a small residual network are 13 times faster
    (`benchmarks/convolutions.py`). Results are the same within rounding.

    A convolution is a sum over the kernel's spatial positions of products of the shifted image with the kernel's
    entries: `out[b, y, x] = sum_ij image[b, s y + i, s x + j] @ kernel[i, j]` with stride s. Convolutions with a
    dilated image (such as transposed ones) or grouped over the batch stay convolutions.

    XLA's derivative of pooling is also slow on a CPU, and is replaced too, for maxima, minima, and sums (averages) over
    windows that do not overlap. Values and gradients of pooling stay bit for bit the same (see `cbp_jax.pooling`).

    Args:
      function: of arrays or pytrees of arrays; keyword arguments are not traced.

    Returns:
      a function of the same arguments.

    Example:
      >>> def network(params, x):
      ...   dims = ("NHWC", "HWIO", "NHWC")
      ...   return jax.lax.conv_general_dilated(x, params["w"], (1, 1), "SAME", dimension_numbers=dims).mean()
      >>> params, x = {"w": jnp.ones((3, 3, 2, 4))}, jnp.ones((1, 8, 8, 2))
      >>> bool(jnp.allclose(contract_convolutions(network)(params, x), network(params, x)))
      True
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if jax.default_backend() != "cpu":
            return function(*args, **kwargs)
        closed, out_tree = jax.make_jaxpr(functools.partial(function, **kwargs), return_shape=True)(*args)
        if not jaxprs.holds(closed.jaxpr, {"conv_general_dilated"} | jaxprs.POOLING):
            return function(*args, **kwargs)
        outputs, _ = jaxprs.evaluate(closed, jax.tree.leaves(args), bind=_bind)
        return jax.tree.unflatten(jax.tree.structure(out_tree), outputs)

    return run


def _bind(eqn: core.JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Evaluate an equation. Convolutions become products where possible, and pooling gets the faster derivative."""
    params = eqn.params
    if (
        eqn.primitive.name == "conv_general_dilated"
        and params["batch_group_count"] == 1
        and set(params["lhs_dilation"]) <= {1}
    ):
        image, kernel = values
        return [_contract(image, kernel, params)]
    if pooling.is_followed(eqn):
        return [pooling.pool(eqn, *values)]
    return jaxprs.bind(eqn, values)


def _contract(image: chex.Array, kernel: chex.Array, params: dict[str, Any]) -> chex.Array:
    """Compute a convolution, given by the parameters of its equation, as products."""
    dims, groups = params["dimension_numbers"], params["feature_group_count"]
    image = image.transpose(dims.lhs_spec[0], *dims.lhs_spec[2:], dims.lhs_spec[1])  # batch, places, channels
    kernel = kernel.transpose(*dims.rhs_spec[2:], dims.rhs_spec[1], dims.rhs_spec[0])  # places, channels in, out
    strides, dilation = params["window_strides"], params["rhs_dilation"]
    zero = jnp.zeros((), image.dtype)
    image = jax.lax.pad(image, zero, [(0, 0, 0), *((low, high, 0) for low, high in params["padding"]), (0, 0, 0)])
    window, (inside, outside) = kernel.shape[:-2], kernel.shape[-2:]
    reach = [(size - 1) * step + 1 for size, step in zip(window, dilation, strict=True)]
    sizes = [(size - span) // step + 1 for size, span, step in zip(image.shape[1:-1], reach, strides, strict=True)]

    def shifted(place: Sequence[int]) -> chex.Array:
        """Return the pixels that the kernel's entries at one spatial position are multiplied with, for every output
        position."""
        starts = [index * step for index, step in zip(place, dilation, strict=True)]
        ends = [start + (size - 1) * step + 1 for start, size, step in zip(starts, sizes, strides, strict=True)]
        limits = (image.shape[0], *ends, image.shape[-1])
        return jax.lax.slice(image, (0, *starts, 0), limits, (1, *strides, 1))

    def product(x: chex.Array, w: chex.Array) -> chex.Array:
        """Return the product of channels [..., in] with entries [in, out], group by group if there are groups."""
        options = {"precision": params["precision"], "preferred_element_type": params["preferred_element_type"]}
        if groups == 1:
            return jnp.matmul(x, w, **options)
        x = x.reshape(*x.shape[:-1], groups, -1)
        w = w.reshape(w.shape[0], groups, -1)
        return jnp.einsum("...gi,igo->...go", x, w, **options).reshape(*x.shape[:-2], outside)

    places = list(itertools.product(*map(range, window)))
    if groups == 1 and inside < _FEW_CHANNELS and len(places) > 1:
        patches = jnp.concatenate([shifted(place) for place in places], -1)
        out = product(patches, kernel.reshape(math.prod(window) * inside, outside))
    else:
        out = sum(product(shifted(place), kernel[place]) for place in places)
    spec = dims.out_spec
    order = [0] * out.ndim
    for axis, place in enumerate((spec[0], *spec[2:], spec[1])):
        order[place] = axis
    return out.transpose(order)
