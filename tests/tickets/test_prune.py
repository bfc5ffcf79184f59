import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cbp_jax.tickets import density, full_mask, mask_like, prune, ranking
from cbp_jax.tickets.prune import rounded_count
from cbp_jax.units.groups import leaves_by_path

SHAPES = {"conv": (3, 3, 2, 4), "dense": (5, 7), "bias": (4,), "out": (7, 3)}
KERNELS = [name for name, shape in SHAPES.items() if len(shape) >= 2]


def numpy_prune(params, mask, fraction, scope="layer", rates=None, score=None):
    """Prune by a stable sort of (score, position), leaf by leaf or over all kernels with the same factor."""
    names = [name for name in sorted(params) if np.ndim(params[name]) >= 2]
    factor = {name: (rates or {}).get(name, 1.0) for name in names}
    pools = {}
    for name in names:
        pools.setdefault(factor[name] if scope == "global" else name, []).append(name)
    new = {name: np.array(mask[name]) for name in mask}
    for pool in pools.values():
        entries = [
            (float(score[name][place]) if score else abs(float(params[name][place])), pool.index(name), place)
            for name in pool
            for place in np.ndindex(params[name].shape)
            if mask[name][place]
        ]
        for _, number, place in sorted(entries)[: round(fraction * factor[pool[0]] * len(entries))]:
            new[pool[number]][place] = False
    return new


def random_tree(seed, values):
    """Draw weights with many ties and zeros."""
    rng = np.random.default_rng(seed)
    return {name: rng.choice(np.asarray(values, np.float32), shape) for name, shape in SHAPES.items()}


def random_mask(seed, share):
    rng = np.random.default_rng(seed + 1000)
    return {name: (rng.random(shape) < share) | (len(shape) < 2) for name, shape in SHAPES.items()}


def assert_same(actual, expected):
    assert sorted(actual) == sorted(expected)
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


@functools.cache
def compiled(fraction, scope, rated):
    rates = {"out": 0.5} if rated else None
    return jax.jit(lambda params, mask: prune(params, mask, fraction, scope=scope, rates=rates))


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    values=st.sampled_from([(0.0, -0.0, 1.0, -1.0), (0.0,), (-3.0, 0.5, 2.0, 1e-30), tuple(np.linspace(-1, 1, 999))]),
    share=st.sampled_from([1.0, 0.7, 0.3]),
    fraction=st.sampled_from([0.0, 0.2, 0.3, 0.5, 0.9]),
    scope=st.sampled_from(["layer", "global"]),
    rated=st.booleans(),
)
def test_against_numpy(seed, values, share, fraction, scope, rated):
    params, mask = random_tree(seed, values), random_mask(seed, share)
    assume(all(mask[name].any() for name in KERNELS))
    found = compiled(fraction, scope, rated)(params, mask)
    assert_same(found, numpy_prune(params, mask, fraction, scope, {"out": 0.5} if rated else None))
    assert found["bias"].all()
    assert all((found[name] <= mask[name]).all() for name in SHAPES)  # nothing comes back to life


@settings(max_examples=25)
@given(data=st.data())
def test_random_trees(data):
    """For any tree, shapes, dtypes, fraction and scores: counts, nesting and order are right."""
    # There are few shapes, because each one is compiled.
    shape = st.sampled_from([(), (3,), (1, 1), (4, 3), (2, 3, 2)])
    shapes = data.draw(st.lists(shape, min_size=1, max_size=3))
    assume(any(len(shape) >= 2 for shape in shapes))
    dtype = data.draw(st.sampled_from([np.float32, jnp.bfloat16, np.int32]))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    tree = [rng.integers(-3, 4, shape).astype(dtype) for shape in shapes]
    params = {"layers": tuple(tree[1:]), "first": tree[0]}
    fraction = data.draw(st.floats(0, 0.99, allow_subnormal=False))
    scope = data.draw(st.sampled_from(["layer", "global"]))
    mask = full_mask(params)
    for _ in range(2):
        kernels = [leaf for leaf in leaves_by_path(mask).values() if leaf.ndim >= 2]
        assume(fraction == 0 or all(leaf.any() for leaf in kernels))
        alive = [int(leaf.sum()) for leaf in kernels]
        new = prune(params, mask, fraction, scope=scope)
        assert jax.tree.structure(new) == jax.tree.structure(params)
        left = [int(leaf.sum()) for leaf in leaves_by_path(new).values() if leaf.ndim >= 2]
        if scope == "layer":
            assert left == [n - round(fraction * n) for n in alive]
        else:
            assert sum(left) == sum(alive) - round(fraction * sum(alive))
        size, old, kept = (leaves_by_path(each) for each in (params, mask, new))
        size = {path: np.abs(np.asarray(leaf, np.float64)) for path, leaf in size.items()}
        assert all((kept[path] <= old[path]).all() for path in size)
        groups = [[path] for path in size] if scope == "layer" else [list(size)]
        for paths in groups:
            died = np.concatenate([size[path][np.asarray(old[path] & ~kept[path])] for path in paths])
            lives = np.concatenate(
                [size[path][np.asarray(kept[path])] for path in paths if size[path].ndim >= 2] or [[]]
            )
            assert not died.size or not lives.size or died.max() <= lives.min()
        mask = new


