import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import cbp_jax
from cbp_jax.tickets import apply_mask, density, full_mask, overlap, prune, random_mask_like
from cbp_jax.units.groups import leaves_by_path

PARAMS = {
    "embedding": jnp.arange(12.0).reshape(6, 2) + 1,
    "dense": {"kernel": jnp.ones((2, 5)), "bias": jnp.ones(5)},
    "norm": {"scale": jnp.ones(5)},
    "out": {"kernel": jnp.ones((5, 3)), "bias": jnp.ones(3)},
}


def random_mask(seed, share=0.5):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda w: jnp.asarray(rng.random(w.shape) < share) | (w.ndim < 2), PARAMS)


def test_the_package_is_public():
    assert cbp_jax.tickets.full_mask is full_mask


def test_a_full_mask_is_all_true_and_of_the_params_structure():
    mask = full_mask(PARAMS)
    assert jax.tree.structure(mask) == jax.tree.structure(PARAMS)
    for leaf, param in zip(jax.tree.leaves(mask), jax.tree.leaves(PARAMS), strict=True):
        assert leaf.shape == param.shape and leaf.dtype == bool and leaf.all()
    assert density(mask) == 1


@pytest.mark.parametrize(
    "select",
    [
        lambda path, leaf: path != "embedding",
        lambda path, leaf: leaf.shape != (6, 2),
        ["dense", "out/kernel"],
        ["*kernel"],
        "*/kernel",
    ],
)
def test_arrays_that_are_not_selected_are_not_pruned(select):
    mask = full_mask(PARAMS, select)
    for _ in range(3):
        mask = prune(PARAMS, mask, 0.5)
    assert mask["embedding"].all() and mask["dense"]["bias"].all() and mask["norm"]["scale"].all()
    # 10, 5, 3, 1 and 15, 7, 3, 1 are left: half of a weight is rounded to even.
    assert density(mask) == np.float32(2 / 25)
    assert (apply_mask(PARAMS, mask)["embedding"] == PARAMS["embedding"]).all()
    other = random_mask_like(mask, 0)
    assert other["embedding"].all() and density(other) == density(mask)


def test_masks_of_an_nnx_state():
    state = nnx.state(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Param)
    mask = prune(state, full_mask(state, "kernel"), 0.25)
    assert {path: int(leaf.sum()) for path, leaf in leaves_by_path(mask).items()} == {"bias": 3, "kernel": 9}
    assert int((leaves_by_path(apply_mask(state, mask))["kernel"] == 0).sum()) == 3


def test_apply_mask_keeps_dtypes_and_living_weights_that_are_not_finite():
    params = {"w": jnp.array([[jnp.inf, jnp.nan], [-2.0, 3.0]], jnp.bfloat16), "n": jnp.arange(3)}
    mask = {"w": jnp.array([[False, False], [True, False]]), "n": jnp.array([True, False, True])}
    found = apply_mask(params, mask)
    assert found["w"].dtype == jnp.bfloat16 and found["w"].tolist() == [[0, 0], [-2, 0]]
    assert found["n"].dtype == jnp.int32 and found["n"].tolist() == [0, 0, 2]
    tuples = apply_mask((jnp.ones((1, 2)),), [jnp.array([[True, False]])])  # containers may differ
    assert isinstance(tuples, tuple) and tuples[0].tolist() == [[1, 0]]


def test_density_counts_only_kernels():
    mask = random_mask(0)
    kernels = [leaf for leaf in jax.tree.leaves(mask) if leaf.ndim >= 2]
    living, total = sum(int(leaf.sum()) for leaf in kernels), sum(leaf.size for leaf in kernels)
    assert float(jax.jit(density)(mask)) == pytest.approx(living / total)


