"""Units of common architectures: random networks of every construct, and the units of known networks."""

import functools
import time

import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import resets
from hypothesis import strategies as st

import cbp_jax
from cbp_jax import nets
from cbp_jax.units import LeftOutKind

# Cases that are similar to others and take seconds to compile; see conftest.py.
SLOW_CASES = {
    "test_chosen_networks": (
        "tied rematerialized half custom jitted pooled dilated--rms_norm perceptron-False-1",
        "joined depthwise grouped squeezed--gated-True-1",
        "residual projected batch_norm strided--hidden layer_norm-True-2",
        "strided group_norm-embedded attention perceptron fused_attention layer_norm--True-1",
    ),
}

# ------------------------------------------------------------------------- random networks of all constructs


class Net:
    """A network as a list of constructs. Parameters are drawn in the first run.

    `frozen` holds recorded statistics of normalizations that mix units, which are then used as constants.
    """

    def __init__(self, images, tokens, vectors, flatten, heads):
        self.images, self.tokens, self.vectors, self.flatten, self.heads = images, tokens, vectors, flatten, heads

    def __call__(self, params, x, frozen=None, record=None):
        self.params, self.frozen, self.record = params, None if frozen is None else iter(frozen), record
        self.count = 0
        x = self.conv(x, 4)
        for name in self.images:
            x = getattr(self, name)(x)
        if self.tokens:
            x = x.reshape(x.shape[0], -1, x.shape[-1])
            for name in self.tokens:
                x = getattr(self, name)(x)
            x = x[:, 0] if self.flatten else x.mean(1)
        else:
            x = x.reshape(x.shape[0], -1) if self.flatten else x.mean((1, 2))
        for name in self.vectors:
            x = getattr(self, name)(x)
        return jnp.concatenate([self.dense(x, 2 + head) for head in range(self.heads)], -1)

    def leaf(self, *shape, scale=0.5, name=None):
        name = name or f"p{self.count:02d}"
        self.count += 1
        if self.params.get(name) is None:
            rng = np.random.default_rng(self.count)
            self.params[name] = np.asarray(rng.normal(size=shape) * scale, np.float32)
        return jnp.asarray(self.params[name])

    def statistic(self, value):
        if self.frozen is not None:
            return next(self.frozen)
        if self.record is not None:
            self.record.append(value)
        return value

    # ------------------------------------------------------------------------------------------- layers

    def conv(self, x, width, size=3, stride=1, dilation=1, groups=1, kernel=None):
        if kernel is None:
            kernel = self.leaf(size, size, x.shape[-1] // groups, width, scale=0.4)
        bias = self.leaf(kernel.shape[-1])
        out = jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", rhs_dilation=(dilation, dilation), feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return out + bias

    def dense(self, x, width):
        return x @ self.leaf(x.shape[-1], width) + self.leaf(width)

    def scaled(self, x):
        return x * (1 + self.leaf(x.shape[-1])) + self.leaf(x.shape[-1])

    # ------------------------------------------------------------------------------------------- images

    def plain(self, x):
        return jnp.tanh(self.conv(x, 3))

    def strided(self, x):
        return jax.nn.gelu(self.conv(x, 4, stride=2))

    def dilated(self, x):
        return jnp.sin(self.conv(x, 4, dilation=2))

    def pooled(self, x):
        return nn.avg_pool(nn.max_pool(x, (2, 2), (1, 1), padding="SAME"), (2, 2), (1, 1), padding="SAME")

    def residual(self, x):
        return x + self.conv(jnp.tanh(self.conv(x, 3)), x.shape[-1])

    def projected(self, x):
        return jnp.tanh(self.conv(jnp.tanh(self.conv(x, 3, stride=2)), 4) + self.conv(x, 4, size=1, stride=2))

    def joined(self, x):
        return jnp.concatenate([jnp.tanh(x), jnp.tanh(self.conv(x, 2))], -1)

    def depthwise(self, x):
        return self.conv(jnp.tanh(self.conv(x, 2 * x.shape[-1], groups=x.shape[-1])), 4, size=1)

    def grouped(self, x):
        return jnp.tanh(self.conv(jnp.tanh(self.conv(x, 4)), 6, groups=2))

    def squeezed(self, x):
        gate = self.dense(jnp.tanh(self.dense(x.mean((1, 2)), 3)), x.shape[-1])
        return x * jax.nn.sigmoid(gate)[:, None, None]

    def tied(self, x):
        kernel = self.leaf(3, 3, x.shape[-1], x.shape[-1], scale=0.4)
        return jnp.tanh(self.conv(jnp.tanh(self.conv(x, 0, kernel=kernel)), 0, kernel=kernel))

    def rematerialized(self, x):
        kernels = self.leaf(1, 1, x.shape[-1], 3), self.leaf(3), self.leaf(1, 1, 3, 4), self.leaf(4)

        @jax.checkpoint
        def block(x, w, b, v, c):
            return jnp.tanh(jnp.tanh(jnp.einsum("bhwi,io->bhwo", x, w[0, 0]) + b) @ v[0, 0] + c)

        return block(x, *kernels)

    def jitted(self, x):
        return jax.jit(lambda x, w, b: jax.nn.silu(x @ w + b))(x, self.leaf(x.shape[-1], 3), self.leaf(3))

    def half(self, x):
        kernel, bias = self.leaf(x.shape[-1], 4), self.leaf(4)
        return jnp.tanh((x.astype(jnp.bfloat16) @ kernel.astype(jnp.bfloat16)).astype(jnp.float32) + bias)

    def custom(self, x):
        @jax.custom_jvp
        def squash(h):
            return jnp.tanh(h)

        squash.defjvp(lambda primals, tangents: (squash(*primals), 2.0 * tangents[0]))
        return squash(self.conv(x, 4, size=1))

    def batch_norm(self, x):
        x = self.conv(x, 4)
        axes = tuple(range(x.ndim - 1))
        return jnp.tanh(self.scaled((x - x.mean(axes)) * jax.lax.rsqrt(x.var(axes) + 1e-3)))

    def group_norm(self, x):
        x = self.conv(x, 4)
        parts = x.reshape(*x.shape[:-1], 2, 2)
        mean = self.statistic(parts.mean((1, 2, 4), keepdims=True))
        variance = self.statistic(jnp.square(parts - mean).mean((1, 2, 4), keepdims=True))
        return jnp.tanh(self.scaled(((parts - mean) / jnp.sqrt(variance + 1e-3)).reshape(x.shape)))

    # --------------------------------------------------------------------------------- tokens and vectors

    def layer_norm(self, x):
        mean = self.statistic(x.mean(-1, keepdims=True))
        variance = self.statistic(x.var(-1, keepdims=True))
        return self.scaled((x - mean) * jax.lax.rsqrt(variance + 1e-3))

    def rms_norm(self, x):
        square = self.statistic(jnp.mean(x**2, -1, keepdims=True))
        return x / jnp.sqrt(square + 1e-3) * self.leaf(x.shape[-1])

    def embedded(self, x):
        token = jnp.broadcast_to(self.leaf(1, 1, x.shape[-1]), (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([token, self.dense(x, x.shape[-1]) + self.leaf(x.shape[1], x.shape[-1])], 1)
        return x + self.leaf(9, x.shape[-1])[jnp.arange(x.shape[1]) % 9]

    def attention(self, x):
        h, width = self.layer_norm(x), x.shape[-1]
        q, k, v = (jnp.einsum("btd,dhe->bthe", h, self.leaf(width, 2, 3)) + self.leaf(2, 3) for _ in range(3))
        weights = jax.nn.softmax(jnp.einsum("bqhe,bkhe->bhqk", q, k) / 3.0)
        mixed = jnp.einsum("bhqk,bkhe->bqhe", weights, v)
        return x + jnp.einsum("bthe,hed->btd", mixed, self.leaf(2, 3, width)) + self.leaf(width)

    def fused_attention(self, x):
        h, width = self.rms_norm(x), x.shape[-1]
        q, k, v = jnp.split(self.dense(h, 12).reshape(*x.shape[:2], 2, 6), 3, -1)
        weights = jax.nn.softmax(jnp.einsum("bqhe,bkhe->bhqk", q, k))
        return x + self.dense(jnp.einsum("bhqk,bkhe->bqhe", weights, v).reshape(*x.shape[:2], -1), width)

    def perceptron(self, x):
        return x + self.dense(jax.nn.gelu(self.dense(self.layer_norm(x), 5)), x.shape[-1])

    def gated(self, x):
        return self.dense(jax.nn.silu(self.dense(x, 4)) * self.dense(x, 4), 3)

    def hidden(self, x):
        return jnp.tanh(self.dense(x, 4))


IMAGES = """plain strided dilated pooled residual projected joined depthwise grouped squeezed tied rematerialized jitted
half custom batch_norm group_norm""".split()
TOKENS = "layer_norm embedded attention fused_attention perceptron gated".split()
VECTORS = "hidden gated layer_norm rms_norm perceptron".split()


def check(net):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4, 4, 2)), jnp.float32)
    params = {}
    jax.eval_shape(functools.partial(net, params), x)  # draws the parameters
    params = dict(params)
    run = lambda params, x: net(dict(params), x)
    units = cbp_jax.discover_units(run, params, x)
    # Heads are part of the output; everything else is a group.
    assert len(units.left_out) == net.heads, units
    assert all(item.kind is LeftOutKind.OUTPUT for item in units.left_out), units
    incoming = [(part.path, part.axes, row) for g in units for part in g.incoming for row in part.index.ravel()]
    assert len(set(incoming)) == len(incoming), "two units have the same column"

    @jax.jit
    def statistics(params):
        record = []
        net(dict(params), x, record=record)
        return record

    frozen = statistics(params)
    fixed = lambda params: net(dict(params), x, frozen=frozen)
    apply = cbp_jax.with_features(fixed, units)
    _, features = jax.eval_shape(apply, params)
    for group in units:
        for array, consumer in zip(jax.tree.leaves(features[group.name]), group.operands(), strict=True):
            positions, size = consumer.kernel.index.shape
            assert array.shape[-1] == size and (positions == 1 or array.shape[-2] == positions)
    moved = resets.check_resets(units, params, apply, rtol=2e-2 if "half" in net.images else 1e-4)
    # If only the output reads a group, compensation certainly reduces its change.
    outputs = {item.name for item in units.left_out}
    for group in units:
        if outputs.issuperset(resets.paths(group.outgoing)):
            without, compensated = moved[group.name]
            assert compensated <= without * 1.001 + 1e-9, group.name
    return moved


