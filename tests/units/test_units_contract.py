"""The contract of discover_units and with_features: what is found, what is left out, never a wrong group."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import cbp_jax


def paths(parts):
    """Return the paths of the slices (or of the consumers' kernels) in the params, as strings."""
    return [getattr(part, "kernel", part).path for part in parts]


def rows_of(part, unit, shape):
    """Return a bool array of `shape`: the entries of a parameter that belong to one unit by a slice."""
    rows = np.zeros(part.rows, bool)
    rows[part.index[:, unit]] = True
    other = [axis for axis in range(len(shape)) if axis not in part.axes]
    mask = rows.reshape([shape[axis] for axis in part.axes] + [1] * len(other))
    return np.broadcast_to(mask.transpose(np.argsort([*part.axes, *other])), shape)


def reset(units, params, features, **kwargs):
    """Return params and state after a step in which only replacements change them."""
    tx = cbp_jax.continual_backprop(optax.sgd(0.0), units, maturity_threshold=0, **kwargs)

    @jax.jit
    def step(params, features):
        grads = jax.tree.map(jnp.zeros_like, params)
        updates, state = tx.update(grads, tx.init(params), params, features=features)
        return optax.apply_updates(params, updates), state

    return step(params, features)


def draw(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape) * 0.5, jnp.float32) for shape in shapes]


# -------------------------------------------------------------------------------------------- what is found


def test_flax_linen_dense_network():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(5)(x))
            x = nn.tanh(nn.Dense(7, use_bias=False)(x))
            return nn.Dense(2)(x)

    x = jnp.ones((3, 4))
    params = jax.eval_shape(Net().init, jax.random.key(0), x)
    units = cbp_jax.discover_units(Net().apply, params, x)
    assert isinstance(units, tuple)
    assert [(g.name, g.size) for g in units] == [("params/Dense_0", 5), ("params/Dense_1", 7)]
    first, second = units
    assert paths(first.incoming) == ["params/Dense_0/kernel"]
    assert paths(first.biases) == ["params/Dense_0/bias"]
    assert paths(first.outgoing) == ["params/Dense_1/kernel"]
    assert paths(second.incoming) == ["params/Dense_1/kernel"]
    assert paths(second.biases) == []
    assert paths(second.outgoing) == ["params/Dense_2/kernel"]
    assert not units.left_out or "Dense_2" in str(units.left_out)


class ConvNet(nn.Module):
    rate: float = 0.5

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.max_pool(nn.relu(nn.Conv(4, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.avg_pool(nn.gelu(nn.Conv(6, (2, 2), padding="VALID")(x)), (2, 2), (1, 1))
        x = nn.Dropout(self.rate, deterministic=not train)(x)
        x = x.reshape(x.shape[0], -1)
        x = nn.Dropout(self.rate, deterministic=not train)(nn.relu(nn.Dense(8)(x)))
        return nn.Dense(3)(x)


def test_flax_convolution_pooling_dropout_flatten():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 10, 3)), jnp.float32)
    params = jax.jit(ConvNet().init)(jax.random.key(0), x)

    def apply_fn(params, x, key):
        return ConvNet().apply(params, x, train=True, rngs={"dropout": key})

    key = jax.random.key(1)
    units = cbp_jax.discover_units(apply_fn, params, x, key)
    sizes = [("params/Conv_0", 4), ("params/Conv_1", 6), ("params/Dense_0", 8)]
    assert [(g.name, g.size) for g in units] == sizes
    assert [paths(g.outgoing) for g in units] == [
        [f"params/{layer}/kernel"] for layer in ("Conv_1", "Dense_0", "Dense_1")
    ]
    out, features = jax.jit(cbp_jax.with_features(apply_fn, units))(params, x, key)
    np.testing.assert_allclose(out, jax.jit(apply_fn)(params, x, key), rtol=1e-5, atol=1e-6)
    assert set(features) == {name for name, _ in sizes}
    # Features are the next layer's inputs: after pooling, and after dropout (half of the activations are exactly 0).
    assert features["params/Conv_0"].shape == (2, 4, 5, 4)
    assert features["params/Conv_1"].shape == (2, 2 * 3, 6)
    assert features["params/Dense_0"].shape == (2, 8)
    dropped = np.mean(np.asarray(features["params/Conv_1"]) == 0)
    assert 0.2 < dropped < 0.8
    kernel, bias = params["params"]["Dense_0"]["kernel"], params["params"]["Dense_0"]["bias"]
    h = np.maximum(features["params/Conv_1"].reshape(2, -1) @ kernel + bias, 0)
    seen = np.asarray(features["params/Dense_0"])
    np.testing.assert_allclose(seen[seen != 0], 2 * h[seen != 0], rtol=1e-4, atol=1e-5)


