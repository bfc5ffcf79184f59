"""The agent's network and its units."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cbp_jax
from cbp_jax.nets import ActorCritic


def test_policy_and_value_share_nothing_and_all_their_units_are_found():
    net = ActorCritic(action_size=2, hidden=(8, 5), initial_log_std=-0.7)
    obs = jax.random.normal(jax.random.key(1), (3, 4, 6))
    params = jax.jit(net.init)(jax.random.key(0), obs)
    mean, log_std, value = jax.jit(net.apply)(params, obs)
    assert (mean.shape, value.shape) == ((3, 4, 2), (3, 4))
    np.testing.assert_allclose(log_std, -0.7)
    units = cbp_jax.discover_units(net.apply, params, obs)
    assert {group.name: group.size for group in units} == {
        "params/actor_0": 8,
        "params/actor_1": 5,
        "params/critic_0": 8,
        "params/critic_1": 5,
    }
    grads = jax.jit(jax.grad(lambda p: net.apply(p, obs)[2].sum()))(params)["params"]
    assert all(
        bool(jnp.any(grads[name]["kernel"])) == name.startswith("critic") for name in grads if "_log" not in name
    )


def test_kernels_have_lecuns_variance():
    params = jax.jit(ActorCritic(action_size=2).init)(jax.random.key(0), jnp.zeros((1, 400)))["params"]
    np.testing.assert_allclose(params["actor_0"]["kernel"].std(), 1 / 20, rtol=0.02)
    np.testing.assert_allclose(params["critic_1"]["kernel"].std(), 1 / 16, rtol=0.02)


@pytest.mark.parametrize(("scale", "layer"), [("policy_scale", "actor_mean"), ("value_scale", "critic_value")])
def test_a_scale_applies_only_to_its_output_layer(scale, layer):
    init = lambda **scales: jax.jit(ActorCritic(2, **scales).init)(jax.random.key(0), jnp.zeros((1, 6)))["params"]
    plain, small = init(), init(**{scale: 0.01})
    np.testing.assert_allclose(small[layer]["kernel"], plain[layer]["kernel"] / 100, rtol=1e-6)
    plain[layer] = small[layer]
    chex.assert_trees_all_equal(small, plain)


def test_deviations_may_depend_on_the_observation_and_layers_be_normalized():
    net = ActorCritic(2, (5,), "identity", state_std=True, normalization="layer")
    obs = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    params = jax.jit(net.init)(jax.random.key(0), obs)
    _, log_std, value = jax.jit(net.apply)(params, obs)
    layers = jax.tree.map(np.float64, params["params"])
    assert "actor_log_std" not in layers and set(layers["critic_norm_0"]) == {"scale", "bias"}
    for name, head, found in (("actor", "actor_std", log_std), ("critic", "critic_value", value[:, None])):
        h = obs @ layers[f"{name}_0"]["kernel"]
        h = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-6)
        out = h @ layers[head]["kernel"]
        expected = np.log(np.log1p(np.exp(out))) if name == "actor" else out
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"action_size": 0}, "action_size must be at least 1, got 0"),
        ({"action_size": 1, "hidden": ()}, r"hidden must be sizes of at least one hidden layer, got \(\)"),
        ({"action_size": 1, "policy_scale": -0.1}, r"policy_scale must not be negative, got -0\.1"),
        ({"action_size": 1, "value_scale": -0.1}, r"value_scale must not be negative, got -0\.1"),
        ({"action_size": 1, "normalization": "online"}, "normalization must be 'layer', 'bare_layer' or None"),
        ({"action_size": 1, "activation": "rely"}, "activation must be .*'relu'.*, got 'rely'"),
    ],
)
def test_attributes_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ActorCritic(**settings)