@pytest.mark.parametrize(
    "images, tokens, vectors, flatten, heads",
    [
        ("residual projected batch_norm strided", "", "hidden layer_norm", True, 2),
        ("joined depthwise grouped squeezed", "", "gated", True, 1),
        ("tied rematerialized half custom jitted pooled dilated", "", "rms_norm perceptron", False, 1),
        ("strided group_norm", "embedded attention perceptron fused_attention layer_norm", "", True, 1),
    ],
)
def test_chosen_networks(images, tokens, vectors, flatten, heads):
    moved = check(Net(images.split(), tokens.split(), vectors.split(), flatten, heads))
    without, compensated = (sum(values) for values in zip(*moved.values(), strict=True))
    assert compensated < without


@pytest.mark.slow
@hypothesis.settings(max_examples=300)
@hypothesis.given(
    images=st.lists(st.sampled_from(IMAGES), max_size=4),
    tokens=st.lists(st.sampled_from(TOKENS), max_size=4),
    vectors=st.lists(st.sampled_from(VECTORS), max_size=2),
    flatten=st.booleans(),
    heads=st.integers(1, 2),
)
def test_random_networks(images, tokens, vectors, flatten, heads):
    check(Net(images, tokens, vectors, flatten, heads))
    jax.clear_caches()  # hundreds of compiled networks would fill the memory


