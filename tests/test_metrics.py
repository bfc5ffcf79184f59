import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbp_jax import metrics

RANKS = {
    "effective": metrics.effective_rank,
    "approximate": metrics.approximate_rank,
    "stable": metrics.stable_rank,
}


def numpy_ranks(x, threshold=0.99):
    """Compute the three ranks by their definitions, in float64."""
    s = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    p = s / s.sum()
    p = p[p > 0]
    return {
        "effective": np.exp(-(p * np.log(p)).sum()),
        "approximate": next(k for k in range(1, len(s) + 1) if (s[:k] ** 2).sum() >= threshold * (s**2).sum()),
        "stable": next(k for k in range(1, len(s) + 1) if s[:k].sum() >= threshold * s.sum()),
    }


def relu_features(rng, examples=300, units=40):
    """Make activations like those of networks: a large mean direction and a long tail of singular values."""
    h = rng.random((examples, 100)) * (rng.random((examples, 100)) < 0.2)
    for _ in range(2):
        h = np.maximum(h @ rng.uniform(-1, 1, (h.shape[1], units)) * np.sqrt(6 / h.shape[1]), 0)
    return h


MATRICES = {
    "tall": lambda rng: rng.normal(size=(300, 40)),
    "relu": relu_features,
    "rank 5": lambda rng: rng.normal(size=(300, 5)) @ rng.normal(size=(5, 40)),
    "tiny values": lambda rng: 1e-25 * rng.normal(size=(300, 40)),
    "huge values": lambda rng: 1e25 * rng.normal(size=(300, 40)),
    "square": lambda rng: rng.normal(size=(50, 50)),
    "fewer examples than units": lambda rng: rng.normal(size=(12, 90)),
    "one example": lambda rng: rng.normal(size=(1, 7)),
}


@jax.jit  # matrices of one shape share a compilation
def jax_ranks(x):
    return {name: rank(x) for name, rank in RANKS.items()}


@pytest.mark.parametrize("name", MATRICES)
def test_ranks_agree_with_float64_numpy(name):
    x = MATRICES[name](np.random.default_rng(0)).astype(np.float32)
    ranks = jax_ranks(x)
    for rank, expected in numpy_ranks(x).items():
        np.testing.assert_allclose(ranks[rank], expected, rtol=1e-4, err_msg=rank)


def test_stable_rank_sums_singular_values_and_approximate_rank_their_squares():
    x = jnp.diag(jnp.array([1.0, 6.0, 3.0]))
    # The values 6, 3, 1 have the sum 10, and their squares 36, 9, 1 the sum 46.
    assert float(metrics.stable_rank(x, threshold=0.61)) == 2
    assert float(metrics.approximate_rank(x, threshold=0.61)) == 1
    assert float(metrics.stable_rank(x, threshold=0.95)) == 3
    assert float(metrics.approximate_rank(x, threshold=0.95)) == 2


@pytest.mark.parametrize("rank", [metrics.stable_rank, metrics.approximate_rank])
def test_a_threshold_reached_exactly_is_reached(rank):
    # k of 100 equal singular values make up k/100 of the sum, whatever the rounding of the sum.
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(150, 100)))
    k = np.arange(1, 101)
    ranks = jax.vmap(rank, in_axes=(None, 0))(jnp.asarray(basis, jnp.float32), jnp.asarray(k / 100, jnp.float32))
    np.testing.assert_array_equal(ranks, k)


def test_ranks_of_a_zero_matrix_are_zero_and_of_one_with_nan_are_nan():
    for name, rank in jax_ranks(jnp.zeros((12, 90))).items():
        assert float(rank) == 0, name
    for name, rank in jax_ranks(jnp.ones((12, 90)).at[3, 4].set(jnp.nan)).items():
        assert np.isnan(rank), name


