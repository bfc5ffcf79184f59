"""Adapters, and parameters with adapters applied."""

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cbp_jax.units.groups import join_path, leaves_by_path


class Axes(NamedTuple):
    """Which axes of a kernel are inputs and which are outputs; others enumerate stacked kernels."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@flax.struct.dataclass
class Adapter:
    """Factors of low-rank changes: a pytree whose only leaves are the factors.

    Attributes:
      factors: by the path of a kernel, "lora_A" [in, rank] and "lora_B" [rank, out], where "in" stands for all of the
        kernel's input axes and "out" for its output axes. For stacked kernels, the stacking axes come first.
      alpha: the change of a kernel is `alpha / rank` times the product of its factors.
      axes: the axes of each kernel, in the order of `factors`.
      like: structure of the params that it was made for, with path, shape and dtype of each leaf.
    """

    factors: dict[str, dict[str, jax.Array]]
    alpha: float = flax.struct.field(pytree_node=False)
    axes: tuple[tuple[str, Axes], ...] = flax.struct.field(pytree_node=False)
    like: tuple[Any, tuple[tuple[str, tuple[int, ...], Any], ...]] = flax.struct.field(pytree_node=False)

    @property
    def rank(self) -> int:
        """The number of columns of each `lora_A`."""
        return next(iter(self.factors.values()))["lora_A"].shape[-1]

    @property
    def scaling(self) -> float:
        """The factor of the product, alpha / rank."""
        return self.alpha / self.rank


def init(
    params: optax.Params,
    key: jax.Array | int,
    *,
    rank: int,
    alpha: float | None = None,
    target_modules: str | Sequence[str] = ("*",),
    init_lora_weights: Literal["kaiming", "gaussian"] = "kaiming",
    axes: Mapping[str, tuple[Sequence[int], Sequence[int]]] | None = None,
) -> Adapter:
    r"""Make an adapter that changes nothing yet.

    .. math:: W' = W + \frac{\alpha}{r} A B, \qquad
        A \in \mathbb{R}^{in \times r}, \; B = 0 \in \mathbb{R}^{r \times out}

    A kernel of several axes is treated as a matrix of its input axes by its output axes. Unless `axes` says otherwise,
    the last axis is the output, as in dense layers and convolutions. In Flax's attention, whose kernels have three
    axes, only the first axis of "query", "key" and "value" is an input.

    Args:
      params: any tree of arrays. Kernels are its leaves of at least two axes that are not named "bias".
      key: a jax key, or an int.
      rank: :math:`r`, the rank of every change.
      alpha: :math:`\alpha`, by default the rank; not traced.
      target_modules: patterns of the kernels to adapt, as in `fnmatch`. A pattern may match a kernel's whole path
        ("params/*/query/kernel"), its layer's path, or the end of either, as in PEFT: "query", "kernel".
      init_lora_weights: how A is drawn: "kaiming", uniform in :math:`\pm 1/\sqrt{in}`, PEFT's default; or "gaussian",
        with standard deviation :math:`1/r`.
      axes: by pattern, as above, (input axes, output axes). The first match counts. The other axes enumerate stacked
        kernels, and each of these gets its own factors. For Equinox use `{"*": ((1,), (0,))}`. Kernels of layers in
        Flax's `nn.scan` are stacked along their first axis, which must be said here: for dense layers
        `{"*": ((1,), (2,))}`.

    Returns:
      the adapter, in float32 or wider.

    Raises:
      ValueError: the rank is less than 1, alpha is not a positive number, a pattern matches no kernel, or axes do not
        fit a kernel.

    Example:
      >>> params = {"params": {"conv": {"kernel": jnp.ones((3, 3, 4, 8)), "bias": jnp.ones(8)}}}
      >>> adapter = init(params, jax.random.key(0), rank=2, alpha=16)
      >>> adapter.factors["params/conv/kernel"]["lora_A"].shape, adapter.scaling
      ((3, 3, 4, 2), 8.0)
    """
    if not isinstance(rank, int | np.integer) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank must be an integer of at least 1, got {rank!r}")
    if alpha is not None and (isinstance(alpha, str | jax.core.Tracer) or not 0 < alpha < math.inf):
        raise ValueError(f"alpha must be a positive number, got {alpha!r}")
    alpha = float(rank if alpha is None else alpha)
    if init_lora_weights not in ("kaiming", "gaussian"):
        raise ValueError(f"init_lora_weights must be 'kaiming' or 'gaussian', got {init_lora_weights!r}")
    leaves = leaves_by_path(params)
    kernels = [path for path, leaf in leaves.items() if jnp.ndim(leaf) >= 2 and path.rpartition("/")[2] != "bias"]
    patterns = (target_modules,) if isinstance(target_modules, str) else tuple(target_modules)
    _check_patterns("target_modules", patterns, kernels)
    _check_patterns("axes", tuple(axes or ()), kernels)
    key = jax.random.key(int(key)) if isinstance(key, int | np.integer) else key
    factors, chosen = {}, []
    for number, path in enumerate(kernels):
        if not any(matches(path, pattern) for pattern in patterns):
            continue
        shape, found = jnp.shape(leaves[path]), kernel_axes(path, jnp.ndim(leaves[path]), axes)
        stack, inside, outside = _sizes(found, shape)
        dtype = jnp.promote_types(jnp.result_type(leaves[path]), jnp.float32)
        # By the kernel's index among all, so that another choice of kernels draws the same factors.
        draw = jax.random.fold_in(key, number), (*stack, *inside, int(rank)), dtype
        if init_lora_weights == "gaussian":
            a = jax.random.normal(*draw) / rank
        else:
            a = jax.random.uniform(*draw, minval=-1, maxval=1) / math.sqrt(math.prod(inside))
        factors[path] = {"lora_A": a, "lora_B": jnp.zeros((*stack, int(rank), *outside), dtype)}
        chosen.append((path, found))
    shapes = tuple((path, jnp.shape(leaf), jnp.result_type(leaf)) for path, leaf in leaves.items())
    return Adapter(factors, alpha, tuple(chosen), (jax.tree.structure(params), shapes))


def apply(params: optax.Params, adapter: Adapter | Sequence[Adapter]) -> optax.Params:
    """Return the params with one adapter, or the sum of several, for training: gradients reach only the adapters.

    Args:
      params: as passed to `init`. They get no derivatives.
      adapter: the adapter, or several.

    Returns:
      the params with changed kernels.

    Raises:
      ValueError: the params have other kernels than those that the adapter was made for.

    Example:
      >>> params = {"w": jnp.ones((2, 3))}
      >>> adapter = init(params, jax.random.key(0), rank=1)
      >>> bool((apply(params, adapter)["w"] == params["w"]).all())
      True
    """
    return merge(jax.lax.stop_gradient(params), adapter)


def merge(params: optax.Params, adapter: Adapter | Sequence[Adapter]) -> optax.Params:
    """Return the params with the adapter's changes added, as ordinary parameters. Arguments are those of `apply`."""
    return _changed(params, adapter, 1)