# ------------------------------------------------------------------------------------------- known networks


def shapes_of(net, *inputs):
    return jax.eval_shape(net.init, jax.random.key(0), *inputs)


def summary(units):
    return [
        (group.name, group.size, group.kind, len(group.incoming), len(group.outgoing)) for group in units
    ]  # fmt: skip


def test_resnet_18():
    """There is one group for each stage, which 3 kernels write, and one inside each of the 8 blocks."""
    net, x = nets.ResNet(num_outputs=100), jnp.zeros((2, 32, 32, 3))
    variables = shapes_of(net, x)
    apply_fn = lambda params, stats, x: net.apply(
        {"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"]
    )
    start = time.perf_counter()
    units = cbp_jax.discover_units(apply_fn, variables["params"], variables["batch_stats"], x)
    assert time.perf_counter() - start < 5
    expected = []
    for stage, (width, first, readers) in enumerate(
        [(64, "stem", 4), (128, None, 3), (256, None, 3), (512, None, 2)], 1
    ):
        residual = (first or f"stage{stage}_block1_conv2", width, "residual", 3, readers)
        inside = [(f"stage{stage}_block{block}_conv1", width, "conv", 1, 1) for block in (1, 2)]
        expected += [residual, *inside] if first else [inside[0], residual, inside[1]]
    assert summary(units) == expected and len(units) == 12
    for group in units:  # each kernel has a bias and a norm with scale, offset and two statistics
        count = len(group.incoming)
        assert (len(group.biases), len(group.scales), len(group.statistics)) == (2 * count, count, 2 * count)
    assert [item.name for item in units.left_out] == ["head"]
    assert [g.size for g in units.select(kind="conv")] == [64, 64, 128, 128, 256, 256, 512, 512]