def test_keyword_arguments_reach_the_network():
    x = jnp.ones((2, 8, 10, 3))
    params = jax.jit(ConvNet().init)(jax.random.key(0), x)
    units = cbp_jax.discover_units(ConvNet().apply, params, x)
    apply = cbp_jax.with_features(ConvNet().apply, units)
    noise = dict(train=True, rngs={"dropout": jax.random.key(0)})
    still, _ = jax.jit(apply)(params, x)
    noisy, features = jax.jit(lambda p, x: apply(p, x, **noise))(params, x)
    want = jax.jit(lambda p, x: ConvNet().apply(p, x, **noise))(params, x)
    np.testing.assert_allclose(noisy, want, rtol=1e-5, atol=1e-6)
    assert np.abs(still - noisy).max() > 1e-3
    assert features["params/Dense_0"].shape == (2, 8)


def test_another_batch_size_than_the_example():
    x = jnp.ones((1, 8, 10, 3))
    params = jax.eval_shape(ConvNet().init, jax.random.key(0), x)
    units = cbp_jax.discover_units(ConvNet().apply, params, x)
    apply = cbp_jax.with_features(ConvNet().apply, units)
    _, features = jax.eval_shape(apply, params, jnp.ones((5, 8, 10, 3)))
    assert [h.shape[0] for h in features.values()] == [5, 5, 5]


@pytest.mark.slow
def test_nnx_through_split_and_merge():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.stem = nnx.Conv(2, 4, (3, 3), rngs=rngs)
            self.blocks = nnx.List([nnx.Linear(6 * 5 * 4, 7, rngs=rngs), nnx.Linear(7, 6, rngs=rngs)])
            self.head = nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.stem(x)).reshape(x.shape[0], -1)
            for block in self.blocks:
                x = nnx.tanh(block(x))
            return self.head(x)

    graphdef, params = nnx.split(nnx.eval_shape(lambda: Net(nnx.Rngs(0))), nnx.Param)
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1), params)
    apply_fn = lambda params, x: nnx.merge(graphdef, params)(x)
    x = jnp.ones((2, 6, 5, 2))
    units = cbp_jax.discover_units(apply_fn, params, x)
    assert [(g.name, g.size) for g in units] == [("stem", 4), ("blocks/0", 7), ("blocks/1", 6)]
    out, features = jax.jit(cbp_jax.with_features(apply_fn, units))(params, x)
    np.testing.assert_allclose(out, jax.jit(apply_fn)(params, x), rtol=1e-5, atol=1e-6)
    new, state = reset(units, params, features, replacement_rate=0.5)
    mask = np.asarray(state.replaced["blocks/1"])
    assert mask.sum() == 3
    np.testing.assert_array_equal(np.all(np.asarray(new["head"]["kernel"][...]) == 0, axis=1), mask)


def test_bare_functions_with_odd_names_and_nesting():
    w = draw(0, (4, 5), (5,), (5, 6), (6,), (6, 2), (2,))
    params = {
        "zz top": [{"Ω.1": (w[0], w[1])}, {"": {"k": w[2], "b": w[3]}}],
        "0": {"a": {"a": {"a": [w[4], w[5]]}}},
    }

    def apply_fn(params, x):
        kernel, bias = params["zz top"][0]["Ω.1"]
        h = jnp.tanh(x @ kernel + bias)
        odd = params["zz top"][1][""]
        h = jax.nn.relu(h @ odd["k"] + odd["b"])
        kernel, bias = params["0"]["a"]["a"]["a"]
        return h @ kernel + bias

    units = cbp_jax.discover_units(apply_fn, params, jnp.ones((3, 4)))
    assert [g.size for g in units] == [5, 6]
    assert units[0].name == "zz top/0/Ω.1"
    assert paths(units[0].incoming) == ["zz top/0/Ω.1/0"]
    assert paths(units[0].biases) == ["zz top/0/Ω.1/1"]
    assert paths(units[0].outgoing) == ["zz top/1//k"]
    assert paths(units[1].outgoing) == ["0/a/a/a/0"]


