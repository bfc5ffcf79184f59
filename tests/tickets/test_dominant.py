import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cbp_jax
from cbp_jax.tickets import Ticket, dominant, dominant_ticket, masked_changes, transplant

RNG = np.random.default_rng(0)
SHAPES = {
    "attention": {"query": {"kernel": (6, 2, 4), "bias": (2, 4)}, "out": {"kernel": (2, 4, 6)}},
    "conv": {"kernel": (3, 2, 4)},
    "dense": {"kernel": (5, 7), "bias": (7,)},
}
is_shape = lambda node: isinstance(node, tuple)
draw = lambda: jax.tree.map(lambda shape: jnp.asarray(RNG.normal(size=shape), jnp.float32), SHAPES, is_leaf=is_shape)
INITIAL, TUNED = draw(), draw()
CHANGE = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)), INITIAL, TUNED)
COUNT = sum(leaf.size for leaf in jax.tree.leaves(CHANGE))


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_all_changes_above_a_threshold():
    ticket = dominant_ticket(INITIAL, TUNED, threshold=1.0)
    np.testing.assert_array_equal(flat(ticket.mask), flat(CHANGE) > 1.0)
    assert isinstance(ticket, Ticket) and ticket.density == (flat(CHANGE) > 1.0).mean()
    assert jax.tree.structure(ticket.mask) == jax.tree.structure(INITIAL)
    # A change equal to the threshold is not above it; a weight that did not change is never in a ticket.
    assert dominant_ticket({"w": jnp.zeros(3)}, {"w": jnp.arange(3.0)}, threshold=1).mask["w"].tolist() == [0, 0, 1]
    assert dominant_ticket(INITIAL, INITIAL, threshold=0.0).density == 0


def test_tickets_nest():
    by_threshold = [flat(dominant_ticket(INITIAL, TUNED, threshold=t).mask) for t in (0.0, 0.5, 1.0, 9.0)]
    by_count = [flat(dominant_ticket(INITIAL, TUNED, keep=n).mask) for n in (COUNT, 80, 20, 0)]
    by_fraction = [flat(dominant_ticket(INITIAL, TUNED, keep=f).mask) for f in (1.0, 0.5, 0.01, 0.0)]
    by_rows = [flat(dominant_ticket(INITIAL, TUNED, dimensions=k, axis="both").mask) for k in (9, 3, 1, 0)]
    for masks in (by_threshold, by_count, by_fraction, by_rows):
        sizes = [mask.sum() for mask in masks]
        assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
        for larger, smaller in itertools.pairwise(masks):
            assert (larger | ~smaller).all()


@pytest.mark.parametrize("keep", [0, 1, 7, 20, COUNT, 0.0, 0.05, 0.33, 1.0])
def test_counts_are_exact_under_ties(keep):
    count = keep if isinstance(keep, int) else round(keep * COUNT)
    steps = jax.tree.map(lambda w: w + np.arange(w.size).reshape(w.shape) % 3, jax.tree.map(jnp.zeros_like, INITIAL))
    changes = flat(steps)
    mask = flat(dominant_ticket(jax.tree.map(jnp.zeros_like, INITIAL), steps, keep=keep).mask)
    order = np.argsort(-changes, kind="stable")[:count]  # the largest; among equal ones the first
    assert np.flatnonzero(mask).tolist() == sorted(order.tolist())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_fewest_changes_are_kept_exactly_among_many_equal_ones(dtype):
    values = np.abs(np.concatenate([RNG.normal(size=300), np.zeros(200), np.full(100, 0.25), [np.inf, 1e-45]]))
    values = values.astype(dtype)
    ordered = np.sort(values)[::-1]
    for k in (1, 2, 150, 250, 300, 401, 402, 403, 600, values.size):
        assert dominant._kth_largest(values, k) == ordered[k - 1]


def numpy_lines(matrix, count, side):
    sums = matrix.sum(1 if side == "row" else 0)
    lines = np.zeros(matrix.shape, bool)
    for line in sorted(range(len(sums)), key=lambda n: (-sums[n], n))[:count]:
        lines[(line, slice(None)) if side == "row" else (slice(None), line)] = True
    return lines


@pytest.mark.parametrize("axis", ["row", "column", "both"])
def test_rows_and_columns_of_largest_change(axis):
    """In attention, a row is a dimension of the stream and a column one of a head, or the other way around."""
    ticket = dominant_ticket(INITIAL, TUNED, dimensions=2, axis=axis)
    matrices = {
        "attention/query/kernel": (CHANGE["attention"]["query"]["kernel"], (6, 8)),
        "attention/out/kernel": (CHANGE["attention"]["out"]["kernel"], (8, 6)),
        "conv/kernel": (CHANGE["conv"]["kernel"], (6, 4)),
        "dense/kernel": (CHANGE["dense"]["kernel"], (5, 7)),
    }
    assert ticket.dimensions.keys() == matrices.keys()
    masks = cbp_jax.units.leaves_by_path(ticket.mask)
    for path, (change, shape) in matrices.items():
        sides = ("row", "column") if axis == "both" else (axis,)
        expected = np.any([numpy_lines(change.reshape(shape), 2, side) for side in sides], 0)
        np.testing.assert_array_equal(np.asarray(masks[path]).reshape(shape), expected)
        if axis == "row":
            assert ticket.dimensions[path].tolist() == np.flatnonzero(expected.all(1)).tolist()
        if axis == "column":
            assert ticket.dimensions[path].tolist() == np.flatnonzero(expected.all(0)).tolist()
    assert not ticket.mask["dense"]["bias"].any() and not ticket.mask["attention"]["query"]["bias"].any()