def test_convnet_of_the_paper():
    """Units are channels and neurons. A row for each position of the flattened image reads the last channels."""
    net, x = nets.ConvNet(num_outputs=2), jnp.zeros((1, 32, 32, 3))
    units = cbp_jax.discover_units(net.apply, shapes_of(net, x), x)
    names = ["Conv_0", "Conv_1", "Conv_2", "Dense_0", "Dense_1"]
    kinds = ["conv"] * 3 + ["dense"] * 2
    sizes = [32, 64, 128, 128, 128]
    assert [(g.name, g.size, g.kind) for g in units] == list(
        zip([f"params/{name}" for name in names], sizes, kinds, strict=True)
    )
    assert [group.outgoing[0].kernel.positions for group in units] == [1, 1, 4, 1, 1]


def test_transformer_of_12_layers():
    """Groups are the residual stream, and the heads and hidden units of each layer."""
    net, x = nets.ViT(num_outputs=10, depth=12, width=16, heads=4, hidden=24), jnp.zeros((1, 8, 8, 3))
    units = cbp_jax.discover_units(net.apply, shapes_of(net, x), x)
    # The patches and two kernels of each layer write the stream; four kernels of each layer and the head read it.
    expected = [("params/patches", 16, "residual", 25, 49)]
    for layer in range(12):
        expected.append((f"params/encoder/layer{layer}_attention/query", 4, "head", 3, 1))
        expected.append((f"params/encoder/layer{layer}_mlp1", 24, "dense", 1, 1))
    assert summary(units) == expected
    stream, head = units[:2]
    assert {"params/class_token", "params/positions"} <= set(resets.paths(stream.biases))
    assert len(stream.scales) == 25 and len(resets.paths(stream.biases)) == 2 + 25 + 25
    assert [part.positions for part in (*head.incoming, *head.biases, head.outgoing[0].kernel)] == [4] * 7
    assert [part.path.split("/")[-2] for part in head.incoming] == ["query", "key", "value"]


class Language(nn.Module):
    tied: bool

    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(20, 8, name="table")
        x = table(tokens) + nn.Embed(5, 8, name="places")(jnp.arange(tokens.shape[1]))
        x = nets.Encoder(1, 2, 16, name="encoder")(x)
        return table.attend(x) if self.tied else nn.Dense(20, name="head")(x)


def test_embeddings_are_incoming_unless_they_compute_the_output():
    net, tokens = Language(False), jnp.zeros((2, 5), int)
    params = jax.jit(net.init)(jax.random.key(0), tokens)
    units = cbp_jax.discover_units(net.apply, params, tokens)
    assert [(g.name, g.size, g.kind) for g in units][:1] == [("params/table", 8, "residual")]
    assert [part.path for part in units[0].incoming if part.lookup] == [
        "params/table/embedding",
        "params/places/embedding",
    ]