def test_two_kernels_in_one_layer_have_names_of_their_own():
    w = draw(0, (4, 5), (5, 6), (6, 2))
    params = {"net": {"first": w[0], "second": w[1], "third": w[2]}}
    apply_fn = lambda p, x: jnp.tanh(jnp.tanh(x @ p["net"]["first"]) @ p["net"]["second"]) @ p["net"]["third"]
    units = cbp_jax.discover_units(apply_fn, params, jnp.ones((3, 4)))
    assert [g.size for g in units] == [5, 6]
    assert len({g.name for g in units}) == 2
    _, features = cbp_jax.with_features(apply_fn, units)(params, jnp.ones((3, 4)))
    assert [features[g.name].shape for g in units] == [(3, 5), (3, 6)]


def test_more_than_ten_layers_in_forward_order():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for width in range(3, 15):
                x = nn.relu(nn.Dense(width)(x))
            return nn.Dense(2)(x)

    params = jax.eval_shape(Net().init, jax.random.key(0), jnp.ones((1, 3)))
    units = cbp_jax.discover_units(Net().apply, params, jnp.ones((1, 3)))
    assert [(g.name, g.size) for g in units] == [(f"params/Dense_{i}", i + 3) for i in range(12)]
    assert [paths(g.outgoing) for g in units] == [[f"params/Dense_{i + 1}/kernel"] for i in range(12)]


def test_kernels_stored_transposed():
    """In PyTorch's layout, [out, in], a unit's incoming weights are a row."""
    params = {"a": draw(0, (5, 3), (5,)), "b": draw(1, (2, 5), (2,))}
    apply_fn = lambda p, x: jnp.einsum("bi,oi->bo", jnp.tanh(x @ p["a"][0].T + p["a"][1]), p["b"][0]) + p["b"][1]
    x = draw(2, (4, 3))[0]
    units = cbp_jax.discover_units(apply_fn, params, x)
    assert [(g.name, g.size) for g in units] == [("a", 5)]
    _, features = jax.jit(cbp_jax.with_features(apply_fn, units))(params, x)
    features = {"a": features["a"] * jnp.asarray([1, 1, 1e-4, 1, 1])}
    new, state = reset(units, params, features, replacement_rate=0.2)
    assert np.flatnonzero(state.replaced["a"]).tolist() == [2]
    assert np.all(np.asarray(new["a"][0] != params["a"][0]) == (np.arange(5) == 2)[:, None])
    assert np.all(np.asarray(new["b"][0] == 0) == (np.arange(5) == 2))