def test_ranks_under_vmap():
    x = np.random.default_rng(1).normal(size=(3, 50, 50)).astype(np.float32)
    x[1, :, 7:], x[2] = 0, 0
    together, alone = jax.vmap(jax_ranks)(x), [jax_ranks(row) for row in x]
    for name in RANKS:
        np.testing.assert_allclose(together[name], [row[name] for row in alone], rtol=1e-5)
        assert together[name][0] > together[name][1] > together[name][2] == 0


def test_rank_thresholds_can_be_traced():
    x = jnp.diag(jnp.array([6.0, 3.0, 1.0]))
    k = jax.vmap(metrics.stable_rank, in_axes=(None, 0))(x, jnp.array([0.5, 0.85, 0.99]))
    assert k.tolist() == [1, 2, 3]


@pytest.mark.parametrize("rank", [metrics.stable_rank, metrics.approximate_rank])
@pytest.mark.parametrize("threshold", [0, -0.1, 1.01, float("nan")])
def test_bad_thresholds_are_refused(rank, threshold):
    with pytest.raises(ValueError, match=r"threshold must be in \(0, 1\]"):
        rank(jnp.eye(2), threshold=threshold)


@pytest.mark.parametrize("rank", RANKS.values())
@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (0, 4)])
def test_ranks_need_a_matrix(rank, shape):
    with pytest.raises(ValueError, match="x must be a matrix"):
        rank(jnp.ones(shape))


def test_dead_means_exactly_zero_on_the_whole_batch():
    h = jnp.array([[0.0, 0.0, 1e-30, -1.0, -0.0], [0.0, 1.0, 0.0, 0.0, 0.0]])
    assert float(metrics.dead_fraction(h)) == pytest.approx(2 / 5)


def test_dead_is_not_dormant():
    h = jnp.array([[0.0, 0.01, 1.0, 2.0], [0.0, 0.0, 3.0, 1.0]])
    assert float(metrics.dead_fraction(h)) == 0.25
    assert float(metrics.dormant_fraction(h, 0.1)) == 0.5


def test_a_tanh_unit_is_never_dead_but_can_be_dormant():
    x = jnp.linspace(-1, 1, 11)[:, None]
    h = jnp.tanh(x * jnp.array([1e-4, 1.0, 2.0]) + jnp.array([1e-6, 0.0, 0.0]))
    assert float(metrics.dead_fraction(h)) == 0
    assert float(metrics.dormant_fraction(h, 0.025)) == pytest.approx(1 / 3)


def test_dormant_scores_are_normalized_by_their_own_layer_and_include_the_threshold():
    # The scores are 0.5 and 1.5; a layer with activations a thousand times smaller has the same scores.
    h = jnp.array([[1.0, -3.0], [-1.0, 3.0]])
    for scale in (1.0, 1e-3):
        assert float(metrics.dormant_fraction(h * scale, 0.5)) == 0.5
        assert float(metrics.dormant_fraction(h * scale, 0.49)) == 0
    groups = {"a": h, "b": 1e-3 * h}
    assert float(metrics.dormant_fraction(groups, 0.49)) == 0  # if normalized together, all units of b would be dormant
    assert float(metrics.dormant_fraction({"a": h, "b": jnp.zeros((2, 6))}, 0.49)) == pytest.approx(6 / 8)


def test_the_absolute_value_is_taken_before_the_mean():
    h = jnp.array([[5.0, 1.0], [-5.0, 1.0]])
    assert float(metrics.dormant_fraction(h, 0.4)) == pytest.approx(0.5)  # unit 1 scores 1/3, unit 0 5/3


def test_fractions_run_over_positions_and_over_all_units_of_a_pytree():
    conv = jnp.zeros((2, 3, 3, 4)).at[1, 2, 0, 1].set(1.0)  # one unit is active at one position of one example
    dense = jnp.ones((2, 12))
    assert float(metrics.dead_fraction(conv)) == 0.75
    assert float(metrics.dead_fraction({"conv": conv, "dense": dense})) == pytest.approx(3 / 16)


