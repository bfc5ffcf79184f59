"""Layers stacked by `scan`, and recurrent cells: units of each layer, with activations returned by the scan."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import resets
from flax import nnx

import cbp_jax

# Cases that are similar to others and take seconds to compile; see conftest.py.
SLOW_CASES = {
    "test_the_state_of_a_cell_is_a_group": ("optimized lstm-False", "minimal-False", "simple-False", "gru-False"),
    "test_each_layer_has_its_units": ("linen, rematerialized", "nnx"),
    "test_gradients_with_and_without_features_are_equal": ("linen, rematerialized",),
}

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)
SEQUENCE = jnp.asarray(np.random.default_rng(1).normal(size=(4, 5, 3)), jnp.float32)


def draw(**shapes):
    rng = np.random.default_rng(2)
    return {name: jnp.float32(rng.normal(size=shape) / np.sqrt(shape[-2:][0])) for name, shape in shapes.items()}


# ---------------------------------------------------------------------------------------------------- stacked layers


def of_lax():
    params = draw(stem=(6, 4), up=(3, 4, 5), bias=(3, 5), down=(3, 5, 4), head=(4, 2))

    def apply_fn(p, x):
        block = lambda x, layer: (x + jnp.tanh(x @ layer[0] + layer[1]) @ layer[2], None)
        x, _ = jax.lax.scan(block, x @ p["stem"], (p["up"], p["bias"], p["down"]))
        return x @ p["head"]

    return apply_fn, params


class Block(nn.Module):
    norm: bool = False

    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm()(x) if self.norm else x
        return x + nn.Dense(4, name="down")(nn.tanh(nn.Dense(5, name="up")(h))), None


class Stack(nn.Module):
    norm: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        layers = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = layers(self.norm, name="layers")(nn.Dense(4, name="stem")(x), None)
        return nn.Dense(2, name="head")(x)


def of_linen(**options):
    net = Stack(**options)
    return net.apply, jax.jit(net.init)(jax.random.key(0), X)


def of_nnx():
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.up, self.down = nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, 4, rngs=rngs)

        def __call__(self, x):
            return x + self.down(nnx.tanh(self.up(x)))

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.stem, self.head = nnx.Linear(6, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)
            self.layers = nnx.vmap(Layer)(rngs.fork(split=3))

        def __call__(self, x):
            run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return self.head(run(self.stem(x), self.layers))

    graphdef, params = nnx.split(Model(nnx.Rngs(0)), nnx.Param)
    return lambda params, x: nnx.merge(graphdef, params)(x), params


STACKS = {
    "lax": of_lax,
    "linen": of_linen,
    "linen, rematerialized": lambda: of_linen(remat=True),
    "nnx": of_nnx,
}


@pytest.mark.parametrize("name", STACKS)
def test_each_layer_has_its_units(name):
    apply_fn, params = STACKS[name]()
    units = cbp_jax.discover_units(apply_fn, params, X)
    assert [group.size for group in units] == [4, 5, 5, 5] and len({group.name for group in units}) == 4
    assert [len(group.incoming) for group in units] == [2, 1, 1, 1]
    for number, group in enumerate(units[1:]):
        part = group.incoming[0]
        assert part.axes == (0, 2) and part.index.tolist() == [[5 * number + column for column in range(5)]]
    apply = cbp_jax.with_features(apply_fn, units)
    resets.check_resets(units, params, lambda p: apply(p, X))


@pytest.mark.parametrize(
    "name", ["lax", "linen, rematerialized", *[pytest.param(n, marks=pytest.mark.slow) for n in ("linen", "nnx")]]
)
def test_gradients_with_and_without_features_are_equal(name, exact):
    apply_fn, params = STACKS[name]()
    units = cbp_jax.discover_units(apply_fn, params, X)
    apply = cbp_jax.with_features(apply_fn, units)
    got, features = jax.jit(jax.grad(lambda p: (lambda o, f: (jnp.sin(o).sum(), f))(*apply(p, X)), has_aux=True))(
        params
    )
    want = jax.jit(jax.grad(lambda p: jnp.sin(apply_fn(p, X)).sum()))(params)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert [jax.tree.map(jnp.shape, features[group.name]) for group in units[1:]] == [(4, 5)] * 3


def test_features_are_those_of_their_layer():
    apply_fn, p = of_lax()
    units = cbp_jax.discover_units(apply_fn, p, X)
    _, features = jax.jit(cbp_jax.with_features(apply_fn, units))(p, X)
    x, reads = X @ p["stem"], []
    for up, bias, down in zip(p["up"], p["bias"], p["down"], strict=True):
        reads.append((x, jnp.tanh(x @ up + bias)))
        x = x + reads[-1][1] @ down
    for group, (_, want) in zip(units[1:], reads, strict=True):
        np.testing.assert_allclose(features[group.name], want, rtol=1e-5, atol=1e-6)
    stream = features[units[0].name]  # the inputs of the three layers, then of the head
    assert len(stream) == 4
    for got, want in zip(stream, [*(x for x, _ in reads), x], strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_normalized_layers():
    apply_fn, params = of_linen(norm=True)
    units = cbp_jax.discover_units(apply_fn, params, X, check=True)
    assert [(group.size, group.exact) for group in units] == [(4, False), (5, True), (5, True), (5, True)]
    assert len(units[0].scales) == 1 and units[0].scales[0].positions == 3


@pytest.mark.slow
def test_scans_in_scans_and_backward():
    """Blocks of layers run backward over time, with a kernel that all of them share."""
    params = draw(stem=(3, 4), inside=(2, 4, 4), shared=(4, 4), head=(4, 2))

    def apply_fn(p, x):
        def block(x, kernel):
            cell = lambda h, x: (lambda h: (h, h))(jnp.tanh(x @ kernel + h @ p["shared"]))
            _, out = jax.lax.scan(cell, jnp.zeros((4, 4)), x, reverse=True)
            return x + out, None

        x, _ = jax.lax.scan(block, jnp.moveaxis(x @ p["stem"], 1, 0), p["inside"])
        return x.mean(0) @ p["head"]

    units = cbp_jax.discover_units(apply_fn, params, SEQUENCE)
    assert [group.size for group in units] == [4]
    apply = cbp_jax.with_features(apply_fn, units)
    resets.check_resets(units, params, lambda p: apply(p, SEQUENCE))


def test_a_stack_that_is_built_twice_has_units_of_its_own():
    """Both scans run the same function, whose trace JAX caches."""
    params = draw(stem=(6, 4), a=(2, 4, 4), b=(2, 4, 4), head=(4, 2))
    block = lambda x, kernel: (jnp.tanh(x @ kernel), None)

    def apply_fn(p, x):
        x = jnp.tanh(x @ p["stem"])
        for name in ("a", "b"):
            x, _ = jax.lax.scan(block, x, p[name])
        return x @ p["head"]

    units = cbp_jax.discover_units(apply_fn, params, X)
    assert [group.size for group in units] == [4] * 5
    apply = cbp_jax.with_features(apply_fn, units)
    resets.check_resets(units, params, lambda p: apply(p, X))


@pytest.mark.slow
@pytest.mark.parametrize("name", STACKS)
def test_stacked_layers_train_with_replacements(name):
    apply_fn, params = STACKS[name]()
    units = cbp_jax.discover_units(apply_fn, params, X)
    apply = cbp_jax.with_features(apply_fn, units)
    losses, replaced = resets.train(units, params, lambda p: apply(p, X), X[:, :2])
    assert losses[-1] < 0.5 * losses[0] and all(count >= 5 for count in replaced.values())


# ------------------------------------------------------------------------------------------------------ recurrent cells

CELLS = {
    "gru": (nn.GRUCell, 6, 4),
    "lstm": (nn.LSTMCell, 8, 5),
    "optimized lstm": (nn.OptimizedLSTMCell, 8, 5),
    "minimal": (nn.MGUCell, 4, 3),
    "simple": (nn.SimpleCell, 2, 2),
}


class Recurrent(nn.Module):
    cell: type[nn.RNNCellBase]
    last: bool = False

    @nn.compact
    def __call__(self, x):
        h = nn.RNN(self.cell(7))(nn.tanh(nn.Dense(5, name="before")(x)))
        return nn.Dense(2, name="head")(h[:, -1] if self.last else h)


@pytest.mark.parametrize("last", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n == "lstm" else []) for n in CELLS])
def test_the_state_of_a_cell_is_a_group(name, last):
    cell, writers, readers = CELLS[name]
    net = Recurrent(cell, last)
    params = jax.jit(net.init)(jax.random.key(0), SEQUENCE)
    units = cbp_jax.discover_units(net.apply, params, SEQUENCE)
    assert [(group.size, len(group.incoming), len(group.outgoing)) for group in units] == [
        (5, 1, writers // 2), (7, writers, readers)
    ]  # fmt: skip
    apply = cbp_jax.with_features(net.apply, units)
    resets.check_resets(units, params, lambda p: apply(p, SEQUENCE))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CELLS, "nnx"])
def test_cells_train_with_replacements(name):
    if name == "nnx":

        class Net(nnx.Module):
            def __init__(self, rngs):
                self.before, self.head = nnx.Linear(3, 5, rngs=rngs), nnx.Linear(7, 2, rngs=rngs)
                self.rnn = nnx.RNN(nnx.GRUCell(5, 7, rngs=rngs), rngs=rngs)

            def __call__(self, x):
                return self.head(self.rnn(nnx.tanh(self.before(x))))

        graphdef, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
        apply_fn = lambda params, x: nnx.merge(graphdef, params, rest, copy=True)(x)
    else:
        net = Recurrent(CELLS[name][0])
        apply_fn, params = net.apply, jax.jit(net.init)(jax.random.key(0), SEQUENCE)
    units = cbp_jax.discover_units(apply_fn, params, SEQUENCE)
    assert [group.size for group in units] == [5, 7]
    apply = cbp_jax.with_features(apply_fn, units)
    losses, replaced = resets.train(units, params, lambda p: apply(p, SEQUENCE), SEQUENCE[..., :2])
    assert losses[-1] < 0.7 * losses[0] and all(count >= 5 for count in replaced.values())


def minimal(p, h, x):
    gate = jax.nn.sigmoid(x @ p["gate"])
    return gate * h + (1 - gate) * (x @ p["value"])


HAND = {
    "linear recurrence": (lambda p, h, x: p["decay"] * h + x @ p["value"], dict(decay=(1, 4), value=(3, 4))),
    "minimal": (minimal, dict(gate=(3, 4), value=(3, 4))),
    "fused gates": (
        lambda p, h, x: (lambda a, b: jax.nn.sigmoid(a) * h + jnp.tanh(b))(
            *jnp.split(x @ p["inputs"] + h @ p["state"], 2, -1)
        ),
        dict(inputs=(3, 8), state=(4, 8)),
    ),
}


@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.parametrize("start", ["zeros", "given", "layer"])
@pytest.mark.parametrize("name", HAND)
def test_recurrences_by_hand(name, start, scanned):
    cell, shapes = HAND[name]
    params = draw(**shapes, first=(3, 4), head=(4, 2))

    def apply_fn(p, x, given):
        h = {"zeros": jnp.zeros((4, 4)), "given": given, "layer": x[:, 0] @ p["first"]}[start]
        if scanned:
            h, _ = jax.lax.scan(lambda h, x: (cell(p, h, x), None), h, jnp.moveaxis(x, 1, 0))
        else:
            for number in range(5):
                h = cell(p, h, x[:, number])
        return jnp.tanh(h) @ p["head"]

    try:
        units = cbp_jax.discover_units(apply_fn, params, SEQUENCE, X[:, :4])
    except ValueError as error:  # without a scan, the same kernel is first applied to data
        assert not scanned and start == "given"
        assert re.search("not always on units|as a bias along", str(error))
        return
    assert [group.size for group in units] == [4]
    apply = cbp_jax.with_features(apply_fn, units)
    resets.check_resets(units, params, lambda p: apply(p, SEQUENCE, X[:, :4]))


@pytest.mark.parametrize("check", [False, True])
def test_units_in_sums_that_a_scan_returns_are_left_out(check):
    params = draw(a=(3, 4), head=(4, 2))

    def apply_fn(p, x):
        def step(total, x):
            h = jnp.tanh(x @ p["a"])
            return total + h.sum(-1), (h @ p["head"], h.sum(-1))

        return jax.lax.scan(step, jnp.zeros(4), jnp.moveaxis(x, 1, 0))[1]

    with pytest.raises(ValueError, match="a: it is summed with other units"):
        cbp_jax.discover_units(apply_fn, params, SEQUENCE, check=check)


def test_a_function_called_with_constants_and_then_with_units():
    params = draw(a=(3, 4), head=(4, 2))
    double = jax.jit(lambda a, b: (a * 1.0) * b)

    def apply_fn(p, x):
        h = x @ p["a"]
        return jnp.tanh(double(jnp.zeros(4), h) + double(h, h)) @ p["head"]

    units = cbp_jax.discover_units(apply_fn, params, X[:, :3])
    assert [group.name for group in units] == ["a"]
    resets.check_resets(units, params, lambda p: (apply_fn(p, X[:, :3]), None))


def test_a_state_that_is_returned_is_output():
    net = nn.RNN(nn.GRUCell(7), return_carry=True)
    params = jax.jit(net.init)(jax.random.key(0), SEQUENCE)
    with pytest.raises(ValueError, match="part of the network's output"):
        cbp_jax.discover_units(net.apply, params, SEQUENCE)


def test_what_a_loop_of_unknown_length_computes_is_left_out():
    params = draw(a=(3, 4), w=(4, 4), head=(4, 2))

    def apply_fn(p, x):
        h = jnp.tanh(x[:, 0] @ p["a"])
        h, _ = jax.lax.while_loop(lambda c: c[1] < x.sum(), lambda c: (jnp.tanh(c[0] @ p["w"]), c[1] + 1), (h, 0.0))
        return h @ p["head"]

    with pytest.raises(ValueError, match="`while`"):
        cbp_jax.discover_units(apply_fn, params, SEQUENCE)
