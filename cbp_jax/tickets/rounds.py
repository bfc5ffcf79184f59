"""Rounds of training, pruning and rewinding."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from cbp_jax.tickets.masked import masked
from cbp_jax.tickets.masks import Mask, apply_mask, full_mask
from cbp_jax.tickets.prune import Score, prune


class Trained(NamedTuple):
    """The result of training.

    Attributes:
      params: the weights at the end of training.
      kept: weights during training, by the number of updates before them.
      measured: measurements of any kind, or None.
    """

    params: optax.Params
    kept: Mapping[int, optax.Params] = {}
    measured: Any = None


class Round(NamedTuple):
    """The result of a round of `iterative_magnitude_pruning`.

    Attributes:
      number: the number of the round, from 1.
      mask: mask of the weights that still live after the round.
      params: the rewound weights, where pruned ones are 0. With the mask, this is the ticket.
      trained: the weights at the end of the round's training, under the previous mask.
      measured: measurements from that training.
    """

    number: int
    mask: Mask
    params: optax.Params
    trained: optax.Params
    measured: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """Trains under a mask for some updates, in one compiled loop, for `iterative_magnitude_pruning`.

    Attributes:
      loss: `(params, batch) -> loss`, or with `features` `-> (loss, features)`.
      optimizer: an optax transformation, which is wrapped by the mask (see `masked`).
      batch: maps the number of an update, from 0 and traced, to its batch.
      steps: the number of updates.
      keep: updates before which the weights are stored, such as the step to rewind to.
      measure: maps the final weights to measurements.
      features: whether the loss also returns activations, for an optimizer that replaces units.

    Raises:
      ValueError: `steps` is less than 1, or a step in `keep` is out of range.

    Example:
      >>> x = jnp.array([[1.0, 2.0], [3.0, -1.0]])
      >>> train = Training(
      ...     loss=lambda w, batch: jnp.mean((batch @ w - batch @ jnp.ones((2, 1))) ** 2),
      ...     optimizer=optax.sgd(0.1), batch=lambda step: x, steps=100)
      >>> mask = jnp.array([[True], [False]])
      >>> train(apply_mask(jnp.zeros((2, 1)), mask), mask).params.round(2).tolist()
      [[0.8999999761581421], [0.0]]
    """

    loss: Callable[[optax.Params, Any], Any]
    optimizer: optax.GradientTransformation
    batch: Callable[[chex.Array], Any]
    steps: int
    keep: tuple[int, ...] = ()
    measure: Callable[[optax.Params], Any] = lambda params: None
    features: bool = False

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        for step in self.keep:
            if not 0 <= step < self.steps:
                raise ValueError(f"keep must be steps from 0 to {self.steps - 1}, got {step}")

    def __call__(self, params: optax.Params, mask: Mask, step: int = 0) -> Trained:
        """Train from the given update on, with a new optimizer state."""
        return self._compiled(params, mask, step)

    @functools.cached_property
    def _compiled(self) -> Callable[..., Trained]:
        return jax.jit(self._train, static_argnums=2)

    def _train(self, params: optax.Params, mask: Mask, step: int) -> Trained:
        tx = masked(self.optimizer, mask)

        def update(carry, number):
            params, state = carry
            batch = self.batch(number)
            if self.features:
                grads, features = jax.grad(self.loss, has_aux=True)(params, batch)
                updates, state = tx.update(grads, state, params, features=features)
            else:
                updates, state = tx.update(jax.grad(self.loss)(params, batch), state, params)
            return (optax.apply_updates(params, updates), state), None

        kept, carry = {}, (params, tx.init(params))
        stops = sorted({stop for stop in self.keep if stop >= step})
        for start, end in itertools.pairwise([step, *stops, self.steps]):
            carry, _ = jax.lax.scan(update, carry, jnp.arange(start, end))
            kept[end] = carry[0]
        kept.pop(self.steps)
        return Trained(carry[0], kept, self.measure(carry[0]))


def iterative_magnitude_pruning(
    train: Callable[[optax.Params, Mask, int], Trained],
    params: optax.Params,
    *,
    rounds: int,
    fraction: float = 0.2,
    scope: Literal["layer", "global"] = "layer",
    rates: Mapping[str, float] | None = None,
    score: Score | None = None,
    mask: Mask | None = None,
    rewind_step: int = 0,
    lanes: bool = False,
) -> Iterator[Round]:
    r"""Find lottery tickets by rounds of training, pruning, and rewinding of the remaining weights.

    With weights :math:`\theta_0`, a mask :math:`m` that is full at first, and :math:`\theta_k` the weights of the first
    round after `rewind_step` updates, each round

    1. trains :math:`m \odot \theta_0` in the first round, :math:`m \odot \theta_k` from update k on in later rounds;
    2. prunes a fraction of the living weights, those of smallest score after training;
    3. rewinds: the ticket is :math:`m \odot \theta_k`, bit for bit, with the new mask.

    One round with a large fraction is one-shot pruning.

    Args:
      train: `(params, mask, step) -> Trained`, a `Training` or a function of your own, which trains the living weights
        from update `step` on. In the first round it is called with step 0 and must keep the weights at `rewind_step`.
      params: :math:`\theta_0`.
      rounds: number of rounds.
      fraction: the fraction of the living weights that a round prunes, in [0, 1). For this and the next arguments see
        `prune`.
      scope: where scores are compared, "layer" or "global".
      rates: factors of the fraction by pattern of path.
      score: the score of the trained weights.
      mask: the initial mask; by default all weights live.
      rewind_step: k. Late rewinding uses k > 0, which large networks need.
      lanes: whether params, and the mask if given, have a leading axis of lanes, such as seeds or settings. Then
        `train` must be traceable, and a round of all lanes is one program.

    Yields:
      after each round a `Round`.

    Raises:
      ValueError: as in `prune`, before any training; or `rounds` is less than 1, or the weights at `rewind_step` are
        not kept (for a function of your own, this is known after the first training).

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (50, 20))
      >>> train = Training(
      ...     loss=lambda w, x: jnp.mean((x @ w - x[:, :2] @ jnp.array([[3.0], [-2.0]])) ** 2),
      ...     optimizer=optax.adam(0.1), batch=lambda step: x, steps=200)
      >>> tickets = list(iterative_magnitude_pruning(train, jnp.ones((20, 1)), rounds=2, fraction=0.7))
      >>> [int(ticket.mask.sum()) for ticket in tickets], tickets[1].mask[:2].tolist()
      ([6, 2], [[True], [True]])

    References:
      Frankle & Carbin, `The lottery ticket hypothesis: finding sparse, trainable neural networks
      <https://arxiv.org/abs/1803.03635>`_, ICLR 2019

      Frankle, Dziugaite, Roy & Carbin, `Linear mode connectivity and the lottery ticket hypothesis
      <https://arxiv.org/abs/1912.05671>`_, ICML 2020
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if rewind_step < 0:
        raise ValueError(f"rewind_step must be at least 0, got {rewind_step}")
    if rewind_step:
        _check_kept(rewind_step, getattr(train, "keep", (rewind_step,)))
    over_lanes = jax.vmap if lanes else lambda function: function
    prune_one = functools.partial(prune, fraction=fraction, scope=scope, rates=rates, score=score)
    if mask is None:
        mask = over_lanes(full_mask)(params)
    over_lanes(prune_one)(params, mask)  # raises errors before any training

    def one_round(start: optax.Params, mask: Mask, first: bool) -> tuple[Any, ...]:
        trained = train(apply_mask(start, mask), mask, 0 if first else rewind_step)
        if first and rewind_step:
            _check_kept(rewind_step, trained.kept)
            start = trained.kept[rewind_step]
        mask = prune_one(trained.params, mask)
        return start, mask, apply_mask(start, mask), trained.params, trained.measured

    def program(first: bool) -> Callable[..., tuple[Any, ...]]:
        of_round = functools.partial(one_round, first=first)
        return jax.jit(jax.vmap(of_round)) if lanes else of_round

    return _rounds(program(True), program(False) if rewind_step else None, params, mask, rounds)


def _check_kept(step: int, kept: Iterable[int]) -> None:
    if step not in kept:
        raise ValueError(f"rewind_step must be one of the steps that training keeps, {tuple(kept)}, got {step}")


def _rounds(first: Callable, others: Callable | None, start: optax.Params, mask: Mask, rounds: int) -> Iterator[Round]:
    for number in range(1, rounds + 1):
        of_round = first if number == 1 or others is None else others
        start, mask, *rest = of_round(start, mask)
        yield Round(number, mask, *rest)