def test_negative_dormant_threshold_is_refused():
    with pytest.raises(ValueError, match="threshold must not be negative"):
        metrics.dormant_fraction(jnp.ones((2, 2)), threshold=-0.1)


@pytest.mark.parametrize("metric", [metrics.dead_fraction, metrics.dormant_fraction])
@pytest.mark.parametrize("features", [{}, jnp.zeros((0, 3)), jnp.float32(1)])
def test_features_must_hold_units_and_examples(metric, features):
    with pytest.raises(ValueError, match="features must be"):
        metric(features)


def test_fractions_under_jit_and_vmap():
    h = jnp.array([[[0.0, 1.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [0.0, 1.0]]])
    assert jax.jit(jax.vmap(metrics.dead_fraction))(h).tolist() == [0.5, 1.0, 0.0]
    assert jax.jit(jax.vmap(metrics.dormant_fraction))(h).tolist() == [0.5, 1.0, 0.0]


def test_weight_magnitude_counts_every_float_entry_once():
    params = {"w": jnp.array([[-3.0, 1.0], [1.0, -1.0]]), "b": jnp.array([0.0, 0.0]), "count": jnp.int32(9)}
    assert float(metrics.weight_magnitude(params)) == 1.0
    params["key"] = jax.random.key(0)
    assert float(metrics.weight_magnitude(params)) == 1.0
    with pytest.raises(ValueError, match="at least one float array"):
        metrics.weight_magnitude({"count": jnp.int32(3)})


def test_plasticity_is_clipped_per_sample():
    before, after = jnp.array([1.0, 1.0, 0.0, 1e-12, 2.0]), jnp.array([0.25, 3.0, 0.0, 1.0, 0.0])
    assert metrics.plasticity(before, after).tolist() == [0.75, 0.0, 1.0, 0.0, 1.0]
    assert float(metrics.plasticity(0.1, 0.1, epsilon=0.2)) == pytest.approx(0.5)  # the denominator is max(0.1, 0.2)
    # 1e-8 is 0 in half precision, so the division must be computed in float32.
    assert float(metrics.plasticity(jnp.float16(0), jnp.float16(0))) == 1.0
    with pytest.raises(ValueError, match="same shape"):
        metrics.plasticity(jnp.ones(3), jnp.ones((3, 1)))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    # Sums and squares of these values overflow float16 and stall in bfloat16.
    @jax.jit
    def measure(x):
        loss = jnp.abs(x)
        plasticity = jnp.mean(metrics.plasticity(loss[0], loss[1]))
        return [
            *jax_ranks(x).values(),
            metrics.weight_magnitude(x),
            metrics.dormant_fraction(x, 1.0),
            plasticity,
        ]

    x = jnp.asarray(np.random.default_rng(2).normal(size=(1000, 20)) * 30 + 3, dtype)
    for half, single in zip(measure(x), measure(x.astype(jnp.float32)), strict=True):
        assert half.dtype == jnp.float32
        assert float(half) == float(single) > 0


def test_ranks_computed_together_equal_the_single_ones():
    x = jax.random.normal(jax.random.key(0), (30, 12)) * jnp.arange(12.0)
    together = jax.jit(metrics.ranks)(x, 0.9)
    alone = (metrics.effective_rank(x), metrics.approximate_rank(x, 0.9), metrics.stable_rank(x, 0.9))
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert len({float(rank) for rank in together}) == 3


def low_rank(rng, shape, rank):
    rows = int(np.prod(shape[:-1]))
    return (rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, shape[-1]))).astype(np.float32).reshape(shape)


