import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cbp_jax
from cbp_jax import nets

SMALL = {
    "mlp": {"hidden": (4, 3)},
    "convnet": {"channels": (3,), "kernel_sizes": (3,), "hidden": (4,)},
    "lenet": {"hidden": (4,)},
    "resnet18": {"widths": (3, 4), "blocks": (1, 1)},
    "vit": {"patch": 8, "width": 8, "depth": 1, "heads": 2, "hidden": 3},
}
IMAGE = (16, 16, 1)


class Own(nn.Module):
    """A user's module, which takes images and behaves differently in training."""

    num_outputs: int
    width: int = 3
    hidden: tuple[int, ...] = (4,)

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.relu(nn.Conv(self.width, (3, 3))(x)).mean((1, 2))
        for size in self.hidden:
            x = nn.Dropout(0.5, deterministic=not train)(nn.relu(nn.Dense(size)(x)))
        return nn.Dense(self.num_outputs)(x)


def of_function(num_outputs, width=2):
    """Return a user's function that makes a perceptron."""
    return nets.MLP((width,), num_outputs)


class Fixed(nn.Module):
    """A user's module for seven classes."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(7)(x)


def broken(num_outputs):
    raise TypeError("cannot be made")


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setitem(sys.modules, "my_nets", sys.modules[__name__])


def test_every_network_has_a_small_example_here():
    assert set(SMALL) == set(nets.NETWORKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_networks_by_name_have_units_that_can_be_replaced(name):
    net = nets.make(name, IMAGE, 10, **SMALL[name])
    key, x = jax.random.key(0), jax.ShapeDtypeStruct((2, *IMAGE), jnp.float32)
    variables = jax.eval_shape(net.init, key, x)
    apply = lambda variables, x: net.apply(variables, x, train=True, mutable=["batch_stats"])[0]
    units = cbp_jax.discover_units(apply, variables, x)
    assert len(units) >= len(variables["params"]) // 4
    for make in (cbp_jax.continual_backprop, cbp_jax.redo):
        tx = make(optax.sgd(0.1), units)

        def step(variables, x, tx=tx):
            outputs, features = cbp_jax.with_features(apply, units)(variables, x)
            assert outputs.shape == (2, 10)
            return tx.update(variables, tx.init(variables), variables, features=features)

        updates, state = jax.eval_shape(step, variables, x)
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, variables)
        assert {name: mask.shape for name, mask in state.replaced.items()} == {
            group.name: (group.size,) for group in units
        }


@pytest.mark.parametrize("text", ["vit:depth=2,width=8", "vit(depth=2, width=8)"])
def test_settings_in_the_name_and_keyword_arguments_override_defaults(text):
    net = nets.make(text, IMAGE, 3, hidden=5)
    assert net == nets.ViT(num_outputs=3, depth=2, width=8, hidden=5)
    assert nets.make(text, IMAGE, 3, depth=1).depth == 1


def test_a_perceptron_flattens_only_images():
    net, flat = (nets.make("mlp", shape, 10, hidden=(5,)) for shape in (IMAGE, (256,)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, *IMAGE)), jnp.float32)
    params = flat.init(jax.random.key(0), x.reshape(2, -1))
    np.testing.assert_array_equal(net.apply(params, x), flat.apply(params, x.reshape(2, -1)))


def test_a_users_module_or_function_by_its_path():
    assert nets.make("my_nets:Own", IMAGE, 5) == Own(5)
    assert nets.make("my_nets:Own(width=2, hidden=(6, 7))", IMAGE, 5) == Own(5, 2, (6, 7))
    assert nets.make("my_nets:of_function(width=6)", (8,), 5) == nets.MLP((6,), 5)
    assert nets.make("my_nets:Fixed", (8,), 7) == Fixed()


@pytest.mark.parametrize(
    ("name", "images"), [("mlp", False), ("lenet", True), ("my_nets:Own", True), ("my_nets:of_function", False)]
)
def test_images_are_not_flattened_if_the_network_takes_them(name, images):
    assert nets.read(name).takes_images(IMAGE, 3) is images


def test_which_settings_a_network_takes():
    own, vit = nets.read("my_nets:Own"), nets.read("vit")
    assert own.takes("hidden", (3,)) and own.takes("width") and not own.takes("widths")
    assert vit.takes("hidden") and not vit.takes("hidden", (3,))  # hidden is a single number
    assert not vit.takes("parent") and nets.read(lambda **anything: None).takes("widths")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "alexnet",
            IMAGE,
            r"network 'alexnet': the network must be one of \['mlp', .*'vit'\], or a Flax module's path",
        ),
        ("vit:dept=2", IMAGE, r"network 'vit' has the settings \['patch', 'width', .*\], got 'dept'"),
        ("vit:2", IMAGE, "settings are given by name"),
        ("vit:patch=5", IMAGE, "network 'vit': x must be images whose sides are multiples of patch=5"),
        ("convnet", (256,), "network 'convnet': x must be images"),
        ("lenet", (8, 8, 1), "network 'lenet': images of 8x8 are too small"),
        ("my_nets:Own(widths=2)", IMAGE, r"has the settings \['width', 'hidden'\], got 'widths'"),
        ("my_nets:Absent", IMAGE, "has no 'Absent'"),
        ("my_absent_nets:Own", IMAGE, "there is no module 'my_absent_nets' to import, and no network of that name"),
        ("my_nets:IMAGE", IMAGE, r"it must be a Flax module's class, or a function that makes one, got \(16, 16, 1\)"),
        ("math:gcd", IMAGE, "it must make a Flax module, got int"),
        ("my_nets:broken", IMAGE, "network 'my_nets:broken': TypeError: cannot be made"),
        ("my_nets:Fixed", (8,), r"must map inputs \[2, 8\] to outputs \[2, 10\], got \[2, 7\]"),
    ],
)
def test_invalid_networks_are_refused(name, shape, message):
    with pytest.raises(ValueError, match=message):
        nets.make(name, shape, 10)


def test_if_neither_images_nor_flattened_ones_fit_the_error_is_that_for_images():
    with pytest.raises(ValueError, match="images of 8x8 are too small"):
        nets.read("lenet").takes_images((8, 8, 1), 10)