def unmerge(params: optax.Params, adapter: Adapter | Sequence[Adapter]) -> optax.Params:
    """Invert `merge`: subtract the adapter's changes, up to rounding."""
    return _changed(params, adapter, -1)


def delta(adapter: Adapter | Sequence[Adapter]) -> optax.Params:
    """Return the change of all params by one or several adapters: a tree like the params, 0 for kernels that are not
    adapted.

    Example:
      >>> adapter = init({"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, jax.random.key(0), rank=1)
      >>> jax.tree.map(jnp.shape, delta(adapter))
      {'b': (3,), 'w': (2, 3)}
    """
    structure, leaves = adapters_of(adapter)[0].like
    return _changed(jax.tree.unflatten(structure, [jnp.zeros(shape, dtype) for _, shape, dtype in leaves]), adapter, 1)


def changes(adapter: Adapter) -> dict[str, jax.Array]:
    """Return the changes of the adapted kernels by path, each in the shape of its kernel."""
    shapes = {path: shape for path, shape, _ in adapter.like[1]}
    return {path: _change(adapter, path, axes, shapes[path]) for path, axes in adapter.axes}


def adapters_of(adapter: Adapter | Sequence[Adapter]) -> Sequence[Adapter]:
    """Return one adapter or several, as a list."""
    adapters = [adapter] if isinstance(adapter, Adapter) else list(adapter)
    if not adapters or not all(isinstance(one, Adapter) for one in adapters):
        raise ValueError(f"adapter must be an Adapter, or several of them, got {adapter!r}")
    return adapters


def sizes_of(adapter: Adapter, path: str) -> list[tuple[int, ...]]:
    """Return the sizes of a kernel's stacking axes, input axes and output axes."""
    shapes = {path: shape for path, shape, _ in adapter.like[1]}
    return _sizes(dict(adapter.axes)[path], shapes[path])