def test_tied_embeddings_are_outgoing():
    """A replaced dimension of the stream starts with 0 in the table that both embeds tokens and computes the output."""
    net, tokens = Language(True), jnp.arange(10).reshape(2, 5)
    units = cbp_jax.discover_units(net.apply, shapes_of(net, tokens), tokens)
    assert [group.kind for group in units] == ["residual", "head", "dense"]
    assert "params/table/embedding" in resets.paths(units[0].outgoing)
    assert resets.paths(units[0].incoming)[0] == "params/places/embedding"

    rng = np.random.default_rng(0)
    params = {"table": (20, 4), "up": (4, 6), "down": (6, 4)}
    params = {name: jnp.float32(rng.normal(size=shape)) for name, shape in params.items()}

    def apply_fn(p, tokens, blocks=1):
        x = p["table"][tokens]
        for _ in range(blocks):
            x = x + jnp.tanh(x @ p["up"]) @ p["down"]
        return x @ p["table"].T

    units = cbp_jax.discover_units(apply_fn, params, tokens)
    assert [(g.name, g.size, resets.paths(g.incoming), resets.paths(g.outgoing)) for g in units] == [
        ("table", 4, ["down"], ["up", "table"]), ("up", 6, ["up"], ["down"])
    ]  # fmt: skip
    resets.check_resets(units, params, lambda p: (apply_fn(p, tokens), None))
    with pytest.raises(ValueError, match="table both makes it and reads it"):
        cbp_jax.discover_units(lambda p, x: apply_fn(p, x, 0), {"table": params["table"]}, tokens)


def test_fresh_embeddings_are_as_large_as_those_of_flax():
    params = {"table": jnp.zeros((4000, 25)), "out": jnp.ones((25, 2))}
    apply_fn = lambda params, tokens: jnp.tanh(params["table"][tokens]) @ params["out"]
    units = cbp_jax.discover_units(apply_fn, params, jnp.zeros(3, int))
    assert [(g.name, g.size, g.kind) for g in units] == [("table", 25, "embedding")]
    new = resets.make_reset(units, None)(params, {"table": [3]})
    assert 0.19 < np.std(new["table"][:, 3]) < 0.21  # 1 / sqrt(25)
    assert np.all(np.asarray(new["table"][:, 4:]) == 0) and np.all(np.asarray(new["out"][3]) == 0)


@pytest.mark.slow
def test_a_residual_network_trains_under_cbp_with_its_statistics():
    net, key = nets.ResNet(3, widths=(4, 6), blocks=(1, 1)), jax.random.key(0)
    x, y = jax.random.normal(key, (6, 8, 8, 3)), jnp.arange(6) % 3
    variables = jax.jit(net.init)(key, x)

    def apply_fn(params, stats, x):
        return net.apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])

    params, stats = variables["params"], variables["batch_stats"]
    units = cbp_jax.discover_units(apply_fn, params, stats, x)
    assert [(g.name, g.size, g.kind) for g in units] == [
        ("stem", 4, "residual"), ("stage1_block1_conv1", 4, "conv"), ("stage2_block1_conv1", 6, "conv"),
        ("stage2_block1_conv2", 6, "residual"),
    ]  # fmt: skip
    apply = cbp_jax.with_features(apply_fn, units)
    tx = cbp_jax.continual_backprop(
        cbp_jax.adam(1e-2), units, replacement_rate=0.5, maturity_threshold=0, compensate_bias=True
    )

    @jax.jit
    def step(params, stats, state):
        def loss_fn(params):
            (logits, new), features = apply(params, stats, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), (new["batch_stats"], features)

        grads, (stats_now, features) = jax.grad(loss_fn, has_aux=True)(params)
        updates, state = tx.update(grads, state, params, features=features)
        stats_now = cbp_jax.reset_batch_stats(stats_now, units, state.replaced)
        return optax.apply_updates(params, updates), stats_now, state

    new, stats, state = step(params, stats, tx.init(params))
    dead = np.asarray(state.replaced["stem"])
    assert dead.sum() == 2
    for layer in ("stem_norm", "stage1_block1_conv2_norm"):
        np.testing.assert_array_equal(np.asarray(stats[layer]["mean"])[dead], 0)
        np.testing.assert_array_equal(np.asarray(stats[layer]["var"])[dead], 1)
        assert np.all(np.asarray(stats[layer]["var"])[~dead] != 1)
        np.testing.assert_allclose(np.asarray(new[layer]["scale"])[dead], 1, atol=1e-6)
        np.testing.assert_allclose(np.asarray(new[layer]["bias"])[dead], 0, atol=1e-6)
    # A weight from one new unit to another is resampled; all other weights that read a new unit are 0.
    for reader, group in (("stage1_block1_conv1", 1), ("stage2_block1_projection", 3)):
        kernel = np.asarray(new[reader]["kernel"])[:, :, dead]
        np.testing.assert_allclose(kernel[..., ~np.asarray(state.replaced[units[group].name])], 0, atol=1e-7)
        assert np.all(np.abs(np.asarray(new[reader]["kernel"])[:, :, ~dead]).max((0, 1)) > 1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((new, stats, state.utility)))


