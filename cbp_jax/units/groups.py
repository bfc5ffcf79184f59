"""Groups of units: the rows of parameters that write and read each unit."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

# Sums over kernels of at least this many entries are folded. For smaller ones the extra loop costs more than it saves.
_FOLD_FROM, _FOLDS = 2**17, 4
# Flax's name for the collection of running statistics.
STATISTICS = "batch_stats"


@dataclasses.dataclass(frozen=True, eq=False)
class ParamSlice:
    """The rows of one parameter array that belong to the units of a group.

    The array's `axes` together (flattened in C order, usually a single axis) enumerate rows; `index[p, i]`
    is the p-th row of unit i. A dense kernel has one row for each unit. A dense kernel behind a flattened
    convolution has one for each position and channel, so that its index has as many positions.

    Attributes:
      path: the path of the array in the params: the keys joined by "/", as `"params/Dense_0/kernel"`.
      axes: the axes of the array that enumerate rows.
      index: int array [positions, units], the rows of each unit.
      rows: the total number of rows along the axes. Some may belong to other groups, or to no unit.
      reset: the value for the rows of a replaced unit, if they are neither drawn nor outgoing weights.
      lookup: whether the array is a table whose entries are looked up by index, as in an embedding.
    """

    path: str
    axes: tuple[int, ...]
    index: np.ndarray
    rows: int
    reset: float = 0.0
    lookup: bool = False

    @classmethod
    def whole_axis(cls, path: str, axis: int, size: int) -> "ParamSlice":
        """Return the slice in which row i of `axis` (of length `size`) belongs to unit i.

        >>> ParamSlice.whole_axis("params/Dense_0/kernel", axis=1, size=3).index
        array([[0, 1, 2]])
        """
        return cls(path, (axis,), np.arange(size)[None], size)

    @property
    def positions(self) -> int:
        """Number of rows that each unit owns."""
        return self.index.shape[0]

    @property
    def is_whole(self) -> bool:
        """Whether the rows, read in order, are the units, position by position."""
        return self.index.size == self.rows and np.array_equal(self.index.ravel(), np.arange(self.rows))

    def to_rows(self, per_unit: chex.Array, fill: Any = 0) -> chex.Array:
        """Spread values [units] or [positions, units] over the rows; rows of no unit get `fill`."""
        per_unit = jnp.broadcast_to(per_unit, self.index.shape)
        if self.is_whole:
            return per_unit.reshape(self.rows)
        return jnp.full(self.rows, fill, per_unit.dtype).at[self.index.ravel()].set(per_unit.ravel())

    def from_rows(self, per_row: chex.Array) -> chex.Array:
        """Gather values [rows, ...] of the rows into [positions, units, ...]."""
        shape = (*self.index.shape, *per_row.shape[1:])
        return per_row.reshape(shape) if self.is_whole else per_row[self.index]

    def along_axes(self, per_row: chex.Array, array: chex.Array) -> chex.Array:
        """Reshape values [rows] so that they broadcast against `array`."""
        shape = [1] * array.ndim
        for axis in self.axes:
            shape[axis] = array.shape[axis]
        if list(self.axes) != sorted(self.axes):
            dims = [array.shape[axis] for axis in self.axes]
            per_row = per_row.reshape(dims).transpose(np.argsort(self.axes))
        return per_row.reshape(shape)

    def mask(self, units: chex.Array, array: chex.Array) -> chex.Array:
        """Spread a bool [units] into a mask that broadcasts against `array`."""
        return self.along_axes(self.to_rows(units, False), array)

    def sum(self, array: chex.Array, weights: chex.Array | None = None) -> chex.Array:
        """Sum `array` over all axes except those of the rows: [positions, units].

        Args:
          array: an array of the parameter's shape.
          weights: factors in the sum, broadcastable to the array and equal for all rows of this slice; by default 1.
        """
        others = tuple(axis for axis in range(array.ndim) if axis not in self.axes)
        if weights is None:
            weights = jnp.ones((1,) * array.ndim, array.dtype)
        if any(weights.shape[axis] > 1 for axis in self.axes):
            array, weights = array * weights, jnp.ones((1,) * array.ndim, array.dtype)
        weights = jnp.broadcast_to(weights.squeeze(self.axes), [array.shape[axis] for axis in others])
        if array.ndim == 2 and array.size >= _FOLD_FROM and weights.size % _FOLDS == 0:
            # First folded in one vectorized loop, so that the product below reads only a fraction of the array.
            (axis,) = others
            array = array * jnp.expand_dims(weights, self.axes)
            array = sum(jnp.split(array, _FOLDS, axis))
            weights = jnp.ones(weights.size // _FOLDS, array.dtype)
        # As a product: XLA's CPU reductions are not vectorized along a minor axis.
        per_row = jax.lax.dot_general(
            array, weights, ((others, range(len(others))), ((), ())), precision=jax.lax.Precision.HIGHEST
        )
        if list(self.axes) != sorted(self.axes):
            per_row = per_row.transpose(np.argsort(np.argsort(self.axes)))
        return self.from_rows(per_row.reshape(self.rows))

    def rows_last(self, array: chex.Array) -> chex.Array:
        """Return the array with its rows as the last axis: [other axes..., rows]."""
        moved = jnp.moveaxis(array, self.axes, range(-len(self.axes), 0))
        return moved.reshape(*moved.shape[: array.ndim - len(self.axes)], self.rows)

    def undo_rows_last(self, array: chex.Array, shape: tuple[int, ...]) -> chex.Array:
        """Undo `rows_last` for an array of the given shape."""
        dims = [shape[axis] for axis in self.axes]
        return jnp.moveaxis(array.reshape(*array.shape[:-1], *dims), range(-len(dims), 0), self.axes)

    def columns(self, units: chex.Array) -> chex.Array:
        """Return row numbers [positions * k] of the units numbered `units` [k]; `rows` for a unit out of range."""
        index = np.concatenate([self.index, np.full((self.positions, 1), self.rows)], 1)
        return jnp.asarray(index)[:, jnp.minimum(units, self.index.shape[1])].ravel()

    def shape_of_rows(self, shape: tuple[int, ...], count: int) -> tuple[int, ...]:
        """Return the shape of `rows_of` an array of the given shape, for `count` units."""
        return (*(size for axis, size in enumerate(shape) if axis not in self.axes), self.positions * count)

    def rows_of(self, array: chex.Array, units: chex.Array) -> chex.Array:
        """Return the rows of the units numbered `units` [k]: [other axes..., positions * k]; 0 for a unit out of range.

        >>> ParamSlice.whole_axis("w", axis=1, size=3).rows_of(jnp.arange(6).reshape(2, 3), jnp.array([2, 3])).tolist()
        [[2, 0], [5, 0]]
        """
        return self.rows_last(array).at[..., self.columns(units)].get(mode="fill", fill_value=0)


@dataclasses.dataclass(frozen=True, eq=False)
class Consumer:
    """A kernel that reads a group's units.

    Attributes:
      kernel: the rows of the kernel that read each unit.
      bias: path of the bias added to what the kernel computes, or None.
      bias_axes: the kernel's axes that correspond to the axes of that bias.
      operand: index of the captured activation that this kernel reads; the same for consumers of the same array.
      absorbed: whether the mean over the batch is subtracted from what the kernel computes, as batch normalization
        does. Then the mean contribution of a removed unit needs no compensation.
    """

    kernel: ParamSlice
    bias: str | None = None
    bias_axes: tuple[int, ...] = ()
    operand: int = 0
    absorbed: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class UnitGroup:
    """Units that are written and read by the same arrays: neurons, channels, attention heads.

    Groups come from `discover_units`, or are written by hand:

    >>> import cbp_jax
    >>> group = UnitGroup(
    ...     "hidden", 3,
    ...     incoming=(ParamSlice.whole_axis("w1", 1, 3),),
    ...     biases=(ParamSlice.whole_axis("b1", 0, 3),),
    ...     outgoing=(Consumer(ParamSlice.whole_axis("w2", 0, 3), bias="b2", bias_axes=(1,)),),
    ...     kind="dense")
    >>> print(cbp_jax.Units((group,)))
    group   size  kind   incoming  bias  outgoing
    hidden     3  dense  w1        b1    w2

    Attributes:
      name: the path of the layer of its (first) kernel, joined by "/".
      size: number of units.
      incoming: kernels that write the units; resampled when a unit is replaced.
      biases: parameters added to the units; zeroed when a unit is replaced.
      outgoing: kernels that read the units; zeroed when a unit is replaced.
      scales: parameters multiplied with the units, such as those of normalization; set to `reset` when a unit is
        replaced, which is the value at which the multiplication changes nothing: 1, or 0 for a scale used as
        `1 + scale`.
      statistics: running statistics of the units, which are not parameters; see `reset_batch_stats`.
      kind: "dense", "conv" or "embedding" for the layer that makes the units; "residual" for units that several layers
        add to; "head" for attention heads; "" if unknown.
      exact: whether units act on the network only through their outgoing kernels. False if the group's units are
        normalized together (layer, group, RMS norm): a new unit then acts on the others through their mean and
        variance.
    """

    name: str
    size: int
    incoming: tuple[ParamSlice, ...]
    biases: tuple[ParamSlice, ...]
    outgoing: tuple[Consumer, ...]
    scales: tuple[ParamSlice, ...] = ()
    statistics: tuple[ParamSlice, ...] = ()
    kind: str = ""
    exact: bool = True

    def __post_init__(self):
        for part in (*self.slices(), *self.statistics):
            if part.index.ndim != 2 or part.index.shape[1] != self.size:
                raise ValueError(
                    f"group {self.name!r} has {self.size} units, but the index of its slice of {part.path!r} "
                    f"has shape {part.index.shape}; it must be [positions, {self.size}]"
                )
            flat = np.sort(part.index, None)
            if flat[0] < 0 or flat[-1] >= part.rows or (np.diff(flat) == 0).any():
                raise ValueError(
                    f"group {self.name!r}: the index of its slice of {part.path!r} must hold different rows from 0 to "
                    f"{part.rows - 1}; it is {part.index.tolist()}"
                )

    def slices(self) -> tuple[ParamSlice, ...]:
        """Return all slices of parameters of the group: incoming, biases, scales, outgoing."""
        return (*self.incoming, *self.biases, *self.scales, *(consumer.kernel for consumer in self.outgoing))

    def operands(self) -> tuple[Consumer, ...]:
        """Return the first consumer of each distinct activation that is read."""
        first: dict[int, Consumer] = {}
        for consumer in self.outgoing:
            first.setdefault(consumer.operand, consumer)
        return tuple(first[number] for number in sorted(first))


def join_path(key_path: tuple[Any, ...]) -> str:
    """Convert a jax key path to a string: its keys joined by "/".

    The value of an NNX variable has the path of the variable, since Flax's optimizer passes sometimes variables and
    sometimes their values to its transformation.

    >>> from flax import nnx
    >>> tree = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    >>> [[join_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(t)] for t in (tree, nnx.as_pure(tree))]
    [['bias', 'kernel'], ['bias', 'kernel']]
    """
    if key_path and key_path[-1] == jax.tree_util.GetAttrKey("value"):
        key_path = key_path[:-1]
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by their joined path, in the tree's order.

    Raises:
      ValueError: two leaves have the same path, as in `{"a/b": x, "a": {"b": y}}`.
    """
    leaves: dict[str, Any] = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = join_path(key_path)
        if path in leaves:
            raise ValueError(f"two parameters have the path {path!r}; rename one of them")
        leaves[path] = leaf
    return leaves


def statistics_name(path: str) -> str:
    """Return the path of a running statistic without the name of Flax's collection."""
    return path.removeprefix(f"{STATISTICS}/")