def matches(path: str, pattern: str) -> bool:
    """Return whether a pattern matches a kernel's path, its layer's path, or the end of either.

    >>> matches("params/layer_0/query/kernel", "query"), matches("params/layer_0/query/kernel", "layer_?")
    (True, False)
    """
    layer = path.rpartition("/")[0] or path
    return any(fnmatch.fnmatchcase(name, end) for name in (path, layer) for end in (pattern, f"*/{pattern}"))


def _changed(params: optax.Params, adapter: Adapter | Sequence[Adapter], sign: int) -> optax.Params:
    adapters = adapters_of(adapter)
    leaves = {path: jnp.shape(leaf) for path, leaf in leaves_by_path(params).items()}
    for one in adapters:
        shapes = {path: shape for path, shape, _ in one.like[1]}
        for path, _ in one.axes:
            if leaves.get(path) != shapes[path]:
                raise ValueError(
                    f"params must have the kernel {path!r} of shape {shapes[path]}, for which the adapter was made; "
                    + (f"it has the shape {leaves[path]}" if path in leaves else f"they have {list(leaves)}")
                )

    def change(key_path: Any, leaf: jax.Array) -> jax.Array:
        path, shape = join_path(key_path), jnp.shape(leaf)
        found = [_change(one, path, axes, shape, sign) for one in adapters for own, axes in one.axes if own == path]
        return (leaf + sum(found[1:], found[0])).astype(jnp.result_type(leaf)) if found else leaf

    return jax.tree_util.tree_map_with_path(change, params)


def _change(adapter: Adapter, path: str, axes: Axes, shape: tuple[int, ...], sign: int = 1) -> jax.Array:
    """Return the change of one kernel, in the form that `factored` recognizes."""
    a, b = adapter.factors[path]["lora_A"], adapter.factors[path]["lora_B"]
    stacked = _stacked(axes, len(shape))
    batch = tuple(range(len(stacked)))
    numbers = (((a.ndim - 1,), (len(stacked),)), (batch, batch))
    # The factors are small, so the product is computed in full precision, also on devices that round by default.
    product = jax.lax.dot_general(a, b, numbers, precision=jax.lax.Precision.HIGHEST)
    order = (*stacked, *axes.inputs, *axes.outputs)
    if order != tuple(range(len(order))):
        product = product.transpose([order.index(axis) for axis in range(len(order))])
    return sign * adapter.scaling * product


def _stacked(axes: Axes, ndim: int) -> tuple[int, ...]:
    return tuple(axis for axis in range(ndim) if axis not in (*axes.inputs, *axes.outputs))


def _sizes(axes: Axes, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the sizes of a kernel's stacking axes, input axes and output axes."""
    return [tuple(shape[axis] for axis in side) for side in (_stacked(axes, len(shape)), *axes)]


def kernel_axes(path: str, ndim: int, given: Mapping[str, tuple[Sequence[int], Sequence[int]]] | None = None) -> Axes:
    """Return the input and output axes of a kernel, as given by the argument `axes` of :func:`init`, or by default."""
    for pattern, (inputs, outputs) in (given or {}).items():
        if not matches(path, pattern):
            continue
        sides = [[axis + ndim * (axis < 0) for axis in side] for side in (inputs, outputs)]
        both = sides[0] + sides[1]
        if not inputs or not outputs or len(set(both)) < len(both) or not set(both) <= set(range(ndim)):
            raise ValueError(
                f"axes[{pattern!r}] must be different axes of {path!r}, which has {ndim}, some to sum over and "
                f"some that it makes; got {(tuple(inputs), tuple(outputs))}"
            )
        return Axes(*map(tuple, sides))
    # Flax's attention maps the width to heads and their dimensions, and these back to the width.
    count = 1 if ndim == 3 and path.split("/")[-2:-1] in (["query"], ["key"], ["value"]) else ndim - 1
    return Axes(tuple(range(count)), tuple(range(count, ndim)))


def _check_patterns(name: str, patterns: Sequence[str], kernels: Sequence[str]) -> None:
    if name == "target_modules" and not patterns:
        raise ValueError("target_modules must be one pattern or more, got none")
    for pattern in patterns:
        if not any(matches(path, pattern) for path in kernels):
            raise ValueError(f"{name}: {pattern!r} matches no kernel; the kernels are {kernels}")
