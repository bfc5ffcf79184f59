"""Generalized advantage estimation against a loop in NumPy."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from cbp_jax.rl import gae

compiled = jax.jit(gae)


def loop(rewards, values, next_values, terminations, truncations, discount, gae_lambda):
    """Compute advantages by their definition: discounted sums of later errors within each episode."""
    steps, envs = rewards.shape
    result = np.zeros((steps, envs))
    for env in range(envs):
        for start in range(steps):
            weight = 1.0
            for t in range(start, steps):
                later = 0.0 if terminations[t, env] else discount * next_values[t, env]
                result[start, env] += weight * (rewards[t, env] + later - values[t, env])
                weight *= discount * gae_lambda
                if terminations[t, env] or truncations[t, env]:
                    break
    return result


@hypothesis.given(
    seed=st.integers(0, 2**31), discount=st.sampled_from([0.0, 0.9, 0.99, 1.0]), lam=st.sampled_from([0.0, 0.95, 1.0])
)
@hypothesis.settings(max_examples=30)
def test_advantages_are_sums_of_later_errors_of_the_episode(seed, discount, lam):
    rng = np.random.default_rng(seed)
    rewards, values, next_values = rng.normal(size=(3, 8, 3)).astype(np.float32)
    ends = rng.integers(0, 6, size=(8, 3))
    terminations, truncations = (ends == 0).astype(np.float32), (ends == 1).astype(np.float32)
    arguments = (rewards, values, next_values, terminations, truncations)
    found = compiled(*map(jnp.asarray, arguments), discount=discount, gae_lambda=lam)
    np.testing.assert_allclose(found, loop(*arguments, discount, lam), rtol=1e-5, atol=1e-5)


def test_a_truncation_bootstraps_from_the_next_value_and_a_termination_does_not():
    zero, one = jnp.zeros(1), jnp.ones(1)
    settings = {"discount": 0.5, "gae_lambda": 1.0}
    assert gae(one, zero, 4 * one, zero, one, **settings).tolist() == [3.0]
    assert gae(one, zero, 4 * one, one, zero, **settings).tolist() == [1.0]
