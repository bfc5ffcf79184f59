"""The loss of PPO against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbp_jax.rl.loss import ppo_loss
from cbp_jax.rl.rollout import Steps, log_prob
from cbp_jax.rl.settings import Settings


def test_the_loss_is_that_of_ppo():
    rng = np.random.default_rng(0)
    mean, actions = rng.normal(size=(2, 32, 2))
    value, targets, advantages, old = rng.normal(size=(4, 32))
    log_std = np.array([-0.3, 0.2])
    std = np.exp(log_std)
    log_prob = (-((actions - mean) ** 2) / (2 * std**2) - np.log(std * np.sqrt(2 * np.pi))).sum(1)
    old = log_prob + 0.3 * old
    ratio = np.exp(log_prob - old)
    surrogate = np.where(
        advantages > 0, np.minimum(ratio, 1.2) * advantages, np.maximum(ratio, 0.8) * advantages
    )  # clipping in its other form
    batch = Steps(jnp.zeros((32, 1)), *map(jnp.asarray, (actions, old, value, advantages, targets)))
    settings = Settings(value_coefficient=0.5, entropy_coefficient=0.01)
    loss, terms = ppo_loss(settings, *map(jnp.asarray, (mean, log_std, value)), batch)
    entropy = (log_std + 0.5 * np.log(2 * np.pi * np.e)).sum()
    np.testing.assert_allclose(terms["policy_loss"], -surrogate.mean(), rtol=1e-4)
    np.testing.assert_allclose(terms["value_loss"], ((value - targets) ** 2).mean(), rtol=1e-5)
    np.testing.assert_allclose(terms["entropy"], entropy, rtol=1e-5)
    np.testing.assert_allclose(terms["clip_fraction"], (abs(ratio - 1) > 0.2).mean())
    expected = -surrogate.mean() + 0.5 * ((value - targets) ** 2).mean() - 0.01 * entropy
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    of_each = ppo_loss(settings, *map(jnp.asarray, (mean, np.tile(log_std, (32, 1)), value)), batch)
    np.testing.assert_allclose(of_each[0], loss, rtol=1e-6)


def test_the_policy_follows_the_sign_of_the_advantage_until_it_is_clipped():
    # Each action is above the mean. Without clipping, descent moves the mean toward it if A > 0, otherwise away.
    advantages = jnp.array([1.0, -1.0, 1.0, -1.0])
    ahead = jnp.log(jnp.array([1.0, 1.0, 1.5, 0.5]))  # the last two of these ratios are beyond the clipping range
    actions, zeros = jnp.full((4, 1), 0.5), jnp.zeros(4)

    def loss(mean):
        old = log_prob(jax.lax.stop_gradient(mean), zeros[:1], actions) - ahead
        batch = Steps(actions, actions, old, zeros, advantages, zeros)
        return ppo_loss(Settings(), mean, zeros[:1], zeros, batch)[0]

    towards = -jax.grad(loss)(jnp.zeros((4, 1)))[:, 0]
    np.testing.assert_allclose(towards, [0.125, -0.125, 0, 0], rtol=1e-5)  # A (a - mean) / 4


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_ratios_of_probabilities_do_not_overflow(advantage):
    actions, zeros = jnp.zeros((1, 1)), jnp.zeros(1)
    batch = Steps(actions, actions, jnp.full(1, -1e6), zeros, jnp.full(1, advantage), zeros)
    loss, grad = jax.value_and_grad(lambda mean: ppo_loss(Settings(), mean, zeros, zeros, batch)[0])(actions + 1)
    assert jnp.isfinite(loss) and jnp.isfinite(grad).all()


def test_value_clipping_takes_the_larger_of_two_errors():
    rng = np.random.default_rng(1)
    old, value, targets = rng.normal(size=(3, 200)) * [[1.0], [1.0], [2.0]]
    zeros = jnp.zeros((200, 1))
    batch = Steps(zeros, zeros, jnp.zeros(200), jnp.asarray(old), jnp.zeros(200), jnp.asarray(targets))
    settings = Settings(clip=0.3, clip_values=True)
    value_loss = lambda value, settings: ppo_loss(settings, zeros, jnp.zeros(1), value, batch)[1]["value_loss"]
    found, gradient = jax.value_and_grad(value_loss)(jnp.asarray(value), settings)
    nearest = np.where(value > old + 0.3, old + 0.3, np.where(value < old - 0.3, old - 0.3, value))
    own, near = (value - targets) ** 2, (nearest - targets) ** 2
    np.testing.assert_allclose(found, np.maximum(own, near).mean(), rtol=1e-5)
    assert found > value_loss(jnp.asarray(value), Settings(clip=0.3)) + 0.01
    # If the clipped value has the larger error, the gradient is 0.
    np.testing.assert_allclose(gradient, np.where(near > own, 0, 2 * (value - targets) / 200), atol=1e-7)


def test_advantages_are_normalized_in_each_minibatch_on_request():
    rng = np.random.default_rng(2)
    advantages, ahead = rng.normal(3.0, 2.0, 10), rng.normal(0.0, 0.3, 10)
    zeros = jnp.zeros((10, 1))
    at_rest = log_prob(zeros, jnp.zeros(1), zeros)
    batch = Steps(zeros, zeros, at_rest - ahead, jnp.zeros(10), jnp.asarray(advantages), jnp.zeros(10))

    def policy_loss(**settings):
        return ppo_loss(Settings(**settings), zeros, jnp.zeros(1), jnp.zeros(10), batch)[1]["policy_loss"]

    def expected(advantages):
        ratio = np.exp(ahead)
        return -np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.2) * advantages).mean()

    scaled = (advantages - advantages.mean()) / advantages.std(ddof=1)
    np.testing.assert_allclose(policy_loss(advantages_in="minibatch"), expected(scaled), rtol=1e-4)
    plain = expected(advantages)
    for settings in ({}, {"advantages_in": "minibatch", "normalize_advantages": False}):
        np.testing.assert_allclose(policy_loss(**settings), plain, rtol=1e-4, err_msg="as they come")