ELEMENTWISE = {
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "mish": jax.nn.mish,
    "log_sigmoid": jax.nn.log_sigmoid,
    "hard_tanh": jax.nn.hard_tanh,
    "clip": lambda h: jnp.clip(h, -0.5, 0.5),
    "sin": jnp.sin,
    "power": lambda h: h**2 + jnp.abs(h) ** 0.5,
    "where": lambda h: jnp.where(h > 0, h, 0.1 * h),
    "constants": lambda h: 2.0 * h / 3.0 + 1.0,
    "cast": lambda h: jnp.tanh(h.astype(jnp.bfloat16)).astype(jnp.float32),
    "jit": jax.jit(jnp.tanh),
    "identity": lambda h: h,
    "stop_gradient": lambda h: jnp.tanh(h) + jax.lax.stop_gradient(h),
    "noise": lambda h: jnp.tanh(h) + 0.1 * jax.random.normal(jax.random.key(0), h.shape),
    "reshaped": lambda h: jnp.tanh(h.reshape(2, 2, 5)).reshape(4, 5),
    "transposed": lambda h: jnp.tanh(h.T).T,
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_any_elementwise_map(name):
    f = ELEMENTWISE[name]
    params = {"a": draw(0, (3, 5), (5,)), "b": draw(1, (5, 2), (2,))}
    apply_fn = lambda p, x: f(x @ p["a"][0] + p["a"][1]) @ p["b"][0] + p["b"][1]
    x = draw(2, (4, 3))[0]
    units = cbp_jax.discover_units(apply_fn, params, x)
    assert [(g.name, g.size, paths(g.outgoing)) for g in units] == [("a", 5, ["b/0"])]
    assert paths(units[0].incoming) == ["a/0"] and paths(units[0].biases) == ["a/1"]
    _, features = jax.jit(cbp_jax.with_features(apply_fn, units))(params, x)
    want = jax.jit(f)(x @ params["a"][0] + params["a"][1])
    np.testing.assert_allclose(features["a"], want, rtol=1e-2 if name == "cast" else 1e-4, atol=1e-5)


def test_features_under_jit_vmap_grad_and_scan():
    params = {"a": draw(0, (3, 5), (5,)), "b": draw(1, (5, 2), (2,))}
    apply_fn = lambda p, x: jnp.tanh(x @ p["a"][0] + p["a"][1]) @ p["b"][0] + p["b"][1]
    x = draw(2, (4, 3))[0]
    units = cbp_jax.discover_units(apply_fn, params, x)
    apply = cbp_jax.with_features(apply_fn, units)
    want = np.tanh(x @ params["a"][0] + params["a"][1])
    np.testing.assert_allclose(jax.jit(apply)(params, x)[1]["a"], want, rtol=1e-5, atol=1e-6)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    out, features = jax.vmap(apply, (0, None))(stacked, x)
    assert out.shape == (2, 4, 2) and features["a"].shape == (2, 4, 5)
    np.testing.assert_allclose(features["a"][0], want, rtol=1e-5, atol=1e-6)
    _, scanned = jax.lax.scan(lambda c, x: (c, apply(params, x[None])[1]["a"]), 0, x)
    np.testing.assert_allclose(scanned[:, 0], want, rtol=1e-5, atol=1e-6)


def test_gradients_through_custom_rules_are_those_of_the_network():
    @jax.custom_vjp
    def backwards(h):
        return jnp.tanh(h)

    backwards.defvjp(lambda h: (jnp.tanh(h), None), lambda _, g: (7.0 * g,))

    @jax.custom_jvp
    def forwards(h):
        return jnp.round(h)

    forwards.defjvp(lambda primals, tangents: (jnp.round(primals[0]), 3.0 * tangents[0]))
    params = {"a": draw(0, (3, 5)), "b": draw(1, (5, 4)), "c": draw(2, (4, 2))}
    apply_fn = lambda p, x: forwards(backwards(x @ p["a"][0]) @ p["b"][0]) @ p["c"][0]
    x = draw(3, (4, 3))[0]
    units = cbp_jax.discover_units(apply_fn, params, x)
    assert [g.name for g in units] == ["a", "b"]
    apply = cbp_jax.with_features(apply_fn, units)
    got = jax.jit(jax.grad(lambda p: jnp.sin(apply(p, x)[0]).sum()))(params)
    want = jax.jit(jax.grad(lambda p: jnp.sin(apply_fn(p, x)).sum()))(params)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(got))


# ----------------------------------------------------------------------------------------- what can be read


def test_table_shows_name_size_incoming_and_outgoing():
    x = jnp.ones((1, 8, 10, 3))
    params = jax.eval_shape(ConvNet().init, jax.random.key(0), x)
    table = str(cbp_jax.discover_units(ConvNet().apply, params, x))
    header = next(line for line in table.splitlines() if "size" in line.lower())
    assert all(word in header.lower() for word in ("size", "incoming", "outgoing"))
    for name, size, incoming, outgoing in (
        ("params/Conv_0", "4", "Conv_0/kernel", "Conv_1/kernel"),
        ("params/Conv_1", "6", "Conv_1/kernel", "Dense_0/kernel"),
        ("params/Dense_0", "8", "Dense_0/kernel", "Dense_1/kernel"),
    ):
        row = next(line for line in table.splitlines() if line.strip(" |").startswith(name))
        assert all(text in row for text in (size, incoming, outgoing)), row


# --------------------------------------------------- what is left out, instead of being wrongly included


def test_network_without_hidden_units_is_refused_by_name():
    params = {"only": draw(0, (3, 2), (2,))}
    with pytest.raises(ValueError, match="only"):
        cbp_jax.discover_units(lambda p, x: x @ p["only"][0] + p["only"][1], params, jnp.ones((4, 3)))


def test_a_kernel_that_both_computes_and_reads_its_units_is_refused():
    params = {"tied": draw(0, (3, 5))}
    with pytest.raises(ValueError, match="tied"):
        cbp_jax.discover_units(lambda p, x: jnp.tanh(x @ p["tied"][0]) @ p["tied"][0].T, params, jnp.ones((4, 3)))


