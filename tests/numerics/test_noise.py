import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from cbp_jax.numerics import noise

OPTIMIZED = True  # in programs as users compile them, rows of a batch must agree bit for bit

KEY = jnp.array([3, 4], jnp.uint32)
draw = jax.jit(lambda key, step: noise.normal(key, step, jnp.zeros((1 << 20,))))


def z_score(products):
    """Return by how many standard errors the mean product of independent standard normals differs from 0."""
    return abs(np.mean(products)) * np.sqrt(np.size(products))


@pytest.mark.parametrize(("key", "step"), [((0, 0), 0), ((0, 1), 0), ((3, 4), 2**31 - 1)])
def test_the_distribution_is_normal(key, step):
    x = np.asarray(draw(jnp.array(key, jnp.uint32), step), np.float64)
    n = x.size
    moments = [np.mean(x**power) for power in range(1, 5)]
    errors = np.sqrt(np.array([1, 2, 15, 96]) / n)
    assert (np.abs(np.array(moments) - [0, 1, 0, 3]) < 4 * errors).all(), moments
    assert stats.kstest(x, "norm").pvalue > 1e-3
    beyond = 2 * stats.norm.sf(4) * n  # 66
    assert abs((np.abs(x) > 4).sum() - beyond) < 4 * np.sqrt(beyond)
    assert np.abs(x).max() < 6.47


def test_neighbors_are_independent():
    """Noise and its square are independent of those of neighboring elements, steps, seeds and leaves."""
    x = np.asarray(draw(KEY, 7))
    pairs = {f"{lag} apart": (x[:-lag], x[lag:]) for lag in (1, 2, 3, 8, 64, 1000, 1024, 65536)}
    pairs["next step"] = (x, np.asarray(draw(KEY, 8)))
    pairs["next seed"] = (x, np.asarray(draw(KEY + jnp.array([0, 1], jnp.uint32), 7)))
    pairs["next seed, step before"] = (x, np.asarray(draw(KEY + jnp.array([0, 1], jnp.uint32), 6)))
    leaves = noise.normal(KEY, 7, [jnp.zeros(1 << 18)] * 2)
    pairs["next leaf"] = tuple(map(np.asarray, leaves))
    for name, (a, b) in pairs.items():
        assert z_score(a * b) < 4, name
        assert z_score((a**2 - 1) * (b**2 - 1) / 2) < 4, name


def test_every_weight_has_normal_noise_over_steps_and_seeds():
    """For a few weights and many draws, each weight's stream over steps and seeds is random."""
    steps = jnp.arange(20_000)
    over_steps = jax.jit(jax.vmap(lambda step: noise.normal(KEY, step, jnp.zeros(4))))(steps)
    key = lambda seed: jnp.stack([jnp.uint32(0), seed.astype(jnp.uint32)])
    over_seeds = jax.jit(jax.vmap(lambda seed: noise.normal(key(seed), 0, jnp.zeros(4))))(steps)
    for x in (np.asarray(over_steps), np.asarray(over_seeds)):
        for i in range(4):
            assert stats.kstest(x[:, i], "norm").pvalue > 1e-3
            assert z_score(x[1:, i] * x[:-1, i]) < 4
            assert z_score(x[:, i] * x[:, i - 1]) < 4


def test_variance_and_kurtosis_are_those_of_the_normal_distribution():
    """Moments are computed from the exact distribution, over all values of the sum, not from a sample."""
    half = np.full(2**12, 2.0**-12)  # with a resolution of 1/4,096
    bits = np.zeros(32 * 2**12 + 1)
    bits[:: 2**12] = stats.binom(32, 0.5).pmf(np.arange(33))
    weight = np.convolve(bits, np.convolve(half, half))
    x = (np.arange(weight.size) - (weight.size - 1) / 2) * 2**4
    value = x * (noise._CUBIC[0] + noise._CUBIC[1] * x**2)
    np.testing.assert_allclose([weight @ value**2, weight @ value**4, weight @ value**6], [1, 3, 14.98], rtol=1e-4)
    assert np.abs(np.cumsum(weight) - weight / 2 - stats.norm.cdf(value)).max() < 1.7e-4
    assert 6.46 < value.max() < 6.47
    words = np.random.default_rng(0).integers(0, 2**32, 10_000, dtype=np.uint32)
    words[:3] = [0, 2**32 - 1, 0x0000FFFF]
    other = words * np.uint32(0x9E3779B9)
    n = np.bitwise_count(words).astype(np.int64) * 2**16 + (other >> 16) + (other & 0xFFFF) - (16 * 2**16 + 65535)
    expected = n * (noise._CUBIC[0] + noise._CUBIC[1] * n.astype(float) ** 2)
    found = noise._nearly_normal(jnp.asarray(words), jnp.float32(1), jnp.float32(0))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.slow
def test_elements_of_a_leaf_have_different_random_words():
    words = np.asarray(noise._words((1 << 20,), *jnp.array([4, 5, 6], jnp.uint32)))
    assert len(np.unique(words)) == len(words)
    ones = ((words[:, None] >> np.arange(32, dtype=np.uint32)) & 1).astype(np.float64)
    assert (np.abs(ones.mean(0) - 0.5) < 5 * 0.5 / 2**10).all()


def test_noise_depends_on_the_element_and_not_on_the_shape():
    flat, shaped, short = (noise.normal(KEY, 0, jnp.zeros(shape)) for shape in ((24,), (2, 3, 4), (5,)))
    np.testing.assert_array_equal(shaped.ravel(), flat)
    np.testing.assert_array_equal(short, flat[:5])
    assert noise.normal(KEY, 0, jnp.zeros(())).shape == ()


def test_a_loop_does_not_keep_the_indices_of_elements_in_memory():
    def step(w, number):
        return w + noise.normal(KEY, number, w), None

    program = jax.jit(lambda w: jax.lax.scan(step, w, jnp.arange(100))[0]).lower(jnp.zeros((37, 41))).compile()
    loops = [line for line in program.as_text().splitlines() if " while(" in line]
    assert loops and not any("u32[37,41]" in line for line in loops)


def test_vmapped_draws_are_the_solo_draws():
    tree = {"a": jnp.zeros((3, 37)), "b": jnp.zeros(5)}
    keys = jnp.arange(10, dtype=jnp.uint32).reshape(5, 2)
    solo = jax.jit(lambda key: noise.normal(key, 3, tree, 0.1))
    together = jax.jit(jax.vmap(solo))(keys)
    for i in range(5):
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x, i=i: x[i], together), solo(keys[i]))


def test_scale_and_dtype():
    one, tenth, none = (noise.normal(KEY, 0, jnp.zeros(9, jnp.bfloat16), scale) for scale in (1.0, 0.1, 0.0))
    np.testing.assert_allclose(tenth, 0.1 * one, rtol=1e-6)
    assert (none == 0).all()
    assert one.dtype == jnp.float32
