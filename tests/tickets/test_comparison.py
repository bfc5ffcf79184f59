import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbp_jax.tickets import compare_tickets, dominant_ticket

RNG = np.random.default_rng(0)
SHAPES = {
    "attention": {"query": {"kernel": (6, 2, 4)}, "out": {"kernel": (2, 4, 6)}},
    "dense": {"kernel": (5, 7), "bias": (7,)},
}
is_shape = lambda node: isinstance(node, tuple)
draw = lambda: jax.tree.map(lambda shape: jnp.asarray(RNG.normal(size=shape), jnp.float32), SHAPES, is_leaf=is_shape)
COUNT = 48 + 48 + 35 + 7


def test_overlap_and_its_value_by_chance():
    """Compare with means over masks shuffled anywhere, and over masks with rows and columns shuffled as a whole."""
    a = RNG.random((30, 20)) < RNG.random((30, 1)) * 0.4
    b = RNG.random((30, 20)) < RNG.random((1, 20)) * 0.4
    found = compare_tickets({"w": a}, {"w": b})["w"]
    assert (found.shared, found.sizes, found.entries) == ((a & b).sum(), (a.sum(), b.sum()), 600)
    assert found.jaccard == (a & b).sum() / (a | b).sum()
    shuffled = [np.sum(RNG.permutation(a.ravel()) & b.ravel()) for _ in range(2000)]
    np.testing.assert_allclose(found.by_size, np.mean(shuffled), rtol=0.02)
    chance = np.outer(a.sum(1), a.sum(0)) / a.sum()
    drawn = [np.sum((RNG.random(a.shape) < chance) & b) for _ in range(2000)]
    np.testing.assert_allclose(found.by_marginals, np.mean(drawn), rtol=0.05)
    # Two tickets in the same rows share more than expected from their sizes, but no more than from their marginals.
    rows = np.zeros((30, 20), bool)
    rows[:3] = True
    same = compare_tickets({"w": rows}, {"w": rows})["w"]
    assert (same.shared, same.by_size, round(same.by_marginals, 6)) == (60, 6.0, 60.0)


def test_overlap_by_layer():
    tickets = [dominant_ticket(draw(), draw(), keep=share) for share in (0.3, 0.1)]
    leaves = compare_tickets(*tickets)
    layers = compare_tickets(*tickets, by=lambda path: path.split("/")[0])
    assert layers.keys() == {"attention", "dense"} and len(leaves) == 4
    of_attention = [found for path, found in leaves.items() if path.startswith("attention")]
    assert layers["attention"].shared == sum(found.shared for found in of_attention)
    np.testing.assert_allclose(layers["attention"].by_size, sum(found.by_size for found in of_attention))
    (total,) = compare_tickets(*tickets, by=lambda path: "").values()
    assert total.sizes == (round(0.3 * COUNT), round(0.1 * COUNT)) and total.entries == COUNT
    empty = compare_tickets({"w": np.zeros((2, 2), bool)}, {"w": np.zeros((2, 2), bool)})["w"]
    assert empty.jaccard == empty.by_marginals == 0
    with pytest.raises(ValueError, match="a and b must be tickets of the same params"):
        compare_tickets({"w": np.ones(2, bool)}, {"w": np.ones(3, bool)})