def test_names_that_join_to_one_path_are_kept_apart_or_refused():
    """Haiku's keys hold slashes, so that two different leaves may both read "a/b/w"."""
    w = draw(0, (3, 5), (5, 4), (4, 2))
    params = {"a/b": {"w": w[0]}, "a": {"b": {"w": w[1]}}, "out": {"w": w[2]}}

    def apply_fn(params, x):
        h = jnp.tanh(jnp.tanh(x @ params["a/b"]["w"]) @ params["a"]["b"]["w"])
        return h @ params["out"]["w"]

    x = jnp.ones((2, 3))
    try:
        units = cbp_jax.discover_units(apply_fn, params, x)
    except ValueError as error:
        assert "a/b" in str(error)
        return
    assert [g.size for g in units] == [5, 4]
    assert len({g.name for g in units}) == 2


@pytest.mark.parametrize("spatial", [False, True])
def test_layer_of_a_single_unit_has_its_bias(spatial):
    """The single unit of an axis of length 1 must not be mistaken for something that all units share."""
    w = draw(0, (2, 2, 3, 1) if spatial else (3, 1), (1,), (4 if spatial else 1, 2))
    params = {"narrow": {"w": w[0], "b": w[1]}, "out": {"w": w[2]}}

    def apply_fn(params, x):
        kernel = params["narrow"]["w"]
        if spatial:
            dims = ("NHWC", "HWIO", "NHWC")
            h = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=dims)
        else:
            h = x @ kernel
        return jnp.tanh(h + params["narrow"]["b"]).reshape(len(x), -1) @ params["out"]["w"]

    units = cbp_jax.discover_units(apply_fn, params, jnp.ones((2, 3, 3, 3) if spatial else (2, 3)))
    assert [(g.name, g.size) for g in units] == [("narrow", 1)]
    assert paths(units[0].biases) == ["narrow/b"]


