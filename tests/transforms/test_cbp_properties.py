"""Properties of any feed-forward network after a reset, checked on random networks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import cbp_jax

OPTIMIZED = True  # in programs as users compile them, captured activations must not change a bit


@jax.custom_jvp
def straight_through(x):
    """Return the sign, with the slope of tanh. Inlining its body would make every gradient 0."""
    return jnp.sign(x)


@straight_through.defjvp
def _(primals, tangents):
    (x,), (dx,) = primals, tangents
    return jnp.sign(x), (1 - jnp.tanh(x) ** 2) * dx


ACTIVATIONS = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "gelu": jax.nn.gelu,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "elu": jax.nn.elu,
    "leaky_relu": jax.nn.leaky_relu,
    "softplus": jax.nn.softplus,
    "square": lambda x: x * x + 1.0,
    "where": lambda x: jnp.where(x > 0.1, x, 0.3),
    "straight_through": straight_through,
}


@dataclasses.dataclass(frozen=True)
class Layer:
    name: str
    features: int
    conv: bool
    activation: str
    bias: bool
    padding: str
    stride: int
    pool: str  # "none", "max" or "average"


@dataclasses.dataclass(frozen=True)
class Network:
    """A random network: layers in forward order; params are {outer: {name: {"w": ..., "b": ...}}} with any names."""

    layers: tuple[Layer, ...]
    outer: str
    leaves: tuple[str, str]
    spatial: bool

    def init(self, seed):
        rng = np.random.default_rng(seed)
        params, x = {}, self.example(rng)
        for layer in self.layers:
            shape = (
                (2, 3, x.shape[-1], layer.features) if layer.conv else (x.reshape(len(x), -1).shape[1], layer.features)
            )
            scale = 1.5 / np.sqrt(np.prod(shape[:-1]))
            params[layer.name] = {self.leaves[0]: jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)}
            if layer.bias:
                bias = rng.uniform(0.1, 0.5, layer.features)
                params[layer.name][self.leaves[1]] = jnp.asarray(bias, jnp.float32)
            x = jax.eval_shape(lambda p, x, layer=layer: self._layer(layer, p, x), params[layer.name], x)
            x = np.zeros(x.shape, np.float32)
        return {self.outer: params}

    def example(self, rng):
        return jnp.asarray(rng.normal(size=(5, 6, 7, 2) if self.spatial else (5, 4)), jnp.float32)

    def _layer(self, layer, params, x):
        kernel = params[self.leaves[0]]
        if layer.conv:
            dims = ("NHWC", "HWIO", "NHWC")
            strides = (layer.stride, layer.stride)
            x = jax.lax.conv_general_dilated(x, kernel, strides, layer.padding, dimension_numbers=dims)
        else:
            x = x.reshape(x.shape[0], -1) @ kernel
        if layer.bias:
            x = x + params[self.leaves[1]]
        if layer is not self.layers[-1]:
            x = ACTIVATIONS[layer.activation](x)
        if layer.conv and layer.pool != "none":
            window, strides = (1, 2, 2, 1), (1, 1, 1, 1)
            if layer.pool == "max":
                x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, "SAME")
            else:
                x = jax.lax.reduce_window(x, 0.0, jax.lax.add, window, strides, "SAME") / 4
        return x

    def apply(self, params, x):
        for layer in self.layers:
            x = self._layer(layer, params[self.outer][layer.name], x)
        return x

    def hidden(self, params, x):
        result = []
        for layer in self.layers[:-1]:
            x = self._layer(layer, params[self.outer][layer.name], x)
            result.append(x)
        return result


NAMES = st.text("abzABZ019_ .é", min_size=1, max_size=6)


@st.composite
def networks(draw):
    convolutions = draw(st.sampled_from([0, 0, 1, 2]))
    depth = draw(st.sampled_from([1, 2, 2, 3, 11])) if convolutions == 0 else draw(st.integers(0, 2))
    names = draw(st.lists(NAMES, min_size=convolutions + depth + 1, max_size=convolutions + depth + 1, unique=True))
    layers = [
        Layer(
            name=name,
            features=draw(st.integers(1, 6)),
            conv=i < convolutions,
            activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
            bias=draw(st.booleans()),
            padding=draw(st.sampled_from(["SAME", "VALID"])),
            stride=draw(st.integers(1, 2)) if i == 0 else 1,
            pool=draw(st.sampled_from(["none", "max", "average"])),
        )
        for i, name in enumerate(names)
    ]
    # Two convolutions without padding need more pixels than a stride of 2 leaves of 6 x 7.
    layers = [dataclasses.replace(layer, padding="SAME") if i == 1 else layer for i, layer in enumerate(layers)]
    return Network(
        tuple(layers),
        outer=draw(NAMES),
        leaves=draw(st.sampled_from([("kernel", "bias"), ("b", "a"), ("w", "b"), ("weights", "offset")])),
        spatial=convolutions > 0,
    )


def loss(apply_fn, params, x):
    """Weight the outputs unevenly, so that no gradient vanishes by symmetry."""
    out, aux = apply_fn(params, x)
    return jnp.sum(jnp.sin(out + jnp.arange(out.shape[-1])) * jnp.arange(1.0, 1 + out.shape[0])[:, None]), aux


# Every example is compiled, so shrinking a failure would take minutes.
quickly = functools.partial(settings, phases=(Phase.explicit, Phase.generate))


@quickly(max_examples=1)
@given(network=networks(), seed=st.integers(0, 2**31 - 1))
def test_after_a_reset(network, seed):
    check_a_reset(network, seed)


@pytest.mark.slow
@quickly(max_examples=50)
@given(network=networks(), seed=st.integers(0, 2**31 - 1))
def test_after_a_reset_of_many_networks(network, seed):
    check_a_reset(network, seed)


def check_a_reset(network, seed):
    params = network.init(seed)
    x = network.example(np.random.default_rng(seed + 1))
    units = cbp_jax.discover_units(network.apply, params, x)
    hidden, leaf, outer = network.layers[:-1], network.leaves, network.outer
    assert [g.name for g in units] == [f"{outer}/{layer.name}" for layer in hidden]
    assert [g.size for g in units] == [layer.features for layer in hidden]
    apply = cbp_jax.with_features(network.apply, units)

    # Capturing features changes neither the output nor a bit of the gradient.
    grads, features = jax.jit(jax.grad(lambda p: loss(apply, p, x), has_aux=True))(params)
    plain, want_features = jax.jit(
        jax.grad(lambda p: loss(lambda p, x: (network.apply(p, x), network.hidden(p, x)), p, x), has_aux=True)
    )(params)
    jax.tree.map(np.testing.assert_array_equal, grads, plain)
    for group, want in zip(units, want_features, strict=True):
        got = features[group.name]
        np.testing.assert_allclose(got, want.reshape(got.shape), rtol=1e-5, atol=1e-6)

    # Force a reset: about half of the units of every group, at least one, in the first step.
    inner = optax.sgd(0.01, momentum=0.5)
    tx = cbp_jax.continual_backprop(inner, units, replacement_rate=0.5, maturity_threshold=0, key=seed)
    state = tx.init(params)
    state = state._replace(budget=jax.tree.map(lambda b: b + 0.5, state.budget))  # also for a single unit
    updates, state = jax.jit(lambda g, s, p: tx.update(g, s, p, features=features))(grads, state, params)
    inner_updates, _ = jax.jit(inner.update)(grads, inner.init(params), params)
    new = optax.apply_updates(params, updates)
    new_grads = jax.jit(jax.grad(lambda p: loss(lambda p, x: (network.apply(p, x), None), p, x)[0]))(new)

    resampled = jax.tree.map(lambda a: np.zeros(a.shape, bool), params)
    zeroed = jax.tree.map(lambda a: np.zeros(a.shape, bool), params)
    for k, (group, layer) in enumerate(zip(units, hidden, strict=True)):
        mask = np.asarray(state.replaced[group.name])
        assert mask.sum() == int(0.5 * layer.features + 0.5)
        resampled[outer][layer.name][leaf[0]][..., mask] = True
        # Rows that read this group's new units were set to 0 first; resampling a later group's units comes after that.
        zeroed[outer][layer.name][leaf[0]][..., mask] = False
        if layer.bias:
            zeroed[outer][layer.name][leaf[1]][mask] = True
        following = zeroed[outer][network.layers[k + 1].name][leaf[0]]
        following.reshape(*following.shape[:-2], -1, layer.features, following.shape[-1])[..., mask, :] = True

    def check(new, old, grad, update, inner_update, fresh, zero):
        new, old, grad = np.asarray(new), np.asarray(old), np.asarray(grad)
        assert np.all(new[zero] == 0)
        assert np.all(new[fresh] != old[fresh])
        assert np.all(grad[fresh] == 0)
        kept = ~(fresh | zero)
        np.testing.assert_array_equal(np.asarray(update)[kept], np.asarray(inner_update)[kept])

    jax.tree.map(check, new, params, new_grads, updates, inner_updates, resampled, zeroed)
    for group, layer in zip(units, hidden, strict=True):
        if layer.bias:
            assert np.all(np.asarray(new_grads[outer][layer.name][leaf[1]])[state.replaced[group.name]] == 0)