@settings(max_examples=200)
@given(alive=st.integers(1, 3000), fraction=st.one_of(st.floats(0, 0.999), st.integers(0, 99).map(lambda n: n / 100)))
def test_counts_equal_those_of_python(alive, fraction):
    """This includes halves: 0.3 * 5 is 1.5 in float64, which rounds to 2."""
    assert int(rounded_count(fraction, jnp.int32(alive))) == round(fraction * alive)


def test_counts_of_many_weights():
    for alive in (2**24 + 1, 30_000_001, 2**31 - 1):
        for fraction in (0.1, 1 / 3, 0.5, 0.999999):
            assert int(rounded_count(fraction, jnp.int32(alive))) == round(fraction * alive)


def test_ties_are_pruned_by_position_and_dead_weights_do_not_count():
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 2))}
    mask = {"a": jnp.array([[False, True, True], [True, True, True]]), "b": jnp.ones((2, 2), bool)}
    found = prune(params, mask, 0.4)
    assert found["a"].tolist() == [[False, False, False], [True, True, True]]
    assert found["b"].tolist() == [[False, False], [True, True]]
    found = prune(params, mask, 0.7, scope="global")  # round(0.7 * 9) = 6 of 9
    assert found["a"].tolist() == [[False, False, False], [False, False, False]]
    assert found["b"].tolist() == [[False, True], [True, True]]


def test_dead_weights_of_any_size_stay_dead_and_are_not_counted():
    params = {"w": jnp.array([[0.0, 9.0, 1.0, 2.0, jnp.nan, 3.0]])}
    mask = {"w": jnp.array([[False, False, True, True, True, True]])}
    assert prune(params, mask, 0.5)["w"].tolist() == [[False, False, False, False, True, True]]
    assert prune(params, mask, 0.75)["w"].tolist() == [[False, False, False, False, True, False]]  # NaN counts as inf


@pytest.mark.slow
def test_rates_of_the_paper():
    """LeNet-300-100: 20% per round, 10% of the output layer, and the densities of the paper's figures."""
    rng = np.random.default_rng(0)
    params = {"params": {f"Dense_{n}": {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)}
              for n, shape in enumerate([(784, 300), (300, 100), (100, 10)])}}  # fmt: skip
    mask = full_mask(params)
    step = jax.jit(lambda mask: prune(params, mask, 0.2, rates={"*Dense_2": 0.5}))
    alive = {"Dense_0": 235_200, "Dense_1": 30_000, "Dense_2": 1000}
    densities = []
    for _ in range(18):
        mask = step(mask)
        alive = {name: n - round((0.1 if name == "Dense_2" else 0.2) * n) for name, n in alive.items()}
        assert {name: int(layer["kernel"].sum()) for name, layer in mask["params"].items()} == alive
        densities.append(round(100 * float(density(mask)), 1))
    assert (
        densities[:3] == [80.0, 64.1, 51.3] and densities[6] == 21.1 and densities[16] == 2.3
    )  # the paper: 51.3, 21.1


def test_rates_are_by_pattern_of_a_layer_or_a_kernel():
    params = {"net": {"a": {"w": jnp.arange(10.0).reshape(2, 5)}, "b": {"w": jnp.arange(10.0).reshape(2, 5)}}}
    mask = full_mask(params)
    left = lambda **more: [int(leaf.sum()) for leaf in jax.tree.leaves(prune(params, mask, 0.4, **more))]
    assert left() == [6, 6]
    for pattern in ("net/b", "net/b/w", "*b*", "net/[b]"):
        assert left(rates={pattern: 0.5}) == [6, 8]
    assert left(rates={"net": 2.0, "net/b": 0.0}) == [2, 10]  # the last that matches
    assert left(rates={"net/b": 0.0, "net": 2.0}) == [2, 2]
    # Kernels with the same factor are compared with each other.
    assert left(rates={"net/b": 0.5}, scope="global") == [6, 8]
    assert left(rates={"net/b": 0.0}, scope="global") == [6, 10]


