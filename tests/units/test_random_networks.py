"""Random networks of all constructs, including deceptive ones: even without the check, no group is wrong.

The tests use the check by evaluation, which is independent of the rules, and a few real resets.
"""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import cbp_jax

WIDTH = 6


class Net:
    """A network on sequences [batch, time, data], a list of constructs. Parameters are drawn in the first run."""

    def __init__(self, constructs, batch, pooled):
        self.constructs, self.batch, self.pooled = constructs, batch, pooled

    def __call__(self, params, x, state):
        self.params, self.count, self.state, self.new = params, 0, state, {}
        x = jnp.tanh(self.dense(x, WIDTH))
        for name in self.constructs:
            x = CONSTRUCTS[name](self, x)
        x = x.mean(1) if self.pooled else x[:, -1]
        return self.dense(x, 2), self.new

    def leaf(self, *shape):
        name = f"p{self.count:02d}"
        self.count += 1
        if name not in self.params:
            rng = np.random.default_rng(self.count)
            self.params[name] = np.asarray(rng.normal(size=shape) * 0.5, np.float32)
        return jnp.asarray(self.params[name])

    def carry(self, shape):
        """Return the state, which is an input and an output."""
        name = f"s{len(self.new)}"
        self.new[name] = None
        if name not in self.state:
            self.state[name] = np.full(shape, 0.3, np.float32)
        return name, jnp.asarray(self.state[name])

    def dense(self, x, width):
        return x @ self.leaf(x.shape[-1], width) + self.leaf(width)


total = functools.partial(jnp.sum, axis=-1, keepdims=True)
mean = functools.partial(jnp.mean, axis=-1, keepdims=True)


def residual(net, x):
    return x + net.dense(jnp.tanh(net.dense(x, 5)), WIDTH)


def gated(net, x):
    return net.dense(jax.nn.silu(net.dense(x, 4)) * net.dense(x, 4), WIDTH)


def layer_norm(net, x):
    h = (x - mean(x)) * jax.lax.rsqrt(jnp.var(x, -1, keepdims=True) + 1e-3)
    return net.dense(h * net.leaf(WIDTH) + net.leaf(WIDTH), WIDTH)


def rms_norm(net, x):
    return net.dense(x / jnp.sqrt(mean(x**2) + 1e-3), WIDTH)


def attention(net, x):
    q, k, v = (net.dense(x, 6).reshape(*x.shape[:2], 2, 3) for _ in range(3))
    weights = jax.nn.softmax(jnp.einsum("bqhe,bkhe->bhqk", q, k))
    return x + net.dense(jnp.einsum("bhqk,bkhe->bqhe", weights, v).reshape(*x.shape[:2], 6), WIDTH)


def batch_norm(net, x):
    x, (name, state) = net.dense(x, WIDTH), net.carry((WIDTH,))
    center = x.mean((0, 1))
    net.new[name] = 0.9 * state + 0.1 * center
    return jnp.tanh((x - center) * jax.lax.rsqrt(x.var((0, 1)) + 1e-3))


def cell(net, x):
    wx, wh, b = net.leaf(WIDTH, WIDTH), net.leaf(WIDTH, WIDTH), net.leaf(WIDTH)
    step = lambda h, x: (lambda h: (h, h))(jnp.tanh(x @ wx + h @ wh + b))
    return jnp.moveaxis(jax.lax.scan(step, jnp.zeros((len(x), WIDTH)), jnp.moveaxis(x, 1, 0))[1], 0, 1)


def stacked(net, x):
    kernels = net.leaf(2, WIDTH, 4), net.leaf(2, 4, WIDTH)
    return jax.lax.scan(lambda x, k: (x + jnp.tanh(x @ k[0]) @ k[1], None), x, kernels)[0]


def ensemble(net, x):
    kernels = net.leaf(2, WIDTH, 4), net.leaf(2, 4, WIDTH)
    return jax.vmap(lambda a, b: jnp.tanh(x @ a) @ b)(*kernels).mean(0)


def scalar(net, x):
    t = net.leaf()
    return jnp.exp(t) * jnp.tanh(x) + (1 - jax.nn.sigmoid(t)) * x


def class_token(net, x):
    return jnp.concatenate([jnp.tile(net.leaf(1, 1, WIDTH), (len(x), 1, 1)), x], 1)


def mask_token(net, x):
    return jnp.where(jnp.arange(x.shape[1])[:, None] % 2 == 0, net.leaf(WIDTH), x)


def cut(net, x):
    return jnp.concatenate([x[..., 3:], jnp.tanh(net.dense(x[..., :3], 3))], -1)


