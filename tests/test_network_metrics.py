import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbp_jax import metrics, nets

RNG = np.random.default_rng(0)
PARAMS = {"w1": RNG.normal(size=(3, 5)), "b": RNG.normal(size=5), "w2": RNG.normal(size=(5, 2))}
AFTER = {name: w + 0.8 * RNG.normal(size=w.shape) for name, w in PARAMS.items()}
X = RNG.normal(size=(7, 3))


def apply_fn(params, x):
    return jax.nn.relu(x @ params["w1"] + params["b"]) @ params["w2"]


def numpy_apply(params, x):
    return np.maximum(x @ params["w1"] + params["b"], 0) @ params["w2"]


def numpy_jacobian(params, x):
    """Compute the rows (example, output) of all gradients, in float64, layer by layer."""
    before = x @ params["w1"] + params["b"]
    h, rows = np.maximum(before, 0), []
    for i in range(len(x)):
        for a in range(2):
            back = params["w2"][:, a] * (before[i] > 0)
            out = np.zeros((5, 2))
            out[:, a] = h[i]
            rows.append(np.concatenate([back, np.outer(x[i], back).ravel(), out.ravel()]))
    return np.array(rows)


def numpy_ranks(matrix, threshold):
    values = np.linalg.svd(matrix, compute_uv=False)
    share = values / values.sum()
    reach = lambda v: 1 + int((np.cumsum(v) < threshold * v.sum()).sum())
    return np.exp(-(share * np.log(share)).sum()), reach(values**2), reach(values)


def test_the_tangent_kernel_and_its_ranks_equal_those_of_numpy():
    jacobian = numpy_jacobian(PARAMS, X)
    params, x = jax.tree.map(jnp.float32, (PARAMS, X))
    measure = lambda params, x: (
        metrics.tangent_kernel(apply_fn, params, x),
        metrics.ntk_ranks(apply_fn, params, x, 0.9),
    )
    kernel, found = jax.jit(measure)(params | {"count": jnp.int32(3)}, x)
    assert kernel.dtype == jnp.float32
    np.testing.assert_allclose(kernel, jacobian @ jacobian.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found, numpy_ranks(jacobian @ jacobian.T, 0.9), rtol=1e-3)


def test_the_rank_of_the_tangent_kernel_falls_with_dead_units():
    net = nets.MLP((8,), 2)
    params = net.init(jax.random.key(0), jnp.ones((1, 3)))
    layer = params["params"]["Dense_0"]
    dead = {"params": {**params["params"], "Dense_0": {**layer, "bias": layer["bias"] - 100}}}
    ranks = jax.jit(lambda params, x: metrics.ntk_ranks(net.apply, params, x, 0.999))
    alive, collapsed = (ranks(each, jnp.float32(X)) for each in (params, dead))
    assert alive.stable > 6 and collapsed.stable == 2  # only gradients of the two output biases are left


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_churn_equals_that_of_numpy():
    before, after = numpy_apply(PARAMS, X), numpy_apply(AFTER, X)
    p, q = softmax(before), softmax(after)
    expected = {
        "absolute": np.abs(after - before).mean(),
        "squared": ((after - before) ** 2).mean(),
        "kl": (p * np.log(p / q)).sum(-1).mean(),
        "argmax": (before.argmax(-1) != after.argmax(-1)).mean(),
    }
    assert 0 < expected["argmax"] < 1
    params, new, x = jax.tree.map(jnp.float32, (PARAMS, AFTER, X))
    for change, value in expected.items():
        np.testing.assert_allclose(metrics.churn(apply_fn, params, new, x, change), value, rtol=1e-4)
        assert metrics.churn(apply_fn, params, params, x, change) == 0
    with pytest.raises(ValueError, match=r"change must be .absolute.*; got .l1."):
        metrics.churn(apply_fn, params, new, x, "l1")


def test_weight_change_equals_that_of_numpy():
    flat = lambda params: np.concatenate([w.ravel() for w in params.values()])
    expected = np.linalg.norm(flat(AFTER) - flat(PARAMS)) / np.linalg.norm(flat(PARAMS))
    params, after = jax.tree.map(jnp.float32, (PARAMS, AFTER))
    found = metrics.weight_change(params | {"count": jnp.int32(1)}, after | {"count": jnp.int32(9)})
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    zeros = jnp.zeros(3)
    assert metrics.weight_change(zeros, zeros) == 0 and np.isinf(metrics.weight_change(zeros, zeros + 1))
    half = jax.tree.map(lambda w: jnp.full(w.shape, 300, jnp.float16), params)  # whose squares overflow
    assert metrics.weight_change(half, jax.tree.map(lambda w: 2 * w, half)) == pytest.approx(1.0)


def test_linearized_units_are_on_for_all_examples_and_positions():
    h = np.maximum(RNG.normal(1.0, 1.0, size=(6, 3, 40)), 0)
    h[..., 0] = 1.0
    expected = np.mean([all(h[i, j, unit] > 0 for i in range(6) for j in range(3)) for unit in range(40)])
    assert 0 < expected < 1
    np.testing.assert_allclose(metrics.linearized_fraction({"a": jnp.float32(h)}), expected)
    assert metrics.linearized_fraction({"a": jnp.ones((2, 3)), "b": jnp.zeros((2, 1))}) == 0.75
    assert metrics.linearized_fraction(jnp.array([[1.0, 0.0], [1.0, 2.0]])) == 0.5
    with pytest.raises(ValueError, match="features must be"):
        metrics.linearized_fraction({})


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: metrics.tangent_kernel(apply_fn, PARAMS, np.zeros((0, 3))), "x must be examples"),
        (lambda: metrics.ntk_ranks(apply_fn, {"n": np.int32(1)}, X), "params must hold at least one float"),
        (lambda: metrics.weight_change({"w": np.ones(2)}, {"w": np.ones(3)}), "must have the same shapes"),
        (lambda: metrics.weight_change({"n": np.int32(1)}, {"n": np.int32(2)}), "params must hold at least one float"),
    ],
)
def test_bad_input_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()
