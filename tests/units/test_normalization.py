"""Units keep their identity through normalization; its scales, offsets and running statistics belong to them."""

import functools

import flax.linen as nn
import flax.nnx.nn.normalization as nnx_normalization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import resets
from flax import nnx
from flax.linen import normalization

import cbp_jax

NORMS = {
    "batch": nn.BatchNorm,
    "layer": nn.LayerNorm,
    "rms": nn.RMSNorm,
    "group": functools.partial(nn.GroupNorm, 2),
    "instance": nn.InstanceNorm,
}


class Net(nn.Module):
    norm: str
    scale: bool = True
    bias: bool = True

    def normalize(self, train):
        options = {"use_scale": self.scale} if self.norm == "rms" else {"use_scale": self.scale, "use_bias": self.bias}
        if self.norm == "batch":
            options["use_running_average"] = not train
        return NORMS[self.norm](**options)

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.tanh(self.normalize(train)(nn.Conv(6, (3, 3), use_bias=False)(x)))
        x = nn.tanh(self.normalize(train)(nn.Conv(4, (2, 2), strides=2)(x)))
        return nn.Dense(3)(x.mean((1, 2)))


def setup(net, train=False):
    """Return random params and statistics, an input, and apply_fn(params, stats, x)."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 6, 6, 2)), jnp.float32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), x)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.2, 1.0, leaf.shape), jnp.float32), shapes)
    mutable = ["batch_stats"] if train else False

    def apply_fn(params, stats, x):
        return net.apply({"params": params, "batch_stats": stats}, x, train=train, mutable=mutable)

    return variables["params"], variables.get("batch_stats", {}), x, apply_fn


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale, bias", [(True, True), (False, True), (True, False), (False, False)])
def test_scales_and_offsets_belong_to_the_units(norm, scale, bias):
    params, stats, x, apply_fn = setup(Net(norm, scale, bias))
    layer = {"batch": "Batch", "layer": "Layer", "rms": "RMS", "group": "Group", "instance": "Instance"}[norm] + "Norm"
    units = cbp_jax.discover_units(apply_fn, params, stats, x)
    assert [(g.name, g.size, g.kind) for g in units] == [("Conv_0", 6, "conv"), ("Conv_1", 4, "conv")]
    for number, group in enumerate(units):
        biases = [f"Conv_{number}/bias"] * number + [f"{layer}_{number}/bias"] * (bias and norm != "rms")
        assert resets.paths(group.biases) == biases
        assert resets.paths(group.scales) == [f"{layer}_{number}/scale"] * scale
        assert [part.reset for part in group.scales] == [1.0] * scale
        found = [(part.path, part.reset) for part in group.statistics]
        assert found == ([(f"{layer}_{number}/mean", 0.0), (f"{layer}_{number}/var", 1.0)] if norm == "batch" else [])


@pytest.mark.parametrize("norm", ["batch in training", *NORMS])
def test_after_a_reset_only_statistics_that_mix_units_depend_on_the_unit(norm, monkeypatch):
    for module in (normalization, nnx_normalization):
        compute = module._compute_stats
        if norm in ("layer", "rms", "group"):
            monkeypatch.setattr(
                module, "_compute_stats", lambda *a, compute=compute, **k: jax.lax.stop_gradient(compute(*a, **k))
            )
    train = norm == "batch in training"
    params, stats, x, apply_fn = setup(Net("batch" if train else norm), train)
    units = cbp_jax.discover_units(apply_fn, params, stats, x)
    assert [group.size for group in units] == [6, 4]
    if norm in ("layer", "rms", "group"):
        check_gradients(units, params, lambda p: apply_fn(p, stats, x))
    else:
        resets.check_resets(units, params, lambda p: (jax.tree.leaves(apply_fn(p, stats, x))[0], None))


def check_gradients(units, params, output):
    gradient = jax.jit(jax.grad(lambda p: jnp.sin(output(p)).sum()))
    reset = resets.make_reset(units)
    for group in units:
        after = gradient(reset(params, {group.name: [1]}))
        for path, mask in resets.entries(group.incoming, [1], params).items():
            layer, leaf = path.split("/")
            assert np.all(np.asarray(after[layer][leaf])[mask] == 0)
            assert np.any(np.asarray(after[layer][leaf])[~mask] != 0)


@pytest.mark.parametrize("given", ["inputs", "variables"])
@pytest.mark.parametrize("train", [False, True])
def test_running_statistics_are_found_and_reset(train, given):
    params, stats, x, apply_fn = setup(Net("batch"), train)
    if given == "variables":
        variables = {"params": params, "batch_stats": stats}
        units = cbp_jax.discover_units(lambda v, x: apply_fn(v["params"], v["batch_stats"], x), variables, x)
        names = ["params/Conv_0", "params/Conv_1"]
    else:
        units = cbp_jax.discover_units(apply_fn, params, stats, x)
        names = ["Conv_0", "Conv_1"]
    assert [group.name for group in units] == names
    replaced = {name: jnp.arange(group.size) == 2 for name, group in zip(names, units, strict=True)}
    with_top = cbp_jax.reset_batch_stats({"batch_stats": stats}, units, replaced)["batch_stats"]
    new = jax.jit(lambda s: cbp_jax.reset_batch_stats(s, units, replaced))(stats)
    for number, size in enumerate((6, 4)):
        for leaf, value in (("mean", 0.0), ("var", 1.0)):
            old = np.asarray(stats[f"BatchNorm_{number}"][leaf])
            want = np.where(np.arange(size) == 2, value, old)
            np.testing.assert_array_equal(new[f"BatchNorm_{number}"][leaf], want)
            np.testing.assert_array_equal(with_top[f"BatchNorm_{number}"][leaf], want)


def test_statistics_that_are_missing_are_named():
    params, stats, x, apply_fn = setup(Net("batch"))
    units = cbp_jax.discover_units(apply_fn, params, stats, x)
    replaced = {group.name: jnp.arange(group.size) == 2 for group in units}
    with pytest.raises(ValueError, match="BatchNorm_0/mean"):
        cbp_jax.reset_batch_stats({"other": stats}, units, replaced)
    closed = cbp_jax.discover_units(lambda params, x: apply_fn(params, stats, x), params, x)
    assert [group.size for group in closed] == [6, 4] and resets.paths(closed[0].scales) == ["BatchNorm_0/scale"]
    with pytest.raises(ValueError, match="discover_units"):
        cbp_jax.reset_batch_stats(stats, closed, {})


def test_groups_without_replacements_keep_their_statistics():
    params, stats, x, apply_fn = setup(Net("batch"))
    units = cbp_jax.discover_units(apply_fn, params, stats, x)
    mask = jnp.arange(4) == 2
    new = cbp_jax.reset_batch_stats(stats, units, {"Conv_1": mask})
    jax.tree.map(np.testing.assert_array_equal, new["BatchNorm_0"], stats["BatchNorm_0"])
    np.testing.assert_array_equal(new["BatchNorm_1"]["mean"], np.where(mask, 0, stats["BatchNorm_1"]["mean"]))
    with pytest.raises(
        ValueError, match=r"replaced must have some of the groups \['Conv_0', 'Conv_1'\], got \['conv'\]"
    ):
        cbp_jax.reset_batch_stats(stats, units, {"conv": mask})
    with pytest.raises(ValueError, match=r"replaced\['Conv_0'\] must be of shape \(6,\), got \(4,\)"):
        cbp_jax.reset_batch_stats(stats, units, {"Conv_0": mask})


SCALES = {
    "1 + scale": (lambda s: 1.0 + s, 0.0),
    "scale": (lambda s: s, 1.0),
    "cast": (lambda s: s.astype(jnp.bfloat16).astype(jnp.float32), 1.0),
    "exp": (jnp.exp, 0.0),
    "twice": (lambda s: 2.0 * s, 1.0),
}


@pytest.mark.parametrize("name", SCALES)
def test_a_scale_is_reset_to_the_value_that_changes_nothing(name):
    scale, constant = SCALES[name]
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2)), "s": jnp.full(4, 3.0)}

    def apply_fn(params, x):
        h = x @ params["a"]
        h = h * jax.lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-6) * scale(params["s"])
        return jnp.tanh(h) @ params["b"]

    units = cbp_jax.discover_units(apply_fn, params, jnp.ones((2, 3)))
    new = resets.make_reset(units)(params, {"a": [1]})
    np.testing.assert_array_equal(new["s"], [3.0, constant, 3.0, 3.0])


def test_nnx_norms_in_both_modes():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.conv, self.batch = nnx.Conv(2, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
            self.a, self.layer = nnx.Linear(4, 4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs)
            self.b, self.rms = nnx.Linear(4, 4, rngs=rngs), nnx.RMSNorm(4, rngs=rngs)
            self.c, self.group = nnx.Linear(4, 4, rngs=rngs), nnx.GroupNorm(4, 2, rngs=rngs)
            self.head = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            x = self.batch(self.conv(x)).mean((1, 2))
            return self.head(self.group(self.c(self.rms(self.b(self.layer(self.a(x)))))))

    graphdef, params, rest = nnx.split(nnx.eval_shape(lambda: Model(nnx.Rngs(0))), nnx.Param, ...)
    for train in (True, False):

        def apply_fn(params, rest, x, train=train):
            model = nnx.merge(graphdef, params, rest)
            (model.train if train else model.eval)()
            return model(x), nnx.state(model, nnx.BatchStat)

        units = cbp_jax.discover_units(apply_fn, params, rest, jnp.ones((2, 5, 5, 2)))
        assert [group.name for group in units] == ["conv", "a", "b", "c"]
        scales = [path for group in units for path in resets.paths(group.scales)]
        assert scales == ["batch/scale", "layer/scale", "rms/scale", "group/scale"]
        assert [part.reset for part in units[0].statistics] == [0.0, 1.0]


@pytest.mark.slow
def test_batch_normalization_absorbs_the_mean_contribution_of_a_unit():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(6)(x))
            x = nn.relu(nn.BatchNorm(use_running_average=False)(nn.Dense(5, use_bias=False)(x)))
            return nn.Dense(2)(x)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
    variables = jax.jit(Model().init)(jax.random.key(0), x)
    params = variables["params"]
    params["Dense_0"]["kernel"] = params["Dense_0"]["kernel"].at[:, 2].set(0.0)
    params["Dense_0"]["bias"] = params["Dense_0"]["bias"].at[2].set(0.7)  # a unit whose activation is always 0.7
    apply_fn = lambda params, x: Model().apply({**variables, "params": params}, x, mutable=["batch_stats"])[0]
    units = cbp_jax.discover_units(apply_fn, params, x)
    assert [[consumer.absorbed for consumer in group.outgoing] for group in units] == [[True], [False]]
    output, features = jax.jit(cbp_jax.with_features(apply_fn, units))(params, x)
    reset = resets.make_reset(units)
    new = reset(params, {"Dense_0": [2]}, features=features)
    assert np.all(np.asarray(new["Dense_1"]["kernel"][2]) == 0) and "bias" not in new["Dense_1"]
    np.testing.assert_allclose(jax.jit(apply_fn)(new, x), output, atol=1e-5)
    other = reset(params, {"Dense_0": [1]}, features=features)
    assert np.abs(jax.jit(apply_fn)(other, x) - output).max() > 1e-3
    cbp_jax.continual_backprop(optax.sgd(0.1), units, compensate_bias=True).init(params)
