import jax.numpy as jnp
import numpy as np
import pytest

from cbp_jax.numerics.running import counted, unseen


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 1, 20)])
def test_statistics_cover_all_counted_numbers(sizes):
    seen = np.random.default_rng(0).normal([5.0, -1.0], [2.0, 0.1], (sum(sizes), 2))
    found = unseen((2,))
    for part in np.split(seen, np.cumsum(sizes)[:-1]):
        found = counted(found, jnp.asarray(part))
    assert found.count == sum(sizes)
    np.testing.assert_allclose(found.mean, seen.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.variance, seen.var(0), rtol=1e-4)
    np.testing.assert_allclose(found.unbiased_variance, seen.var(0, ddof=1), rtol=1e-4)
    one = counted(unseen((2,)), jnp.asarray(seen[:1]))
    assert one.unbiased_variance.tolist() == unseen((2,)).unbiased_variance.tolist() == [1.0, 1.0]


def test_a_prior_counts_like_earlier_numbers():
    prior = np.array([1.0, -1.0, 1.0, -1.0])  # mean 0, variance 1
    seen = np.array([3.0, 7.0])
    found = counted(unseen((), prior=4.0), jnp.asarray(seen))
    both = np.concatenate([prior, seen])
    np.testing.assert_allclose((found.count, found.mean, found.variance), (6, both.mean(), both.var()), rtol=1e-6)
    assert unseen((3,)).variance.tolist() == [0.0] * 3
