"""NNX modules, Equinox models and Flax's TrainState in their usual forms; scalar parameters."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import resets
from flax import nnx
from flax.training import train_state

import cbp_jax


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv, self.norm = nnx.Conv(2, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.dense, self.dropout = nnx.Linear(4, 6, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.rnn = nnx.RNN(nnx.GRUCell(6, 5, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x))).mean(1)
        return self.head(self.rnn(self.dropout(nnx.relu(self.dense(x)))))


X = jax.random.normal(jax.random.key(0), (3, 4, 4, 2))


def test_an_nnx_module_is_used_directly():
    model = Net(nnx.Rngs(0))
    before = jax.tree.map(np.array, nnx.as_pure(nnx.state(model, nnx.BatchStat)))
    units = cbp_jax.discover_units(model, X)
    sizes = [(group.name, group.size) for group in units]
    assert sizes == [("conv", 4), ("dense", 6), ("rnn/cell/dense_i", 5)]
    assert [part.path for part in units[0].statistics] == ["norm/mean", "norm/var"]
    assert [item.name for item in units.left_out] == ["head"]
    after = nnx.as_pure(nnx.state(model, nnx.BatchStat))
    jax.tree.map(np.testing.assert_array_equal, before, after)  # the model that is traced is a copy
    assert int(model.dropout.rngs.count[...]) == 0
    same = cbp_jax.discover_units(lambda model, x: model(x), model, X)
    assert str(same) == str(units)
    abstract = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    assert str(cbp_jax.discover_units(abstract, X)) == str(units)


def test_features_of_an_nnx_module_update_its_state_like_a_call():
    class Small(nnx.Module):
        def __init__(self, rngs):
            self.a, self.norm = nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
            self.dropout, self.b = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.b(self.dropout(nnx.tanh(self.norm(self.a(x)))))

    one, other, x = Small(nnx.Rngs(0)), Small(nnx.Rngs(0)), X.reshape(-1, 8)[:, :3]
    units = cbp_jax.discover_units(one, x)
    apply = cbp_jax.with_features(lambda model, x: model(x), units)

    @nnx.jit
    def captured(model, x):
        loss = lambda model: (lambda out, features: (jnp.sin(out).sum(), features))(*apply(model, x))
        return nnx.value_and_grad(loss, has_aux=True)(model)

    plain = nnx.jit(lambda model, x: nnx.value_and_grad(lambda model: jnp.sin(model(x)).sum())(model))
    for _ in range(2):
        (loss, features), gradient = captured(one, x)
        want, want_gradient = plain(other, x)
        assert loss == want and features["a"].shape == (12, 4)
        jax.tree.map(np.testing.assert_array_equal, nnx.as_pure(gradient), nnx.as_pure(want_gradient))
    raw = lambda model: [np.asarray(jax.random.key_data(v) if jnp.issubdtype(v.dtype, jax.dtypes.prng_key) else v)
                         for v in jax.tree.leaves(nnx.as_pure(nnx.state(model)))]  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, raw(one), raw(other))
    assert int(one.dropout.rngs.count[...]) == 2 and np.any(np.asarray(one.norm.mean[...]) != 0)


@pytest.mark.slow
def test_the_nnx_optimizer_sees_one_name_for_a_parameter():
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(4, 2, rngs=nnx.Rngs(1)))
    x = jnp.ones((5, 3))
    units = cbp_jax.discover_units(model, x)
    apply = cbp_jax.with_features(lambda model, x: model(x), units)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        cbp_jax.continual_backprop(cbp_jax.adam(0.1), units, replacement_rate=0.25, maturity_threshold=0),
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    gradient, features = nnx.grad(lambda model: (lambda o, f: (o.sum(), f))(*apply(model, x)), has_aux=True)(model)
    optimizer.update(model, gradient, features=features)
    replaced = np.asarray(nnx.as_pure(optimizer.opt_state)[1].replaced["layers/0"])
    assert replaced.sum() == 1
    np.testing.assert_array_equal((np.asarray(model.layers[2].kernel[...]) == 0).all(1), replaced)


def test_train_state_passes_features_on():
    net, x = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(2)]), jnp.ones((5, 3))
    params = jax.jit(net.init)(jax.random.key(0), x)
    units = cbp_jax.discover_units(net.apply, params, x)
    _, features = jax.jit(cbp_jax.with_features(net.apply, units))(params, x)
    tx = cbp_jax.continual_backprop(optax.sgd(0.1), units, replacement_rate=0.25, maturity_threshold=0)
    grads = jax.tree.map(jnp.ones_like, params)
    state = cbp_jax.TrainState.create(apply_fn=net.apply, params=params, tx=optax.chain(tx, optax.scale(0.5)))
    new = jax.jit(lambda s: s.apply_gradients(grads=grads, features=features))(state)
    assert new.tx is state.tx and new.step == 1 and new.opt_state[0].replaced["params/layers_0"].sum() == 1
    updates, _ = jax.jit(lambda: tx.update(grads, tx.init(params), params, features=features))()
    want = optax.apply_updates(params, jax.tree.map(lambda u: 0.5 * u, updates))
    jax.tree.map(np.testing.assert_allclose, new.params, want)
    # A transformation that takes no features is called without them.
    plain = cbp_jax.TrainState.create(apply_fn=net.apply, params=params, tx=optax.sgd(0.1))
    assert plain.apply_gradients(grads=grads, features=features).step == 1
    flax = train_state.TrainState.create(apply_fn=net.apply, params=params, tx=tx)
    with pytest.raises(ValueError, match=r"cbp_jax\.TrainState"):
        flax.apply_gradients(grads=grads)


def test_the_error_for_an_equinox_model_given_as_params_mentions_partition():
    model = eqx.nn.MLP(3, 2, 8, 1, key=jax.random.key(0))
    with pytest.raises(TypeError, match=r"params\['activation'\] is .*eqx\.partition"):
        cbp_jax.discover_units(lambda model, x: jax.vmap(model)(x), model, jnp.ones((4, 3)))


SCALARS = {
    "logit scale": lambda h, t: h * jnp.exp(t),
    "sum of two": lambda h, t: jax.nn.sigmoid(t) * jnp.tanh(h) + (1 - jax.nn.sigmoid(t)) * h,
    "plain": lambda h, t: h * t + t,
    "function of two": lambda h, t: h * (jnp.exp(t) + t**2),
    "divided": lambda h, t: h / jnp.maximum(jnp.exp(t), 1.0),
    "slope": lambda h, t: jnp.where(h > 0, h, t * h),
    "power": lambda h, t: jax.nn.softplus(h) ** 2 * t,
}


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("name", SCALARS)
def test_scalar_parameters_belong_to_no_unit(name, shape):
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(3, 5)), "t": np.full(shape, 0.3), "b": rng.normal(size=(5, 2))}
    params = jax.tree.map(jnp.float32, params)
    apply_fn = lambda p, x: SCALARS[name](x @ p["a"], p["t"]) @ p["b"]
    units = cbp_jax.discover_units(apply_fn, params, X.reshape(-1, 8)[:, :3])
    assert [(group.name, group.size) for group in units] == [("a", 5)]
    assert resets.paths(units[0].biases) == resets.paths(units[0].scales) == []


@pytest.mark.parametrize("shape", [(), (1,)])
def test_two_towers(shape):
    rng = np.random.default_rng(0)
    params = {"t": jnp.full(shape, 0.3), "v": {}, "w": {}}
    for tower in ("v", "w"):
        params[tower] = {"hidden": jnp.float32(rng.normal(size=(3, 5))), "out": jnp.float32(rng.normal(size=(5, 4)))}

    def apply_fn(p, x, y):
        ends = []
        for tower, data in (("v", x), ("w", y)):
            end = jnp.tanh(data @ p[tower]["hidden"]) @ p[tower]["out"]
            ends.append(end / jnp.linalg.norm(end, axis=-1, keepdims=True))
        return jnp.exp(p["t"]) * ends[0] @ ends[1].T

    x = X.reshape(-1, 8)[:, :3]
    units = cbp_jax.discover_units(apply_fn, params, x, 2 * x)
    assert [group.name for group in units] == ["v/hidden", "w/hidden"]
    assert {item.name for item in units.left_out} == {"v/out", "w/out"}
    resets.check_resets(units, params, lambda p: (apply_fn(p, x, 2 * x), None))