def test_equal_rows_are_chosen_in_order():
    zeros, ones = {"w": jnp.zeros((5, 2))}, {"w": jnp.ones((5, 2))}
    assert dominant_ticket(zeros, ones, dimensions=2).dimensions["w"].tolist() == [0, 1]
    assert dominant_ticket(zeros, ones, dimensions=9).density == 1


def test_dimensions_in_which_a_ticket_has_weights():
    tuned = {"w": jnp.zeros((4, 3)).at[2, 1].set(1.0).at[0, 1].set(-2.0)}
    for axis, expected in (("row", [0, 2]), ("column", [1])):
        assert (
            dominant_ticket({"w": jnp.zeros((4, 3))}, tuned, threshold=0.5, axis=axis).dimensions["w"].tolist()
            == expected
        )
    both = dominant_ticket({"w": jnp.zeros((4, 3))}, tuned, keep=1, axis="both").dimensions["w"]
    assert both["row"].tolist() == [0] and both["column"].tolist() == [1]


def test_transplants():
    full = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), INITIAL)
    jax.tree.map(np.testing.assert_array_equal, transplant(INITIAL, TUNED, full), TUNED)
    none = jax.tree.map(jnp.logical_not, full)
    jax.tree.map(np.testing.assert_array_equal, transplant(INITIAL, TUNED, none), INITIAL)
    ticket = dominant_ticket(INITIAL, TUNED, keep=0.2)
    made = jax.jit(transplant)(INITIAL, TUNED, ticket.mask)
    expected = jax.tree.map(lambda m, t, i: np.where(m, t, i), ticket.mask, TUNED, INITIAL)
    jax.tree.map(np.testing.assert_array_equal, made, expected)
    jax.tree.map(np.testing.assert_array_equal, transplant(INITIAL, TUNED, ticket), expected)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(transplant)(INITIAL, TUNED, ticket), expected)


def test_only_the_ticket_is_trained():
    """Gradient descent changes only the ticket's weights, from the start or from a tuned network."""
    mask = dominant_ticket(INITIAL, TUNED, keep=0.3).mask
    loss = lambda params: sum(jnp.square(leaf - 3).sum() for leaf in jax.tree.leaves(params))
    tx = masked_changes(optax.adam(0.1), mask, INITIAL)

    @jax.jit
    def train(params):
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    params, state = train(INITIAL)
    moved = flat(params) != flat(INITIAL)
    np.testing.assert_array_equal(moved, flat(mask))
    assert not flat(state[0].mu)[~moved].any()
    from_tuned, _ = train(TUNED)
    np.testing.assert_allclose(flat(from_tuned)[~moved], flat(INITIAL)[~moved], rtol=1e-6)
    with pytest.raises(ValueError, match="masked_changes needs the params"):
        tx.update(INITIAL, state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of threshold, keep and dimensions must be given"),
        ({"keep": 0.1, "threshold": 0.1}, "exactly one of"),
        ({"threshold": -1.0}, "threshold must be a number of at least 0, got -1.0"),
        ({"threshold": float("nan")}, "threshold must be a number of at least 0, got nan"),
        ({"keep": "1"}, "keep must be a number of at least 0, got '1'"),
        ({"dimensions": float("inf")}, "dimensions must be a number of rows or columns, got inf"),
        ({"keep": 1.5}, r"keep must be a count up to 170, or a fraction in \[0, 1\], got 1.5"),
        ({"keep": 1000}, "keep must be a count up to 170"),
        ({"keep": -1}, "got -1"),
        ({"dimensions": -1}, "dimensions must be a number of rows or columns, got -1"),
        ({"dimensions": 1.5}, "dimensions must be a number"),
        ({"keep": 1, "axis": "diagonal"}, "axis must be 'row', 'column' or 'both', got 'diagonal'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        dominant_ticket(INITIAL, TUNED, **settings)


def test_masks_and_params_that_do_not_fit():
    initial, tuned, mask = {"w": jnp.zeros(2)}, {"w": jnp.ones(2)}, {"w": jnp.array([True, False])}
    for bad, message in (
        ({"w": jnp.array([0.5, 0.0])}, "mask must be a tree of bool arrays"),
        ({"w": mask["w"][:1]}, "of its shape"),
    ):
        with pytest.raises(ValueError, match=message):
            transplant(initial, tuned, bad)
        with pytest.raises(ValueError, match=message):
            masked_changes(optax.sgd(0.1), bad, initial)
    with pytest.raises(ValueError, match="tuned must have the leaves of initial"):
        transplant(initial, {"v": jnp.ones(2)}, mask)
    tx = masked_changes(optax.sgd(0.1), mask, initial)
    for params, message in (({"v": jnp.ones(2)}, "'v' .* got nothing"), ({"w": jnp.ones(3)}, r"got the shape \(2,\)")):
        with pytest.raises(ValueError, match=message):
            tx.update(params, tx.init(params), params)


def test_bad_trees():
    with pytest.raises(ValueError, match=r"initial must have weights, got \{\}"):
        dominant_ticket({}, {}, keep=0)
    with pytest.raises(
        ValueError, match=r"tuned must have the leaves of initial, \{'w': \(2,\)\}, got \{'w': \(3,\)\}"
    ):
        dominant_ticket({"w": jnp.ones(2)}, {"w": jnp.ones(3)}, keep=1)
    with pytest.raises(ValueError, match="tuned: some changes of 'w' are not a number"):
        dominant_ticket({"w": jnp.ones(2)}, {"w": jnp.array([1.0, jnp.nan])}, keep=1)