@given(seeds=st.tuples(st.integers(0, 50), st.integers(0, 50)), shares=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_overlap_is_jaccard(seeds, shares):
    a, b = (random_mask(seed, share) for seed, share in zip(seeds, shares, strict=True))
    flat = lambda mask: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(mask) if leaf.ndim >= 2])
    both, either = (flat(a) & flat(b)).sum(), (flat(a) | flat(b)).sum()
    found = overlap(a, b)
    np.testing.assert_allclose(found.jaccard, both / either if either else 1, rtol=1e-6)
    assert overlap(a, a).jaccard == 1
    assert 0 <= found.chance <= 1


@pytest.mark.slow
def test_overlap_by_chance_is_that_of_random_masks():
    big = {"a": jnp.ones((40, 50)), "b": jnp.ones((30, 20)), "c": jnp.ones(30)}
    mask = prune(big, full_mask(big), 0.7, rates={"b": 0.5})
    keys = jax.random.split(jax.random.key(0), 40)
    first, second = (jax.vmap(lambda key: random_mask_like(mask, key))(half) for half in (keys[:20], keys[20:]))
    found = jax.vmap(overlap)(first, second)
    assert abs(float(found.jaccard.mean() - found.chance[0])) < 0.01
    assert overlap(mask, mask).chance == found.chance[0]


def test_random_masks():
    mask = random_mask(3)
    draw = jax.jit(random_mask_like)
    keys = jax.random.split(jax.random.key(0), 300)
    drawn = jax.vmap(draw, (None, 0))(mask, keys)
    counts = lambda tree, axes: jax.tree.map(lambda leaf: leaf.sum(axes(leaf)), tree)
    per_leaf = counts(drawn, lambda leaf: tuple(range(1, leaf.ndim)))
    expected = counts(mask, lambda leaf: None)
    assert jax.tree.all(jax.tree.map(lambda n, m: bool((n == m).all()), per_leaf, expected))
    for leaf, one in zip(jax.tree.leaves(drawn), jax.tree.leaves(mask), strict=True):
        np.testing.assert_allclose(leaf.mean(0), one.mean(), atol=0.12)  # every weight as often as any other
    alone = draw(mask, keys[7])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[7], b), drawn, alone)
    again = draw(mask, keys[7])
    jax.tree.map(np.testing.assert_array_equal, alone, again)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"w": jnp.ones((2, 2))}, "mask must be a tree of bool arrays"),
        ({}, "mask must be a tree of bool arrays"),
        ({"v": jnp.ones((2, 2), bool)}, r"nothing for \['w'\], and \['v'\] are not in the params"),
        ({"w": jnp.ones((2, 2), bool), "v": jnp.ones(1, bool)}, r"nothing for \[\], and \['v'\] are not in the params"),
        ({"w": jnp.ones((2, 3), bool)}, r"mask of 'w' must be of its shape \(2, 2\)"),
        ({"w": jnp.ones((1, 1), bool)}, r"mask of 'w' must be of its shape \(2, 2\)"),
    ],
)
def test_masks_that_do_not_fit_the_params(mask, message):
    params = {"w": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match=message):
        apply_mask(params, mask)
    with pytest.raises(ValueError, match=message):
        prune(params, mask, 0.5)


def test_bad_input():
    with pytest.raises(ValueError, match=r"select has the pattern 'nothing', which matches none of \['dense/kernel'"):
        full_mask(PARAMS, ["dense", "nothing"])
    with pytest.raises(ValueError, match="select leaves nothing to prune"):
        full_mask(PARAMS, lambda path, leaf: False)
    with pytest.raises(ValueError, match="select leaves nothing to prune"):
        full_mask({"b": jnp.ones(3)})
    with pytest.raises(ValueError, match="mask must have arrays of at least two axes"):
        density({"b": jnp.ones(3, bool)})
    with pytest.raises(ValueError, match="mask must be a tree of bool arrays"):
        density({"w": jnp.ones((3, 3))})
    with pytest.raises(ValueError, match="mask_b must be of the structure and shapes of mask_a"):
        overlap(full_mask(PARAMS), full_mask(PARAMS, "out"))
    with pytest.raises(TypeError, match="key must be"):
        random_mask_like(full_mask(PARAMS), 0.5)