# Deceptive constructs, which look like something else.
def softmax(net, x):
    e = jnp.exp(net.dense(x, WIDTH))
    return net.dense(e / total(e), WIDTH)


def part_of_sum(net, x):
    h = net.dense(x, WIDTH)
    return net.dense(jax.nn.relu(h - 0.3 * total(h)), WIDTH)


def gate_of_sum(net, x):
    return x * jax.nn.sigmoid(total(x))


def squared_sum(net, x):
    h = net.dense(x, WIDTH)
    return net.dense(h - jax.nn.relu(total(h)) ** 2, WIDTH)


def log_sum(net, x):
    h = net.dense(x, WIDTH)
    return net.dense(h - jax.nn.logsumexp(h, -1, keepdims=True), WIDTH)


def norm_of_others(net, x):
    h, other = net.dense(x, WIDTH), net.dense(x, WIDTH)
    return net.dense(h / jnp.linalg.norm(other, axis=-1, keepdims=True), WIDTH)


def leaky(net, x):
    """Apply a carry that looks like running statistics but is not."""
    h, (name, state) = net.dense(x, WIDTH), net.carry((len(x), 1, WIDTH))
    h = 0.5 * state + h
    net.new[name] = h[:, :1]
    return jnp.tanh(net.dense(h, WIDTH))


def mixer(net, x):
    return x + jnp.einsum("btd,ts->bsd", x, net.leaf(x.shape[1], x.shape[1]))


def maximum(net, x):
    h = net.dense(x, WIDTH)
    return net.dense(jnp.concatenate([h, h.max(-1, keepdims=True)], -1), WIDTH)


def multi_query(net, x):
    q, k, v = net.dense(x, 6).reshape(*x.shape[:2], 2, 3), net.dense(x, 3), net.dense(x, 3)
    weights = jax.nn.softmax(jnp.einsum("bqhe,bke->bhqk", q, k))
    return x + net.dense(jnp.einsum("bhqk,bke->bqhe", weights, v).reshape(*x.shape[:2], 6), WIDTH)


def sorted_units(net, x):
    return net.dense(jnp.sort(net.dense(x, WIDTH), -1), WIDTH)


HONEST = [residual, gated, layer_norm, rms_norm, attention, batch_norm, cell, stacked, ensemble, scalar, class_token]
HONEST += [mask_token, cut]
DECEPTIVE = [
    softmax,
    part_of_sum,
    gate_of_sum,
    squared_sum,
    log_sum,
    norm_of_others,
    leaky,
    mixer,
    maximum,
    multi_query,
]
DECEPTIVE += [sorted_units]
CONSTRUCTS = {construct.__name__: construct for construct in HONEST + DECEPTIVE}


def check(names, batch, pooled):
    net = Net(names, batch, pooled)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(batch, 4, 3)), jnp.float32)
    params, state = {}, {}
    jax.eval_shape(lambda x: net(params, x, state), x)  # draws the parameters
    params, state = dict(params), dict(state)
    run = lambda params, state, x: net(dict(params), x, dict(state))
    try:
        units = cbp_jax.discover_units(run, params, state, x, check=False)
    except ValueError as error:
        assert "no units can be replaced" in str(error)
        return ()
    checked = cbp_jax.discover_units(run, params, state, x, check=True)
    assert str(checked) == str(units), "a group is wrong"
    incoming = [(part.path, part.axes, row) for g in units for part in g.incoming for row in part.index.ravel()]
    assert len(set(incoming)) == len(incoming), "two units have the same column"
    return units


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_single_constructs(name):
    units = check([name], 2, True)
    assert units or name in ("gate_of_sum", "mixer")  # these leave no unit


def test_units_of_ordinary_constructs_are_found():
    for construct in HONEST:
        units = check([construct.__name__], 2, False)
        assert len(units.left_out) == 1, (construct.__name__, units)


networks = dict(
    names=st.lists(st.sampled_from(sorted(CONSTRUCTS)), min_size=2, max_size=5),
    batch=st.sampled_from([1, 2]),
    pooled=st.booleans(),
)


@hypothesis.settings(max_examples=15)
@hypothesis.given(**networks)
def test_random_networks(names, batch, pooled):
    check(names, batch, pooled)


@pytest.mark.slow
@hypothesis.settings(max_examples=400)
@hypothesis.given(**networks)
def test_many_random_networks(names, batch, pooled):
    check(names, batch, pooled)
    jax.clear_caches()  # hundreds of compiled networks would fill the memory