def test_pooling_over_different_kinds_of_tokens():
    """A sum over a class token and patches is not a sum over units, although they are concatenated."""
    params = {
        "token": jnp.ones((1, 1, 4)),
        "patches": jnp.ones((3, 4)),
        "hidden": jnp.ones((4, 5)),
        "head": jnp.ones((5, 2)),
    }

    def apply_fn(params, x):
        token = jnp.broadcast_to(params["token"], (x.shape[0], 1, 4))
        x = jnp.tanh(jnp.concatenate([token, x @ params["patches"]], 1))
        return jnp.tanh(x.mean(1) @ params["hidden"]) @ params["head"]

    units = cbp_jax.discover_units(apply_fn, params, jnp.ones((2, 6, 3)))
    assert summary(units) == [("patches", 4, "dense", 1, 1), ("hidden", 5, "dense", 1, 1)]
    assert resets.paths(units[0].biases) == ["token"]


TOKENS_OF_PARAMETERS = {
    "tiled class token": (
        lambda p, x: jnp.concatenate([jnp.tile(p["token"], (len(x), 1, 1)), x @ p["patches"]], 1),
        [("patches", 4, ["token"]), ("hidden", 5, [])],
    ),
    "mask token": (
        lambda p, x: jnp.where(x[..., :1] > 0.5, p["token"], x @ p["patches"]),
        [("patches", 4, ["token"]), ("hidden", 5, [])],
    ),
    "learned queries": (
        lambda p, x: jnp.tanh(jnp.broadcast_to(p["token"][0], (len(x), 1, 4)) @ p["square"]) + x @ p["patches"],
        [("token", 4, []), ("square", 4, []), ("hidden", 5, [])],
    ),
}


@pytest.mark.parametrize("name", TOKENS_OF_PARAMETERS)
def test_parameters_that_are_tokens(name):
    tokens, expected = TOKENS_OF_PARAMETERS[name]
    rng = np.random.default_rng(0)
    shapes = {"token": (1, 1, 4), "patches": (3, 4), "square": (4, 4), "hidden": (4, 5), "head": (5, 2)}
    params = {key: jnp.float32(rng.normal(size=shape)) for key, shape in shapes.items()}
    x = jnp.float32(rng.normal(size=(2, 6, 3)))
    apply_fn = lambda p, x: jnp.tanh(jnp.tanh(tokens(p, x)).mean(1) @ p["hidden"]) @ p["head"]
    units = cbp_jax.discover_units(apply_fn, params, x)
    assert [(g.name, g.size, resets.paths(g.biases)) for g in units] == expected
    resets.check_resets(units, params, lambda p: (apply_fn(p, x), None))


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENS_OF_PARAMETERS)
def test_networks_with_tokens_of_parameters_train_with_replacements(name):
    rng = np.random.default_rng(0)
    shapes = {"token": (1, 1, 4), "patches": (3, 4), "square": (4, 4), "hidden": (4, 5), "head": (5, 2)}
    params = {key: jnp.float32(rng.normal(size=shape)) for key, shape in shapes.items()}
    x = jnp.float32(rng.normal(size=(4, 6, 3)))
    tokens, _ = TOKENS_OF_PARAMETERS[name]
    apply_fn = lambda p, x: jnp.tanh(jnp.tanh(tokens(p, x)).mean(1) @ p["hidden"]) @ p["head"]
    units = cbp_jax.discover_units(apply_fn, params, x)
    apply = cbp_jax.with_features(apply_fn, units)
    losses, replaced = resets.train(units, params, lambda p: apply(p, x), x[:, 0, :2])
    assert losses[-1] < 0.7 * losses[0] and all(count >= 5 for count in replaced.values())
