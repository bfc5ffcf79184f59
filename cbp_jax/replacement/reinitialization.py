r"""Initial weights of a replaced unit: small pure functions of a `NewUnits`, by name.

| name | incoming weights | outgoing weights |
|---|---|---|
| `resample` | drawn by the initializer | 0 |
| `rewind` | the unit's own at the start of training; likewise its biases | 0 |
| `resample_both` | drawn | drawn |
| `orthogonal` | drawn, then made orthogonal to the other units' incoming weights | 0 |
| `split` | those of a useful unit, with noise; likewise its biases and scales | half of the useful unit's |
| `regrow` | along the negative gradient | 0 |

Unless the table says otherwise, biases become 0 and scales of normalization 1. Except for `rewind` and `split`, weights
are as large as the initializer makes them.

With `compensate_bias`, the mean contribution of the removed unit is added to the biases of its consumers. The output
then stays the same on average, except with `resample_both`, whose new unit contributes at once.

A reinitialization of your own, whose weights are half as large:

>>> import jax, jax.numpy as jnp, optax, cbp_jax
>>> def small(new):
...   return cbp_jax.Fresh(tuple(0.5 * rows for rows in new.drawn))
>>> def apply_fn(params, x):
...   return jax.nn.relu(x @ params["w1"]) @ params["w2"]
>>> params = {"w1": jnp.ones((6, 8)), "w2": jnp.ones((8, 2))}
>>> units = cbp_jax.discover_units(apply_fn, params, jnp.ones((5, 6)))
>>> _, features = cbp_jax.with_features(apply_fn, units)(params, jnp.ones((5, 6)))
>>> tx = cbp_jax.continual_backprop(
...   optax.sgd(0.0), units, reinitialization=small, replacement_rate=1.0, maturity_threshold=0)
>>> updates, _ = tx.update(params, tx.init(params), params, features=features)
>>> bool(abs(params["w1"] + updates["w1"]).max() <= 0.5)  # he_uniform draws up to 1 where there are 6 inputs
True

References:
  Frankle & Carbin, `The lottery ticket hypothesis <https://arxiv.org/abs/1803.03635>`_, ICLR 2019 (`rewind`)
  Chen, Goodfellow & Shlens, `Net2Net <https://arxiv.org/abs/1511.05641>`_, ICLR 2016 (`split`)
  Evci et al., `Rigging the lottery <https://arxiv.org/abs/1911.11134>`_, ICML 2020 (`regrow`)
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from cbp_jax import units as units_lib
from cbp_jax.replacement.views import UpdatedParams

_RIDGE = 1e-4  # relative to the mean square of living units along a direction that they span


class Fresh(NamedTuple):
    """Initial weights of new units.

    Rows of a slice are an array [other axes of the parameter in order..., positions * k], position by position, as
    `NewUnits.rows` returns them.

    Attributes:
      incoming: for each slice of the group's `incoming`, its rows.
      outgoing: for each of the group's `outgoing`, the rows of its kernel; None for 0.
      biases: for each slice of the group's `biases`, its rows; None for 0.
      scales: for each slice of the group's `scales`, its rows; None for those that change nothing.
      kept: [units], factors for the outgoing weights of living units; None for 1.
    """

    incoming: tuple[chex.Array, ...]
    outgoing: tuple[chex.Array, ...] | None = None
    biases: tuple[chex.Array, ...] | None = None
    scales: tuple[chex.Array, ...] | None = None
    kept: chex.Array | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class NewUnits:
    """Input of a reinitialization: the units of one group that are replaced in one step.

    Attributes:
      group: the group.
      chosen: int [k], indices of the replaced units, padded with the group's size.
      replaced: bool [units], the same as a mask. All others are living.
      params: arrays by path: the parameters after the inner update. The outgoing weights of all units that are replaced
        in this step, in any group, are 0.
      grads: arrays by path: the gradients of this step.
      initial: arrays by path: incoming weights and biases as they were when training started; only for a function with
        the attribute `keeps_initial = True`.
      utility: float32 [units], the utilities of the policy, if it returns them (`Choice.utility`).
      sample: `sample(part, key, outgoing)` draws rows of an incoming or an outgoing slice with the initializer.
      keys: a typed key for each incoming slice, used by `drawn`.
      key: a typed key for any other random numbers.
    """

    group: units_lib.UnitGroup
    chosen: chex.Array
    replaced: chex.Array
    params: UpdatedParams
    grads: Mapping[str, chex.Array]
    initial: Mapping[str, chex.Array]
    utility: chex.Array | None
    sample: Callable[[units_lib.ParamSlice, chex.PRNGKey, bool], chex.Array]
    keys: tuple[chex.PRNGKey, ...]
    key: chex.PRNGKey

    @functools.cached_property
    def drawn(self) -> tuple[chex.Array, ...]:
        """Rows drawn by the initializer, for each incoming slice."""
        return tuple(self.sample(part, key, False) for part, key in zip(self.group.incoming, self.keys, strict=True))

    def rows(
        self,
        arrays: Mapping[str, chex.Array],
        part: units_lib.ParamSlice,
        units: chex.Array | None = None,
    ) -> chex.Array:
        """Return the rows of a slice that belong to units, [other axes..., positions * k]; 0 for none.

        Args:
          arrays: by path, such as `params` or `grads`.
          part: a slice of the group.
          units: int [k]; by default `chosen`.
        """
        return part.rows_of(arrays[part.path], self.chosen if units is None else units)

    def living(self, arrays: Mapping[str, chex.Array], part: units_lib.ParamSlice) -> chex.Array:
        """Return the rows of a slice, float32 [entries of a unit, units]; 0 for units that are replaced."""
        vectors = _vectors(self.rows(arrays, part, jnp.arange(self.group.size)), part)
        return jnp.where(self.replaced, 0.0, vectors)


Reinitialization = Callable[[NewUnits], Fresh]


def resample(new: NewUnits) -> Fresh:
    """Draw incoming weights by the initializer, with outgoing weights 0: Algorithm 1 of Dohare et al. (Nature 2024)."""
    return Fresh(new.drawn)


def rewind(new: NewUnits) -> Fresh:
    """Return the unit's own incoming weights and biases at the start of training, as in the lottery ticket
    hypothesis."""
    start = lambda parts: tuple(new.rows(new.initial, part) for part in parts)
    return Fresh(start(new.group.incoming), biases=start(new.group.biases))


rewind.keeps_initial = True  # type: ignore[attr-defined]


def resample_both(new: NewUnits) -> Fresh:
    """Draw incoming and outgoing weights by the initializer, as at the start of training."""
    outgoing = (
        new.sample(consumer.kernel, jax.random.fold_in(new.key, number), True)
        for number, consumer in enumerate(new.group.outgoing)
    )
    return Fresh(new.drawn, tuple(outgoing))


def orthogonal(new: NewUnits) -> Fresh:
    r"""Draw weights, make them orthogonal to the incoming weights of living units, and restore the drawn length.

    With the vectors of living units as columns of V and a drawn vector x, the new vector points along

    .. math:: (I - V (V^\top V + \lambda I)^{-1} V^\top)^2\, x

    with a small :math:`\lambda`. It is orthogonal to all of them if there are fewer units than incoming weights.
    Otherwise no vector is orthogonal to all, and :math:`(V V^\top + \lambda I)^{-1} x` is used, a direction in which
    living units have small weights. Each kernel that leads to the units is treated separately. New units are not made
    orthogonal to each other.
    """
    return Fresh(
        tuple(
            _like(drawn, part, _without_span(_vectors(drawn, part), new.living(new.params, part)))
            for part, drawn in zip(new.group.incoming, new.drawn, strict=True)
        )
    )


def split(new: NewUnits, noise: float = 0.1) -> Fresh:
    """Split a useful unit: the new unit gets its incoming weights, with noise, and half of its outgoing weights.

    The useful unit keeps the other half. Without noise, the network computes what it would compute with the replaced
    unit removed. The most useful living unit is split first, and each at most once in a step. If none is left, units
    are drawn (`resample`).

    Args:
      new: the new units.
      noise: what fraction of a drawn unit is added to the incoming weights, so that the halves become different.

    Raises:
      ValueError: the policy does not return utilities.
    """
    if new.utility is None:
        raise ValueError(
            "reinitialization 'split' needs the utility of units: the policy must give Choice(utility=...)"
        )
    size, count = new.group.size, new.chosen.size
    useful = jnp.where(new.replaced | ~jnp.isfinite(new.utility), -jnp.inf, new.utility)
    values, donors = jax.lax.top_k(useful, count)
    due = jnp.isfinite(values) & (new.chosen < size)
    donors = jnp.where(due, donors, size)

    def copied(part, otherwise):
        rows = new.rows(new.params, part, donors)
        return jnp.where(jnp.tile(due, part.positions), rows, jnp.asarray(otherwise).astype(rows.dtype))

    def with_noise(part, drawn):
        donor = new.rows(new.params, part, donors)
        return copied(part, drawn) + jnp.where(jnp.tile(due, part.positions), noise * drawn, 0).astype(donor.dtype)

    return Fresh(
        tuple(with_noise(part, drawn) for part, drawn in zip(new.group.incoming, new.drawn, strict=True)),
        outgoing=tuple(0.5 * copied(consumer.kernel, 0.0) for consumer in new.group.outgoing),
        biases=tuple(copied(part, part.reset) for part in new.group.biases),
        scales=tuple(copied(part, part.reset) for part in new.group.scales),
        kept=jnp.ones(size).at[donors].set(0.5, mode="drop"),
    )


def regrow(new: NewUnits) -> Fresh:
    """Return incoming weights along the negative gradient of this step, as long as the vectors that the initializer
    draws.

    The gradient is that of the removed unit's incoming weights. If it is 0, as for a dead unit, the mean gradient of
    the living units is used. If that is 0 as well, weights are drawn.
    """

    def along(part, drawn):
        own, others = _vectors(new.rows(new.grads, part), part), new.living(new.grads, part).mean(1, keepdims=True)
        direction = jnp.where(_length(own) > 0, own, others)
        usable = (_length(direction) > 0) & jnp.isfinite(_length(direction))
        return _like(drawn, part, jnp.where(usable, -direction, _vectors(drawn, part)))

    return Fresh(tuple(along(part, drawn) for part, drawn in zip(new.group.incoming, new.drawn, strict=True)))


REINITIALIZATIONS: dict[str, Reinitialization] = {
    function.__name__: function for function in (resample, rewind, resample_both, orthogonal, split, regrow)
}


def get_reinitialization(reinitialization: str | Reinitialization) -> Reinitialization:
    """Look up a reinitialization by name. A callable is returned as it is.

    Raises:
      ValueError: there is no reinitialization of that name.

    Example:
      >>> get_reinitialization("rewound")
      Traceback (most recent call last):
      ...
      ValueError: reinitialization must be a callable or one of ['orthogonal', 'regrow', 'resample', 'resample_both', \
'rewind', 'split'], got 'rewound'
    """
    if callable(reinitialization):
        return reinitialization
    if not isinstance(reinitialization, str) or reinitialization not in REINITIALIZATIONS:
        raise ValueError(
            f"reinitialization must be a callable or one of {sorted(REINITIALIZATIONS)}, got {reinitialization!r}"
        )
    return REINITIALIZATIONS[reinitialization]


def keeps_initial(reinitialization: Reinitialization) -> bool:
    """Return whether a reinitialization, or the function that it is a partial of, needs the initial parameters."""
    function = reinitialization.func if isinstance(reinitialization, functools.partial) else reinitialization
    return getattr(function, "keeps_initial", False)


def _vectors(rows: chex.Array, part: units_lib.ParamSlice) -> chex.Array:
    """Reshape rows [other axes..., positions * k] to one vector for each unit, float32 [entries of a unit, k]."""
    return rows.astype(jnp.float32).reshape(-1, rows.shape[-1] // part.positions)


def _like(drawn: chex.Array, part: units_lib.ParamSlice, vectors: chex.Array) -> chex.Array:
    """Reshape vectors to rows, with the lengths and the type of those drawn."""
    length = _length(vectors)
    scale = _length(_vectors(drawn, part)) / jnp.where(length > 0, length, 1.0)
    return (vectors * scale).reshape(drawn.shape).astype(drawn.dtype)


def _length(vectors: chex.Array) -> chex.Array:
    """Return norms of columns, [1, k]. Entries are scaled by the largest one first, so that squares of small gradients
    are not 0."""
    largest = jnp.max(jnp.abs(vectors), 0, keepdims=True)
    unit = vectors / jnp.where(largest > 0, largest, 1.0)
    return largest * jnp.sqrt(jnp.sum(jnp.square(unit), 0, keepdims=True))


# One at a time under vmap, so that each result is bit for bit that of a solo run: batched products round differently.
@jax.custom_batching.sequential_vmap
def _without_span(vectors: chex.Array, others: chex.Array) -> chex.Array:
    """Remove from vectors [entries, k] their components in the span of others [entries, units]."""
    vectors, others = jax.lax.optimization_barrier((vectors, others))
    entries, size = others.shape
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    smaller = product(others.T, others) if size < entries else product(others, others.T)
    mean = jnp.trace(smaller) / len(smaller)
    ridge = jnp.where(mean > 0, _RIDGE * mean, 1.0) * jnp.eye(len(smaller))
    solve = functools.partial(jax.scipy.linalg.cho_solve, jax.scipy.linalg.cho_factor(smaller + ridge))
    if size >= entries:
        return solve(vectors)
    for _ in range(2):
        vectors = vectors - product(others, solve(product(others.T, vectors)))
    return vectors
