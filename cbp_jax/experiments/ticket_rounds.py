"""A round of lottery tickets and their controls in one lane: training under masks, pruning, and rewinding in one
program."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from cbp_jax import tickets
from cbp_jax.problems.sampling import passes
from cbp_jax.report.looks import INDIGO, LIME, PINK, SALMON, SLATE, TEAL, Look
from cbp_jax.training import Learner
from cbp_jax.training.learner import stream_keys
from cbp_jax.training.step import evaluate, learn

LOSS = "softmax_cross_entropy"
_CHUNK = 1000  # examples that are evaluated at once


class Kind(NamedTuple):
    """A kind of network to train in each round.

    Attributes:
      about: one line.
      look: in pictures.
      alone: whether its masks are independent of the ticket's.
    """

    about: str
    look: Look
    alone: bool = False


KINDS = {
    "ticket": Kind("iterative pruning, rewound to its first weights", Look("Ticket", INDIGO, strong=True), True),
    "late_rewinding": Kind("the same, rewound to its weights at rewind_step", Look("Late rewinding", LIME), True),
    "one_shot": Kind("the dense network pruned once, to the ticket's numbers per layer", Look("One-shot", SLATE)),
    "reinitialized": Kind("the ticket's mask, weights of another draw", Look("Reinitialized", PINK)),
    "random": Kind("the ticket's numbers per layer, anywhere; its first weights", Look("Random", SALMON)),
    "signs": Kind("the ticket's mask and signs, constant magnitudes", Look("Signs alone", TEAL)),
}


class Data(NamedTuple):
    """Examples, as stored."""

    train: tuple[chex.Array, chex.Array]  # images [n, ...], labels int32 [n]
    validation: tuple[chex.Array, chex.Array]
    test: tuple[chex.Array, chex.Array]


class State(NamedTuple):
    """State needed to resume one lane. Arrays [kinds, ...] have an entry for each kind of network."""

    starts: optax.Params  # [kinds, ...], initial weights of the next round, before the mask
    masks: tickets.Mask  # [kinds, ...]
    dense: optax.Params  # weights of the dense network after training, for one-shot pruning
    key: chex.Array  # raw key data of the seed, constant
    round: chex.Array  # int32 [], the next round


class Plan(NamedTuple):
    """The settings of a round."""

    kinds: tuple[str, ...]
    learner: Learner
    numbers: Mapping[str, float]  # of the learner
    prune: Callable[[optax.Params, tickets.Mask], tickets.Mask]
    full_mask: Callable[[optax.Params], tickets.Mask]
    scale: Callable[[chex.Array], chex.Array]  # maps stored images to the network's inputs
    iterations: int
    batch_size: int
    evaluate_every: int
    rewind_step: int
    together: bool  # whether kinds are trained in parallel (vmap) or in turn


def start(plan: Plan, seed: chex.Array) -> State:
    """Return the state of a lane before its first round. All networks are dense then."""
    key = jax.random.key_data(jax.random.key(seed))
    params = plan.learner.init(stream_keys(key).params)
    mask = plan.full_mask(params)
    starts = [_first(plan, kind, params, mask, key) for kind in plan.kinds]
    return State(_stack(starts), _stack([mask] * len(starts)), params, key, jnp.zeros([], jnp.int32))


def go_on(plan: Plan, data: Data, state: State) -> tuple[State, dict[str, chex.Array]]:
    """Train all kinds, prune, and rewind.

    Batches come in the same order in all rounds and kinds of a seed. Validation loss and test accuracy are measured at
    the start and after every `evaluate_every` iterations.

    Args:
      plan: what a round is.
      data: the examples.
      state: the lane's.

    Returns:
      the state; arrays [kinds]: `density`, `test_accuracy` after the last iteration, `stop_iteration`, that of minimum
      validation loss, `stop_test_accuracy` and `stop_validation_loss` there, and the mean training `loss`; and arrays
      [kinds, evaluations]: `validation_loss_at` and `test_accuracy_at`, NaN before the first iteration of a round.
    """
    keys = stream_keys(state.key)
    order = passes(jax.random.fold_in(keys.problem, 0), len(data.train[1]), plan.iterations * plan.batch_size)
    one = functools.partial(_train, plan, data, order, keys)
    over = jax.vmap if plan.together else lambda function: lambda *args: jax.lax.map(lambda row: function(*row), args)
    if "late_rewinding" in plan.kinds:
        first = [jnp.where(state.round == 0, 0, _rewound_to(plan, kind)) for kind in plan.kinds]
        trained, kept, curves, loss = over(one)(state.starts, state.masks, jnp.stack(first))
    else:  # all start from iteration 0, which is better a constant of the program
        trained, kept, curves, loss = over(functools.partial(one, first=0))(state.starts, state.masks)

    losses = curves["validation_loss_at"]
    stop = jnp.argmin(jnp.where(jnp.isnan(losses), jnp.inf, losses), 1)
    at_stop = lambda curve: jnp.take_along_axis(curve, stop[:, None], 1)[:, 0]
    measures = {
        "density": jax.vmap(tickets.density)(state.masks),
        "test_accuracy": curves["test_accuracy_at"][:, -1],
        "stop_iteration": (stop * plan.evaluate_every).astype(jnp.float32),
        "stop_test_accuracy": at_stop(curves["test_accuracy_at"]),
        "stop_validation_loss": at_stop(losses),
        "loss": loss,
        **curves,
    }
    return _prune_and_rewind(plan, state, trained, kept), measures


def _train(
    plan: Plan,
    data: Data,
    order: chex.Array,
    keys: Any,
    weights: optax.Params,
    mask: tickets.Mask,
    first: chex.Numeric,
) -> tuple[optax.Params, optax.Params, dict[str, chex.Array], chex.Array]:
    """Train one network from an iteration on. Returns weights at the end and at the rewind step, curves, and loss."""
    learner, every = plan.learner, plan.evaluate_every
    tx = tickets.masked(learner.optimizer(plan.numbers, keys.optimizer), mask)
    params = tickets.apply_mask(weights, mask)

    def step(carry, number):
        params, opt_state = carry
        chosen = jax.lax.dynamic_slice(order, (number * plan.batch_size,), (plan.batch_size,))
        batch = plan.scale(data.train[0][chosen]), data.train[1][chosen]
        key = jax.random.fold_in(keys.dropout, number)
        params, opt_state, found = learn(learner, tx, LOSS, params, opt_state, batch, key)
        return (params, opt_state), found["loss"]

    def record(curves, place, params):
        found = {
            "validation_loss_at": _evaluate(plan, params, data.validation)["loss"],
            "test_accuracy_at": _evaluate(plan, params, data.test)["accuracy"],
        }
        return {name: curve.at[place].set(found[name]) for name, curve in curves.items()}

    def part(number, carry):
        params, opt_state, kept, curves, total = carry
        kept = jax.tree.map(lambda new, old: jnp.where(number * every == plan.rewind_step, new, old), params, kept)
        carry, losses = jax.lax.scan(step, (params, opt_state), number * every + jnp.arange(every))
        return (*carry, kept, record(curves, number + 1, carry[0]), total + jnp.sum(losses))

    parts = plan.iterations // every
    empty = {name: jnp.full(parts + 1, jnp.nan) for name in ("validation_loss_at", "test_accuracy_at")}
    carry = (params, tx.init(params), params, record(empty, first // every, params), jnp.zeros([]))
    params, _, kept, curves, total = jax.lax.fori_loop(first // every, parts, part, carry)
    return params, kept, curves, total / (plan.iterations - first)


def _evaluate(plan: Plan, params: optax.Params, examples: tuple[chex.Array, chex.Array]) -> dict[str, chex.Array]:
    """Return the mean loss and accuracy, a thousand examples at a time."""
    count = len(examples[1])
    chunk = min(count, _CHUNK)

    def sums(first, size):
        images, labels = (jax.lax.dynamic_slice_in_dim(array, first, size) for array in examples)
        found = evaluate(plan.learner, LOSS, params, (plan.scale(images), labels))
        return {name: size * value for name, value in found.items()}

    add = lambda a, b: jax.tree.map(jnp.add, a, b)
    totals = {"loss": jnp.zeros([]), "accuracy": jnp.zeros([])}
    totals = jax.lax.fori_loop(0, count // chunk, lambda n, totals: add(totals, sums(n * chunk, chunk)), totals)
    if count % chunk:
        totals = add(totals, sums(count - count % chunk, count % chunk))
    return {name: total / count for name, total in totals.items()}


def _prune_and_rewind(plan: Plan, state: State, trained: optax.Params, kept: optax.Params) -> State:
    """Return the masks and weights of the next round."""
    at = lambda tree, kind: jax.tree.map(lambda leaf: leaf[plan.kinds.index(kind)], tree)
    keys, is_first = stream_keys(state.key), state.round == 0
    pruned = {kind: plan.prune(at(trained, kind), at(state.masks, kind)) for kind in plan.kinds if KINDS[kind].alone}
    dense = state.dense
    if "one_shot" in plan.kinds:
        dense = jax.tree.map(lambda new, old: jnp.where(is_first, new, old), at(trained, "one_shot"), dense)

    def next_mask(kind):
        if kind in pruned:
            return pruned[kind]
        if kind == "one_shot":
            return tickets.mask_like(dense, pruned["ticket"])
        if kind == "random":
            key = jax.random.fold_in(jax.random.fold_in(keys.problem, 1), state.round)
            return tickets.random_mask_like(pruned["ticket"], key)
        return pruned["ticket"]

    def next_start(kind):
        weights = at(state.starts, kind)
        if kind == "late_rewinding":
            return jax.tree.map(lambda new, old: jnp.where(is_first, new, old), at(kept, kind), weights)
        return _fresh(plan, state.key, state.round + 1) if kind == "reinitialized" else weights

    return state._replace(
        starts=_stack([next_start(kind) for kind in plan.kinds]),
        masks=_stack([next_mask(kind) for kind in plan.kinds]),
        dense=dense,
        round=state.round + 1,
    )


def _first(plan: Plan, kind: str, params: optax.Params, mask: tickets.Mask, key: chex.Array) -> optax.Params:
    """Return the weights of a kind in the first round."""
    if kind == "reinitialized":
        return _fresh(plan, key, 0)
    return tickets.constant_magnitudes(params, mask) if kind == "signs" else params


def _fresh(plan: Plan, key: chex.Array, round: chex.Numeric) -> optax.Params:
    return plan.learner.init(jax.random.fold_in(jax.random.fold_in(stream_keys(key).params, 1), round))


def _rewound_to(plan: Plan, kind: str) -> int:
    return plan.rewind_step if kind == "late_rewinding" else 0


def _stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
