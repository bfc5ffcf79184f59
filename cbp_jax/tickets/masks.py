"""Masks: trees of bools, True where a weight lives, False where it is pruned, or *dead*."""

import fnmatch
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from cbp_jax.numerics import keys
from cbp_jax.tickets import ranking
from cbp_jax.units.groups import join_path, leaves_by_path

#: A tree of bool arrays, like the params.
Mask = Any
#: Which kernels may be pruned: `(path, leaf) -> bool`, or one or several patterns of paths.
Select = Callable[[str, chex.Array], bool] | str | Iterable[str]


def full_mask(params: optax.Params, select: Select | None = None) -> Mask:
    """Return the mask in which all weights live.

    Kernels, the arrays of at least two axes, can be pruned. Kernels excluded by `select` get a scalar True as mask,
    which broadcasts. So the mask itself records what may be pruned.

    Args:
      params: pytree of arrays.
      select: which kernels may be pruned, by default all: a function of a kernel's path (its keys joined by "/") and
        the kernel; or patterns as in `fnmatch`, one of which must match its path or that of an enclosing layer.

    Returns:
      pytree of the params' structure, bool, True everywhere. Masks have the shape of their array, except for excluded
      kernels. Arrays of fewer than two axes are never pruned.

    Raises:
      ValueError: a pattern matches no kernel, or nothing may be pruned.

    Example:
      >>> params = {"embedding": jnp.ones((9, 2)), "dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
      >>> mask = full_mask(params, select="dense")
      >>> {path: leaf.shape for path, leaf in leaves_by_path(mask).items()}
      {'dense/bias': (3,), 'dense/kernel': (2, 3), 'embedding': ()}
    """
    leaves = leaves_by_path(params)
    kernels = {path: leaf for path, leaf in leaves.items() if jnp.ndim(leaf) >= 2}
    if select is None:
        chosen = set(kernels)
    elif callable(select):
        chosen = {path for path, leaf in kernels.items() if select(path, leaf)}
    else:
        patterns = [select] if isinstance(select, str) else list(select)
        chosen = {path for pattern in patterns for path in matching("select", pattern, kernels)}
    if not chosen:
        raise ValueError(f"select leaves nothing to prune; the arrays of at least two axes are {list(kernels)}")

    def living(key_path, leaf):
        path = join_path(key_path)
        return jnp.ones([] if path in kernels and path not in chosen else jnp.shape(leaf), bool)

    return jax.tree_util.tree_map_with_path(living, params)


def apply_mask(params: optax.Params, mask: Mask) -> optax.Params:
    """Set dead weights of the params to 0.

    Args:
      params: pytree of arrays.
      mask: their mask, from `full_mask` or `prune`.

    Returns:
      pytree like the params.

    Raises:
      ValueError: the mask has another structure, or is not bool.

    Example:
      >>> apply_mask({"w": jnp.ones((1, 3))}, {"w": jnp.array([[True, False, True]])})["w"].tolist()
      [[1.0, 0.0, 1.0]]
    """
    check_mask(mask, params)
    masks = leaves_by_path(mask)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: kept(masks[join_path(path)], leaf), params)


def density(mask: Mask) -> chex.Array:
    """Return the fraction of prunable weights that live.

    Args:
      mask: as `full_mask` or `prune` makes it.

    Returns:
      float32 [].

    Raises:
      ValueError: it is not a mask, or nothing in it may be pruned.

    Example:
      >>> float(density({"w": jnp.array([[True, False]]), "b": jnp.array([True, True])}))
      0.5
    """
    leaves = prunable(mask).values()
    living = jnp.asarray(sum(jnp.sum(leaf, dtype=jnp.int32) for leaf in leaves))
    return living.astype(jnp.float32) / sum(leaf.size for leaf in leaves)


class Overlap(NamedTuple):
    """Overlap of two masks.

    Attributes:
      jaccard: weights that live in both divided by weights that live in either, float32 []; 1 if none lives.
      chance: the same for two random masks with the same number of living weights in each array, from the expected
        number of weights that live in both.
    """

    jaccard: chex.Array
    chance: chex.Array


def overlap(mask_a: Mask, mask_b: Mask) -> Overlap:
    """Compare two masks of one network.

    Args:
      mask_a: a mask, from `full_mask` or `prune`.
      mask_b: another mask of the same network.

    Returns:
      the Jaccard index of the living prunable weights, and its value by chance.

    Raises:
      ValueError: they are not masks of one network.

    Example:
      >>> a, b = {"w": jnp.array([[True, True, False, False]])}, {"w": jnp.array([[True, False, True, False]])}
      >>> [round(float(value), 3) for value in overlap(a, b)]
      [0.333, 0.333]
    """
    first, second = prunable(mask_a), prunable(mask_b)
    shapes = [{path: leaf.shape for path, leaf in leaves.items()} for leaves in (first, second)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"mask_b must be of the structure and shapes of mask_a, {shapes[0]}, got {shapes[1]}")
    count = lambda leaf: jnp.sum(leaf, dtype=jnp.int32).astype(jnp.float32)
    living = [sum(map(count, leaves.values())) for leaves in (first, second)]
    both = sum(count(first[path] & second[path]) for path in first)
    expected = sum(count(first[path]) * count(second[path]) / first[path].size for path in first)

    def jaccard(common):
        either = living[0] + living[1] - common
        return jnp.where(either > 0, common / jnp.maximum(either, 1), 1.0)

    return Overlap(jaccard(both), jaccard(expected))