def test_weight_rank_is_numpys_divided_by_the_largest_possible():
    rng = np.random.default_rng(3)
    kernels = {
        "conv": low_rank(rng, (3, 2, 4, 7), 5),  # a matrix [24, 7]
        "wide": low_rank(rng, (6, 20), 4),
        "tall": low_rank(rng, (20, 6), 6),
        "dead": np.zeros((5, 3), np.float32),
    }
    kernels["tall"][:, 2] = 0
    params = {name: {"kernel": kernel, "bias": np.ones(kernel.shape[-1])} for name, kernel in kernels.items()}
    params["count"] = np.int32(7)
    matrices = [kernel.reshape(-1, kernel.shape[-1]) for kernel in kernels.values()]
    assert [np.linalg.matrix_rank(w) for w in matrices] == [5, 4, 5, 0]
    rank = jax.jit(metrics.weight_rank)(params)
    assert rank.dtype == jnp.float32 and float(rank) == pytest.approx(14 / (7 + 6 + 6 + 3))
    assert float(metrics.weight_rank(params["conv"])) == pytest.approx(5 / 7)


def test_effective_rank_and_sparsity_of_weights_are_of_all_kernels_together():
    rng = np.random.default_rng(4)
    wide, conv = low_rank(rng, (6, 20), 4), low_rank(rng, (3, 2, 4, 7), 5)
    wide[rng.random(wide.shape) < 0.3] = 1e-4
    conv[..., 1] = 0
    params = {"wide": {"kernel": wide, "bias": np.zeros(20)}, "conv": {"kernel": conv}}
    matrices = [wide, conv.reshape(-1, 7)]
    expected = sum(float(metrics.effective_rank(w)) for w in matrices) / (6 + 7)
    assert float(metrics.weight_effective_rank(params)) == pytest.approx(expected, rel=1e-5)
    small = [np.abs(w) <= 0.01 * np.sqrt(np.mean(w.astype(np.float64) ** 2)) for w in matrices]
    fraction = np.mean(np.concatenate([np.ravel(each) for each in small]))
    sparsity = jax.jit(metrics.weight_sparsity)
    assert 0.15 < fraction < 0.5 and float(sparsity(params)) == pytest.approx(fraction, rel=1e-5)
    assert float(sparsity(jax.tree.map(lambda w: 1e-3 * w, params))) == pytest.approx(fraction, rel=1e-5)
    assert float(sparsity(params, 0.0)) == pytest.approx((conv == 0).sum() / (wide.size + conv.size), rel=1e-5)
    assert float(sparsity({"kernel": np.zeros((2, 3))})) == 1.0


@pytest.mark.parametrize("measure", [metrics.weight_rank, metrics.weight_effective_rank, metrics.weight_sparsity])
def test_measures_of_weights_refuse_params_without_kernels(measure):
    for params in ({"bias": jnp.ones(3)}, {"count": jnp.ones((2, 2), jnp.int32)}, {}):
        with pytest.raises(ValueError, match="params must hold at least one kernel; got PyTreeDef"):
            measure(params)


def test_gradient_dormant_units_have_small_gradients_relative_to_their_layer():
    rng = np.random.default_rng(0)
    grads = {
        "conv": {"kernel": rng.normal(size=(3, 3, 2, 6)) * np.geomspace(1e-4, 1, 6), "bias": np.zeros(6)},
        "dense": {"kernel": rng.normal(size=(7, 5)) * np.array([0, 1, 1, 1e-3, 1]), "scale": np.zeros(5)},
    }
    expected = []
    for layer in grads.values():
        size = np.abs(layer["kernel"]).mean(tuple(range(layer["kernel"].ndim - 1)))
        expected += list(size / size.mean() <= 0.05)
    assert 0 < sum(expected) < 11
    found = jax.jit(metrics.gradient_dormant_units)(grads, 0.05)
    np.testing.assert_allclose(found, np.mean(expected), rtol=1e-6)
    assert metrics.gradient_dormant_units(np.zeros((3, 2))) == 1
    for grads, threshold in ((np.zeros(3), 0.1), ({}, 0.1), (np.ones((2, 2)), -1)):
        with pytest.raises(ValueError, match="must"):
            metrics.gradient_dormant_units(grads, threshold)