LEFT_OUT = {
    "softmax": (lambda h, p: jax.nn.softmax(h), "exp|softmax|reduce|div|sub"),
    "attention": (lambda h, p: jax.nn.softmax(h @ h.T) @ h, "multipl|dot_general|contract"),
    "sum over units": (lambda h, p: h + h.sum(-1, keepdims=True), "reduce_sum|sum"),
    "divided by the greatest": (lambda h, p: h / jnp.max(h, axis=-1, keepdims=True), "reduce_max"),
    "scaled by their sum": (lambda h, p: h * h.sum(-1, keepdims=True), "reduce_sum"),
    "read by a kernel after a sum": (lambda h, p: jnp.tile(h.mean(-1, keepdims=True), 6), "reduce_sum"),
    "sort": (lambda h, p: jnp.sort(h, axis=-1), "sort"),
    "cumulative sum": (lambda h, p: jnp.cumsum(h, axis=-1), "cumsum"),
    "while": (
        lambda h, p: jax.lax.while_loop(lambda c: c.sum() > 0, lambda c: jnp.tanh(c @ p["s"][0]), h),
        "while.*what a loop computes",
    ),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_constructs_not_understood_are_left_out_with_a_reason(name):
    construct, reason = LEFT_OUT[name]
    params = {"ok": draw(0, (3, 4)), "bad": draw(1, (4, 6)), "s": draw(3, (6, 6)), "out": draw(2, (6, 2))}
    apply_fn = lambda p, x: construct(jnp.tanh(jnp.tanh(x @ p["ok"][0]) @ p["bad"][0]), p) @ p["out"][0]
    units = cbp_jax.discover_units(apply_fn, params, draw(4, (4, 3))[0])
    assert [g.name for g in units] == ["ok"]
    text = str(units.left_out)
    assert "bad" in text
    assert re.search(reason, text), text
    assert "bad" in str(units), "the printed table lists what is left out"


CONSTRUCTS = {
    "residual": lambda h, p: h + jnp.tanh(h @ p["square"]),
    "residual before": lambda h, p: jnp.tanh(h + h @ p["square"]),
    "dense net": lambda h, p: jnp.concatenate([h[:, :3], jnp.tanh(h @ p["square"])[:, 3:]], -1),
    "gated": lambda h, p: jnp.tile(h[:, :3] * jax.nn.sigmoid(h[:, 3:]), (1, 2)),
    "product": lambda h, p: h * jnp.tanh(h @ p["square"]),
    "maxout": lambda h, p: jnp.repeat(jnp.maximum(h[:, :3], h[:, 3:]), 2, axis=-1),
    "reversed": lambda h, p: h[:, ::-1],
    "rolled": lambda h, p: jnp.roll(h, 1, axis=-1),
    "permuted": lambda h, p: h[:, jnp.asarray([3, 1, 0, 2, 5, 4])],
    "sliced and padded": lambda h, p: jnp.pad(h[:, 1:4], ((0, 0), (2, 1))),
    "grouped": lambda h, p: h.reshape(-1, 3, 2).transpose(0, 2, 1).reshape(-1, 6),
    "scaled": lambda h, p: h * p["vector"] + p["vector"],
    "used twice": lambda h, p: jnp.tanh(jnp.tanh(h @ p["square"]) @ p["square"]),
    "used transposed": lambda h, p: jnp.tanh(jnp.tanh(h @ p["square"]) @ p["square"].T),
    # Statistics mix units, which is the only allowed dependency, so they are frozen.
    "layer norm": lambda h, p: (h - jax.lax.stop_gradient(h.mean(-1, keepdims=True))) * p["vector"],
    "normalized by others": lambda h, p: jnp.tile(h[:, :3] / h[:, 3:].std(-1, keepdims=True), 2),
    "batch norm": lambda h, p: (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-3),
    "kernel of the kernel": lambda h, p: h @ (p["square"] * p["vector"]),
    "weight of activations": lambda h, p: h @ jnp.tanh(h.T @ h),
    "while": lambda h, p: jax.lax.fori_loop(0, 2, lambda i, c: jnp.tanh(c @ p["square"]), h),
    "cond": lambda h, p: jax.lax.cond(h.sum() > 0, jnp.tanh, jnp.sin, h),
    "remat": lambda h, p: jax.checkpoint(lambda h: jnp.tanh(h @ p["square"]))(h),
    "spoken aloud": lambda h, p: h,  # this one is also returned; see below
    "over the batch": lambda h, p: h + h.sum(0),
    "vmapped": lambda h, p: jax.vmap(lambda row: jnp.tanh(row @ p["square"]))(h),
}


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_a_group_is_never_silently_wrong(name):
    """Every found group must be right: resetting a unit silences its own incoming weights, and no others.

    The construct follows the hidden layer `first`. After one unit of a group is reset, the output must
    have gradient 0 with respect to exactly those incoming weights that were resampled. A construct may also
    be left out.
    """
    w = draw(0, (3, 6), (6,), (6, 6), (6,), (6, 2))
    params = dict(zip(["first", "offset", "square", "vector", "last"], w, strict=True))
    params = {k: {"w": leaf} for k, leaf in params.items()}

    def apply_fn(params, x):
        p = {k: leaf["w"] for k, leaf in params.items()}
        h = jnp.tanh(x @ p["first"] + p["offset"])
        out = CONSTRUCTS[name](h, p) @ p["last"]
        return (out, h) if name == "spoken aloud" else out

    x = draw(5, (8, 3))[0]
    try:
        units = cbp_jax.discover_units(apply_fn, params, x)
    except ValueError as error:
        assert "first" in str(error)
        return
    if name not in ("residual", "residual before", "dense net", "product"):
        assert "first" in [g.name for g in units] or "first" in str(units.left_out)
    if name in ("residual", "residual before", "product"):
        for group in units:
            if "last/w" in paths(group.outgoing):
                assert {"first/w", "square/w"} <= set(paths(group.incoming)), "half a unit"

    @jax.jit
    def gradient(params):
        weigh = lambda out: jnp.sum(jnp.sin(out * jnp.arange(1.0, 1 + out.shape[-1])))
        return jax.grad(lambda p: sum(weigh(out) for out in jax.tree.leaves(apply_fn(p, x))))(params)

    before = gradient(params)
    rng = np.random.default_rng(7)
    for group in units:
        for unit in (0, group.size - 1):
            new = jax.tree.map(np.array, params)
            drawn = {path: np.zeros(new[path.split("/")[0]]["w"].shape, bool) for path in paths(group.incoming)}
            for part in group.incoming:
                mask = rows_of(part, unit, drawn[part.path].shape)
                drawn[part.path] |= mask
                new[part.path.split("/")[0]]["w"][mask] = rng.normal(size=mask.sum())
            for part in (*group.biases, *(consumer.kernel for consumer in group.outgoing)):
                leaf = new[part.path.split("/")[0]]["w"]
                leaf[rows_of(part, unit, leaf.shape)] = 0.0
            after = gradient(new)
            for path, mask in drawn.items():
                now, then = (np.asarray(tree[path.split("/")[0]]["w"]) for tree in (after, before))
                assert mask.any() and np.all(now[mask] == 0), "the output still depends on the new unit"
                assert not np.any((now == 0) & (then != 0) & ~mask), "the reset has silenced a neighbor"