def random_mask_like(mask: Mask, key: jax.typing.ArrayLike) -> Mask:
    """Return a random mask with the same number of living weights in each array.

    Args:
      mask: as `full_mask` or `prune` makes it, may be traced.
      key: int or jax key.

    Returns:
      a mask of the same structure and shapes. Weights that may not be pruned live.

    Raises:
      ValueError: it is not a mask.

    Example:
      >>> mask = {"w": jnp.arange(12).reshape(3, 4) < 5, "b": jnp.ones(4, bool)}
      >>> other = random_mask_like(mask, 0)
      >>> int(other["w"].sum()), bool((other["w"] == mask["w"]).all()), bool(other["b"].all())
      (5, False, True)
    """
    data, impl = keys.as_key_data(key)
    key = jax.random.wrap_key_data(data, impl=impl)
    new = {}
    for number, (path, leaf) in enumerate(prunable(mask).items()):
        scores = jax.random.uniform(jax.random.fold_in(key, number), leaf.shape)
        dead = leaf.size - jnp.sum(leaf, dtype=jnp.int32)
        (new[path],) = ranking.without_least([scores], [jnp.ones(leaf.shape, bool)], dead)
    return replace(mask, new)


def prunable(mask: Mask) -> dict[str, chex.Array]:
    """Return the masks of prunable arrays by path: those of at least two axes.

    Raises:
      ValueError: it is no mask, or nothing in it may be pruned.
    """
    check_bool(mask)
    leaves = {path: jnp.asarray(leaf) for path, leaf in leaves_by_path(mask).items() if jnp.ndim(leaf) >= 2}
    if not leaves:
        raise ValueError(f"mask must have arrays of at least two axes, which may be pruned, got {_described(mask)}")
    return leaves


def replace(mask: Mask, new: dict[str, chex.Array]) -> Mask:
    """Return the mask with some arrays replaced, by path."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: new.get(join_path(path), jnp.asarray(leaf)), mask)


def kept(living: chex.Array, leaf: chex.Array) -> chex.Array:
    """Set dead entries of an array to 0, keeping its dtype."""
    return jnp.where(living, leaf, jnp.zeros([], jnp.result_type(leaf)))


def check_bool(mask: Mask) -> None:
    """Raise a ValueError unless the mask is a tree of bool arrays."""
    dtypes = {path: jnp.result_type(leaf) for path, leaf in leaves_by_path(mask).items()}
    others = {path: str(dtype) for path, dtype in dtypes.items() if dtype != jnp.bool_}
    if others or not dtypes:
        raise ValueError(f"mask must be a tree of bool arrays, got {others or mask!r}")


def check_mask(mask: Mask, params: optax.Params, *, whole: bool = True) -> None:
    """Raise unless a mask fits the params.

    Args:
      mask: the mask.
      params: pytree of arrays.
      whole: whether all its arrays must be in the params.

    Raises:
      ValueError: it is not bool, or has another structure or shapes.
    """
    check_bool(mask)
    masks, leaves = leaves_by_path(mask), leaves_by_path(params)
    missing = [path for path in leaves if path not in masks]
    unknown = [path for path in masks if path not in leaves] if whole else []
    if missing or unknown:
        raise ValueError(
            f"mask must be of the structure of the params: it has nothing for {missing}, and {unknown} are not in "
            "the params; make it by full_mask(params)"
        )
    for path, leaf in leaves.items():
        if jnp.shape(masks[path]) not in (jnp.shape(leaf), ()):
            raise ValueError(
                f"mask of {path!r} must be of its shape {jnp.shape(leaf)}, or without axes where it is not pruned, "
                f"got {jnp.shape(masks[path])}"
            )


def matching(name: str, pattern: str, paths: Collection[str]) -> list[str]:
    """Return the paths that a pattern matches, directly or by an enclosing layer: "params/Dense_0" also matches its
    kernel.

    Raises:
      ValueError: there is none.
    """
    found = [
        path for path in paths if any(fnmatch.fnmatchcase(path[:end], pattern) for end in [*_slashes(path), len(path)])
    ]
    if not found:
        raise ValueError(f"{name} has the pattern {pattern!r}, which matches none of {list(paths)}")
    return found


def _slashes(path: str) -> list[int]:
    return [place for place, letter in enumerate(path) if letter == "/"]


def _described(tree: Any) -> dict[str, tuple[int, ...]]:
    return {path: jnp.shape(leaf) for path, leaf in leaves_by_path(tree).items()}