def test_scores():
    params = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3)}
    mask = full_mask(params)
    grads = jax.tree.map(lambda w: 1 / (1 + w), params)
    by_tree = prune(params, mask, 0.5, score=grads)
    assert by_tree["a"].tolist() == [[True, True, True], [False, False, False]] and by_tree["b"].all()
    seen = []
    by_function = prune(params, mask, 0.5, score=lambda path, w: seen.append(path) or -w)
    assert by_function["a"].tolist() == by_tree["a"].tolist() and seen == ["a"]
    whole = prune(params, mask, 0.5, score=lambda path, w: jnp.array([[5, -(2**31), 3], [2**31 - 1, 2**24 + 1, 2**24]]))
    assert whole["a"].tolist() == [[False, False, False], [True, True, True]]


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int16, jnp.int32, jnp.uint32, jnp.float16, jnp.bfloat16, bool])
def test_scores_of_any_dtype(dtype):
    values = np.random.default_rng(0).integers(0, 2 if dtype is bool else 100, 50)
    if jnp.issubdtype(dtype, jnp.signedinteger) or jnp.issubdtype(dtype, jnp.floating):
        values = values - 50
    score = jnp.asarray(values, dtype).reshape(5, 10)
    (left,) = ranking.without_least([score], [jnp.ones((5, 10), bool)], 20)
    expected = np.ones(50, bool)
    expected[np.argsort(np.asarray(score, np.float64).ravel(), kind="stable")[:20]] = False
    np.testing.assert_array_equal(np.ravel(left), expected)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_vmap_over_params_masks_and_fractions(scope):
    params = [random_tree(seed, np.linspace(-1, 1, 99)) for seed in range(3)]
    masks = [random_mask(seed, 0.6) for seed in range(3)]
    stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    one = functools.partial(prune, scope=scope, rates={"out": 0.5})
    fractions = jnp.array([0.25, 0.5, 0.75])
    together = jax.jit(jax.vmap(one))(stack(params), stack(masks), fractions)
    for i in range(3):
        expected = numpy_prune(params[i], masks[i], 0.25 * (i + 1), scope, {"out": 0.5})
        assert_same(jax.tree.map(lambda leaf, i=i: leaf[i], together), expected)


def test_masks_nest_in_a_scan():
    params = random_tree(0, np.linspace(-1, 1, 999))

    def step(mask, key):
        weights = jax.tree.map(lambda w: w * jax.random.normal(key, w.shape), params)
        mask = prune(weights, mask, 0.2)
        return mask, mask

    _, masks = jax.lax.scan(step, full_mask(params), jax.random.split(jax.random.key(0), 6))
    for name in KERNELS:
        alive = params[name].size
        before = np.ones(params[name].shape, bool)
        for mask in np.asarray(masks[name]):
            alive -= round(0.2 * alive)
            assert mask.sum() == alive and (mask <= before).all()
            before = mask


def test_one_shot_to_the_densities_of_another_mask():
    params, mask = random_tree(0, np.linspace(-1, 1, 99)), random_mask(0, 0.3)
    found = jax.jit(mask_like)(params, mask)
    for name in KERNELS:
        size, dead = np.abs(params[name]).ravel(), int((~mask[name]).sum())
        expected = np.ones(size.size, bool)
        expected[np.argsort(size, kind="stable")[:dead]] = False
        np.testing.assert_array_equal(found[name].ravel(), expected)
    assert found["bias"].all()
    largest = mask_like(params, mask, score=lambda path, w: -jnp.abs(w))
    assert all(largest[name].sum() == mask[name].sum() for name in KERNELS) and (largest["out"] != found["out"]).any()


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5, np.nan])
def test_fractions_out_of_range(fraction):
    params = {"w": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\)"):
        prune(params, full_mask(params), fraction)


def test_bad_input():
    params = {"w": jnp.ones((2, 2)), "v": jnp.ones((2, 2)), "b": jnp.ones(2)}
    mask = full_mask(params)
    with pytest.raises(ValueError, match="scope must be 'layer' or 'global', got 'local'"):
        prune(params, mask, 0.5, scope="local")
    for pattern in ("x", "b"):
        with pytest.raises(ValueError, match=f"rates has the pattern '{pattern}', which matches none of"):
            prune(params, mask, 0.5, rates={pattern: 0.5})
    with pytest.raises(ValueError, match=r"rates\['w'\] must be in \[0, inf\), got -1"):
        prune(params, mask, 0.5, rates={"w": -1})
    with pytest.raises(ValueError, match=r"rates must leave some weights: fraction 0.5 times 2.0 is 1 of w"):
        prune(params, mask, 0.5, rates={"w": 2})
    with pytest.raises(ValueError, match=r"score must be a tree of the structure of the params; .* \['b', 'v'\]"):
        prune(params, mask, 0.5, score={"w": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match=r"score of 'v' must be real numbers of its shape \(2, 2\), got float32\[2\]"):
        prune(params, mask, 0.5, score=lambda path, w: w[0])
    with pytest.raises(ValueError, match="score of 'v' must be real numbers"):
        prune(params, mask, 0.5, score=lambda path, w: w + 1j)
    empty = {**mask, "w": jnp.zeros((2, 2), bool)}
    with pytest.raises(ValueError, match="mask has no living weight left in w"):
        prune(params, empty, 0.5)
    assert int(prune(params, empty, 0.5, scope="global")["v"].sum()) == 2
    with pytest.raises(ValueError, match="mask has no living weight left in v, w"):
        prune(params, {**empty, "v": jnp.zeros((2, 2), bool)}, 0.5, scope="global")
    assert not prune(params, empty, 0)["w"].any()  # nothing was to be pruned
    traced = jax.jit(lambda mask: prune(params, mask, 0.5))(empty)
    assert not traced["w"].any() and int(traced["v"].sum()) == 2
