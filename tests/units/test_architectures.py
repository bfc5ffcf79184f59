"""Units of the architectures that people use: random networks of every construct, and what is found in known ones."""

import functools

import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import resets
from hypothesis import strategies as st

import cbp_jax

# ------------------------------------------------------------------------- random networks of all constructs


class Net:
    """A network as a list of constructs. Its parameters are drawn when it first runs.

    `frozen` holds the statistics of norms that mix units, as they were recorded, to be taken as constants.
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
        gate = self.dense(jax.nn.relu(self.dense(x.mean((1, 2)), 3)), x.shape[-1])
        return x * jax.nn.sigmoid(gate)[:, None, None]

    def tied(self, x):
        kernel = self.leaf(3, 3, x.shape[-1], x.shape[-1], scale=0.4)
        return jnp.tanh(self.conv(jnp.tanh(self.conv(x, 0, kernel=kernel)), 0, kernel=kernel))

    def rematerialised(self, x):
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


IMAGES = """plain strided dilated pooled residual projected joined depthwise grouped squeezed tied rematerialised jitted
half custom batch_norm group_norm""".split()
TOKENS = "layer_norm embedded attention fused_attention perceptron gated".split()
VECTORS = "hidden gated layer_norm rms_norm perceptron".split()


def check(net):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4, 4, 2)), jnp.float32)
    params = {}
    jax.eval_shape(functools.partial(net, params), x)  # draws them
    params = dict(params)
    run = lambda params, x: net(dict(params), x)
    units = cbp_jax.discover_units(run, params, x)
    # Heads are part of the output; all else is a group.
    assert len(units.left_out) == net.heads, units
    assert all("output" in item.reason for item in units.left_out), units
    incoming = [(part.path, part.axes, row) for g in units for part in g.incoming for row in part.index.ravel()]
    assert len(set(incoming)) == len(incoming), "two units own one column"

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
    print(moved)
    without, compensated = (sum(values) for values in zip(*moved.values(), strict=True))
    assert compensated < without


@pytest.mark.parametrize(
    "images, tokens, vectors, flatten, heads",
    [
        ("residual projected batch_norm strided", "", "hidden layer_norm", True, 2),
        ("joined depthwise grouped squeezed", "", "gated", True, 1),
        ("tied rematerialised half custom jitted pooled dilated", "", "rms_norm perceptron", False, 1),
        ("strided group_norm", "embedded attention perceptron fused_attention layer_norm", "", True, 1),
    ],
)
def test_chosen_networks(images, tokens, vectors, flatten, heads):
    check(Net(images.split(), tokens.split(), vectors.split(), flatten, heads))


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
