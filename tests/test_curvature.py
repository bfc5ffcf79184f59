import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import cbp_jax
from cbp_jax.curvature import hesscale, hessian_diagonal, hutchinson
from cbp_jax.nets import MLP, ConvNet, get_activation

# Cases that are similar to others and take seconds to compile; see conftest.py.
SLOW_CASES = {
    "test_hutchinson_converges_to_the_exact_diagonal": ("softmax_cross_entropy",),
    "test_a_convolution_squares_the_coefficients_of_its_linear_maps": ("grouped", "transposed"),
}

LOSSES = {
    "softmax_cross_entropy": lambda y, t: optax.softmax_cross_entropy_with_integer_labels(y, t).mean(),
    "squared_error": lambda y, t: optax.squared_error(y, t).sum(-1).mean(),
}


def problem(loss, batch=5, inputs=4, outputs=3, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, inputs))
    targets = rng.integers(0, outputs, batch) if loss == "softmax_cross_entropy" else rng.normal(size=(batch, outputs))
    return jnp.asarray(x, jnp.float32), jnp.asarray(targets, jnp.float32 if loss == "squared_error" else jnp.int32)


def mlp_params(sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {
            "w": jnp.asarray(rng.normal(size=(a, b)) / np.sqrt(a), jnp.float32),
            "b": jnp.asarray(0.3 * rng.normal(size=b), jnp.float32),
        }
        for a, b in itertools.pairwise(sizes)
    ]


def mlp(params, x, activation=jnp.tanh):
    for layer in params[:-1]:
        x = activation(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def scaled(apply, params, x, targets, loss="softmax_cross_entropy"):
    """Run HesScale compiled, which is much faster than operation by operation."""
    return jax.jit(lambda p: hesscale(apply, p, x, targets, loss))(params)


def exact(apply, params, x, targets, loss="softmax_cross_entropy"):
    return jax.jit(lambda p: hessian_diagonal(lambda p: LOSSES[loss](apply(p, x), targets), p))(params)


def close(actual, expected, rtol=1e-5):
    """Assert equality up to rtol of the largest entry of each array."""
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    for a, b in zip(actual, expected, strict=True):
        b = np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


def output_derivatives(y, targets, loss):
    """Return gradient and diagonal Hessian of the loss with respect to the outputs, in float64."""
    y = np.asarray(y, np.float64)
    if loss == "squared_error":
        return 2 * (y - np.asarray(targets, np.float64)) / len(y), np.full_like(y, 2 / len(y))
    q = np.exp(y - y.max(-1, keepdims=True))
    q /= q.sum(-1, keepdims=True)
    return (q - np.eye(y.shape[-1])[np.asarray(targets)]) / len(y), (q - q**2) / len(y)


# Exact diagonal and Hutchinson's estimate


def test_the_exact_diagonal_is_that_of_the_hessian():
    params = {"a": jnp.arange(1.0, 7.0).reshape(2, 3), "b": jnp.float32(0.5), "c": (jnp.array([0.1, -0.2]),)}
    loss = lambda p: jnp.sum(jnp.sin(p["a"] * p["b"]) ** 2) + jnp.prod(p["c"][0]) * p["a"][0, 0] ** 3
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    expected = unravel(jnp.diag(jax.jit(jax.hessian(lambda v: loss(unravel(v))))(flat)))
    for chunk_size in (4, 128):
        close(jax.jit(lambda p, size=chunk_size: hessian_diagonal(loss, p, chunk_size=size))(params), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_hutchinson_converges_to_the_exact_diagonal(loss):
    x, targets = problem(loss)
    params = mlp_params((4, 3, 3))
    loss_fn = lambda p: LOSSES[loss](mlp(p, x), targets)
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    expected = flat(exact(mlp, params, x, targets, loss))
    # The spread of 40 averages of 50 samples each gives their standard error.
    estimate = jax.jit(jax.vmap(lambda key: hutchinson(loss_fn, params, key, samples=50)))
    means = jax.vmap(lambda tree: jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)]))(
        estimate(jax.random.split(jax.random.key(0), 40))
    )
    error = np.std(means, 0, ddof=1) / np.sqrt(len(means))
    z = (np.mean(means, 0) - expected) / error
    assert np.abs(z).max() < 4.5 and 0.6 < np.std(z) < 1.5
    off = lambda a: np.abs(a - expected).mean()
    assert off(np.mean(means, 0)) < 0.3 * np.mean([off(row) for row in means])  # falls as 1 / sqrt(samples)


def test_hutchinson_draws_signs_anew_for_every_key_and_leaf():
    # The Hessian of a product of two leaves has no diagonal: the estimate is v_a v_b b, with a random sign.
    loss = lambda p: jnp.sum(p["a"] * p["b"])
    params = {"a": jnp.ones(64), "b": jnp.ones(64)}
    first, second = (hutchinson(loss, params, jax.random.key(seed)) for seed in (0, 1))
    assert set(np.unique(first["a"])) == {-1, 1}
    assert (first["a"] != second["a"]).any()


# HesScale against the equations


@pytest.mark.parametrize("loss", LOSSES)
def test_agrees_with_the_recursion_in_numpy(loss):
    x, targets = problem(loss)
    params = mlp_params((4, 6, 5, 3))
    value, grads, diagonal = scaled(mlp, params, x, targets, loss)

    h, hidden = np.asarray(x, np.float64), []
    weights = [(np.asarray(layer["w"], np.float64), np.asarray(layer["b"], np.float64)) for layer in params]
    for number, (w, b) in enumerate(weights):
        hidden.append(h)
        h = h @ w + b
        h = np.tanh(h) if number < 2 else h
    g, d2 = output_derivatives(h, targets, loss)
    expected = []
    for (w, _), h in reversed(list(zip(weights, hidden, strict=True))):
        expected.insert(0, {"w": (h**2).T @ d2, "b": d2.sum(0)})
        first, second = 1 - h**2, -2 * h * (1 - h**2)  # derivatives of tanh, from its value
        g_h, d2_h = g @ w.T, d2 @ (w**2).T
        g, d2 = first * g_h, first**2 * d2_h + second * g_h
    close(diagonal, expected)
    expected_loss, expected_grads = jax.value_and_grad(lambda p: LOSSES[loss](mlp(p, x), targets))(params)
    close((value, grads), (expected_loss, expected_grads))


@pytest.mark.parametrize("activation", [None, "tanh"])
def test_which_layers_are_exact(activation):
    params = mlp_params((4, 5, 5, 3))
    apply = lambda p, x: mlp(p, x, jnp.tanh if activation else lambda h: h)
    for loss, exact_layers in (("softmax_cross_entropy", {2}), ("squared_error", {1, 2})):
        x, targets = problem(loss)
        diagonal, truth = scaled(apply, params, x, targets, loss)[2], exact(apply, params, x, targets, loss)
        for number in range(3):
            error = [
                float(jnp.abs(diagonal[number][name] - truth[number][name]).max() / jnp.abs(truth[number][name]).max())
                for name in ("w", "b")
            ]
            assert max(error) < 1e-5 if number in exact_layers else min(error) > 1e-2, (loss, number, error)


def meandering(x):
    return jnp.where(x > 0, x, 0.2 * x) + 0.1 * x * jnp.sin(x) / (1 + jnp.exp(-x))


@pytest.mark.parametrize(
    "activation",
    ["relu", "elu", "gelu", "silu", "softplus", meandering],
)
def test_any_elementwise_activation_is_followed_exactly(activation):
    # HesScale is exact with one hidden layer and squared errors, so this tests f' and f'' of the whole function.
    x, targets = problem("squared_error")
    params = mlp_params((4, 6, 3), seed=1)
    apply = lambda p, x: mlp(p, x, get_activation(activation))
    _, grads, diagonal = scaled(apply, params, x, targets, "squared_error")
    close(diagonal, exact(apply, params, x, targets, "squared_error"), 2e-5)
    close(grads, jax.grad(lambda p: LOSSES["squared_error"](apply(p, x), targets))(params))


def numpy_conv_net(params, x, targets, loss):
    """Compute curvatures of convolution, tanh, 2x2 max pooling, flatten, dense in loops, example by example."""
    k, b, w, c = (np.asarray(params[name], np.float64) for name in ("k", "b", "w", "c"))
    size, _, _, channels = k.shape
    d2_k, d2_b, d2_w, d2_c = np.zeros_like(k), np.zeros_like(b), np.zeros_like(w), np.zeros_like(c)
    outputs, caches = [], []
    for image in np.asarray(x, np.float64):
        rows, columns = image.shape[0] - size + 1, image.shape[1] - size + 1
        a = np.array(
            [
                [np.einsum("ijc,ijco->o", image[r : r + size, s : s + size], k) + b for s in range(columns)]
                for r in range(rows)
            ]
        )
        h, chosen = np.tanh(a), []
        for r in range(0, rows - 1, 2):
            for s in range(0, columns - 1, 2):
                for o in range(channels):
                    window = [(r + i, s + j, o) for i in range(2) for j in range(2)]
                    chosen.append(max(window, key=lambda place: h[place]))
        pooled = np.array([h[place] for place in chosen])
        outputs.append(pooled @ w + c)
        caches.append((image, h, chosen, pooled))
    grads, curves = output_derivatives(np.array(outputs), targets, loss)
    for (image, h, chosen, pooled), g_y, d2_y in zip(caches, grads, curves, strict=True):
        d2_w += np.outer(pooled**2, d2_y)
        d2_c += d2_y
        for place, g_h, d2_h in zip(chosen, w @ g_y, w**2 @ d2_y, strict=True):
            first, second = 1 - h[place] ** 2, -2 * h[place] * (1 - h[place] ** 2)
            d2_a = second * g_h + first**2 * d2_h
            r, s, o = place
            d2_k[..., o] += image[r : r + size, s : s + size] ** 2 * d2_a
            d2_b[o] += d2_a
    return {"k": d2_k, "b": d2_b, "w": d2_w, "c": d2_c}


@pytest.mark.parametrize("loss", LOSSES)
def test_convolution_max_pooling_and_flatten_agree_with_loops(loss):
    rng = np.random.default_rng(0)
    _, targets = problem(loss, batch=3)
    x = jnp.asarray(rng.normal(size=(3, 6, 7, 2)), jnp.float32)
    shapes = {"k": (3, 3, 2, 4), "b": (4,), "w": (2 * 2 * 4, 3), "c": (3,)}
    params = {name: jnp.asarray(0.4 * rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}

    def apply(p, x):
        h = jax.lax.conv_general_dilated(x, p["k"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        h = nn.max_pool(jnp.tanh(h + p["b"]), (2, 2), strides=(2, 2))
        return h.reshape(len(x), -1) @ p["w"] + p["c"]

    for network in (apply, cbp_jax.contract_convolutions(apply)):
        _, grads, diagonal = scaled(network, params, x, targets, loss)
        close(diagonal, numpy_conv_net(params, x, targets, loss))
        close(grads, jax.grad(lambda p: LOSSES[loss](apply(p, x), targets))(params))


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (2, 1), "padding": ((1, 0), (2, 1)), "rhs_dilation": (1, 2)},
        {"window_strides": (1, 1), "padding": ((2, 1), (0, 1)), "lhs_dilation": (2, 1)},
        {"window_strides": (1, 1), "padding": "VALID", "feature_group_count": 2},
    ],
    ids=["strided and dilated", "transposed", "grouped"],
)
def test_a_convolution_squares_the_coefficients_of_its_linear_maps(options):
    rng = np.random.default_rng(0)
    groups = options.get("feature_group_count", 1)
    shapes = {"scale": (5, 6, 4), "kernel": (3, 2, 4 // groups, 2)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    x = jnp.asarray(rng.normal(size=(2, 5, 6, 4)), jnp.float32)
    conv = lambda image, kernel: jax.lax.conv_general_dilated(
        image[None], kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    ).ravel()
    apply = lambda p, x: jax.vmap(lambda image: conv(image * p["scale"], p["kernel"]))(x)
    targets = jnp.zeros_like(apply(params, x))
    diagonal = scaled(apply, params, x, targets, "squared_error")[2]
    # The same from the matrices of the linear maps: each output's second derivative is 2 / batch.
    expected = {name: np.zeros(shape) for name, shape in shapes.items()}
    for image in x:
        to_image, to_kernel = jax.jacobian(conv, (0, 1))(image * params["scale"], params["kernel"])
        expected["kernel"] += np.square(to_kernel).sum(0)
        expected["scale"] += np.square(image) * np.square(to_image).sum(0)
    close(diagonal, expected)


# Other networks


@pytest.mark.slow
def test_every_operation_of_the_packages_networks_is_followed():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 2)), jnp.float32)
    labels = jnp.array([0, 2])
    net = ConvNet(num_outputs=3, channels=(3,), kernel_sizes=(3,), hidden=(5,), activation="gelu", dropout_rate=0.3)
    params = net.init(jax.random.key(0), x)
    apply = lambda p, x: net.apply(p, x, train=True, rngs={"dropout": jax.random.key(1)})
    value, grads, diagonal = scaled(apply, params, x, labels)
    loss = lambda p: LOSSES["softmax_cross_entropy"](apply(p, x), labels)
    close((value, grads), jax.jit(jax.value_and_grad(loss))(params))
    last = lambda layer, x: apply({"params": {**params["params"], "Dense_1": layer}}, x)
    close(diagonal["params"]["Dense_1"], exact(last, params["params"]["Dense_1"], x, labels))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(diagonal))


def test_branches_are_added_and_cross_terms_dropped():
    # Two branches read h; each passes back its own part, and cross terms are dropped.
    x, targets = problem("squared_error", inputs=3, outputs=2)
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in {"a": (3, 4), "b": (8, 2)}.items()}

    def apply(p, x):
        h = x @ p["a"]
        return jnp.concatenate([jnp.tanh(h), h[:, ::-1]], axis=1) @ p["b"]

    diagonal = scaled(apply, params, x, targets, "squared_error")[2]
    h, b = np.asarray(x @ params["a"], np.float64), np.asarray(params["b"], np.float64)
    both = np.concatenate([np.tanh(h), h[:, ::-1]], 1)
    g_y, d2_y = output_derivatives(both @ b, targets, "squared_error")
    g, d2 = g_y @ b.T, d2_y @ (b**2).T
    first = 1 - np.tanh(h) ** 2
    d2_h = first**2 * d2[:, :4] - 2 * np.tanh(h) * first * g[:, :4] + d2[:, 4:][:, ::-1]
    close(diagonal, {"a": np.square(x).T @ d2_h, "b": (both**2).T @ d2_y})


@pytest.mark.parametrize(
    ("twice", "as_concatenation"),
    [
        (lambda h: jnp.tile(h, (1, 2)), lambda h: jnp.concatenate([h, h], 1)),
        (lambda h: jnp.stack([h, h**2], 1), lambda h: jnp.concatenate([h[:, None], h[:, None] ** 2], 1)),
    ],
    ids=["tile", "stack"],
)
def test_stacking_and_tiling_are_concatenations(twice, as_concatenation):
    x, targets = problem("squared_error", inputs=3, outputs=2)
    params = {"a": jax.random.normal(jax.random.key(0), (3, 4)), "b": jax.random.normal(jax.random.key(1), (8, 2))}

    def diagonal(doubled):
        apply = lambda p, x: doubled(jnp.tanh(x @ p["a"])).reshape(len(x), 8) @ p["b"]
        return hesscale(apply, params, x, targets, "squared_error")[2]

    close(diagonal(twice), diagonal(as_concatenation))


def test_pooling_by_means_sums_and_the_maximum_of_a_whole_map():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 4, 2)), jnp.float32)
    targets = jnp.zeros((3, 2))
    params = {"scale": jnp.ones((4, 4, 2))}
    for pool, coefficient in (
        (lambda h: nn.avg_pool(h, (4, 4)).reshape(3, 2), lambda h: np.full(h.shape, 1 / 16)),
        (lambda h: h.mean((1, 2)), lambda h: np.full(h.shape, 1 / 16)),
        (lambda h: h.max((1, 2)), lambda h: h == h.max((1, 2), keepdims=True)),
        # All 16 entries of the second channel's map tie at 0 and share the derivative, 1/16 each.
        (lambda h: (h * jnp.array([1.0, 0.0])).max((1, 2)), lambda h: (h == h.max((1, 2), keepdims=True)) * [1, 0]),
    ):
        apply = lambda p, x, pool=pool: pool(x * p["scale"])
        diagonal = scaled(apply, params, x, targets, "squared_error")[2]["scale"]
        h = np.asarray(x)
        close(diagonal, (2 / 3 * h**2 * coefficient(h) ** 2).sum(0))


def test_ties_of_a_maximum_have_squared_shares():
    params = {"scale": jnp.ones((1, 4))}
    apply = lambda p, x: (x * p["scale"]).max(-1, keepdims=True)
    x, targets = jnp.array([[2.0, 2.0, 1.0, 2.0]]), jnp.zeros((1, 1))
    _, grads, diagonal = scaled(apply, params, x, targets, "squared_error")
    np.testing.assert_allclose(grads["scale"], [[8 / 3, 8 / 3, 0, 8 / 3]], rtol=1e-6)
    np.testing.assert_allclose(diagonal["scale"], [[8 / 9, 8 / 9, 0, 8 / 9]], rtol=1e-6)


def test_parameters_that_are_shared_scaled_unused_or_stopped():
    x, targets = problem("squared_error", inputs=3, outputs=3)
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)), jnp.float32), "unused": jnp.ones(2)}
    # The kernel is used twice, once transposed and scaled: the two uses add up.
    apply = lambda p, x: x @ p["w"] + 3 * (x @ p["w"].T) + x @ jax.lax.stop_gradient(p["w"])
    _, grads, diagonal = scaled(apply, params, x, targets, "squared_error")
    use = 2 * np.square(x).mean(0)[:, None] * np.ones((1, 3))
    close(diagonal["w"], use + 9 * use.T)
    close(grads, jax.grad(lambda p: LOSSES["squared_error"](apply(p, x), targets))(params))
    assert (diagonal["unused"] == 0).all() and (grads["unused"] == 0).all()


def test_axes_before_the_last_are_all_averaged_over():
    params = mlp_params((4, 5, 3))
    x, labels = problem("softmax_cross_entropy", batch=6)
    flat = scaled(mlp, params, x, labels)
    split = scaled(mlp, params, x.reshape(2, 3, 4), labels.reshape(2, 3))
    probabilities = scaled(mlp, params, x, jax.nn.one_hot(labels, 3))
    close(split, flat)
    close(probabilities, flat)


def test_half_precision_is_kept():
    x, labels = problem("softmax_cross_entropy")
    net = MLP((6,), 3, "gelu")
    params = net.init(jax.random.key(0), x)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    results, expected = (
        scaled(net.apply, half, x.astype(jnp.bfloat16), labels),
        scaled(net.apply, params, x, labels),
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(results[1:])} == {jnp.dtype(jnp.bfloat16)}
    close(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), results), expected, 0.1)


# Quality of the approximation, and ways to call it


@pytest.mark.slow
def test_ranks_inner_weights_better_than_squared_gradients():
    sizes = (8, 12, 12, 4)

    @jax.jit
    @jax.vmap
    def measure(key):
        key, *keys = jax.random.split(key, 4)
        params = [
            {"w": jax.random.normal(k, (a, b)) * 1.5 / jnp.sqrt(a), "b": jnp.zeros(b)}
            for k, (a, b) in zip(keys, itertools.pairwise(sizes), strict=True)
        ]
        x, labels = jax.random.normal(key, (1, 8)), jax.random.randint(key, (1,), 0, 4)
        _, grads, diagonal = hesscale(mlp, params, x, labels)
        return exact(mlp, params, x, labels), diagonal, jax.tree.map(jnp.square, grads)

    truth, diagonal, squares = measure(jax.random.split(jax.random.key(0), 8))
    for number in (0, 1):  # the inner layers
        rank = lambda tree, number=number: np.array(
            [
                stats.spearmanr(a, b).statistic
                for a, b in zip(
                    tree[number]["w"].reshape(8, -1).tolist(), truth[number]["w"].reshape(8, -1).tolist(), strict=True
                )
            ]
        )
        ours, theirs = rank(diagonal), rank(squares)
        assert ours.mean() > theirs.mean() + 0.1 and (ours > theirs).sum() >= 7, (ours, theirs)


def test_under_jit_and_vmap():
    x, labels = problem("softmax_cross_entropy")
    seeds = [mlp_params((4, 5, 3), seed) for seed in (0, 1)]
    together = jax.jit(jax.vmap(lambda p: hesscale(mlp, p, x, labels)))(jax.tree.map(lambda *a: jnp.stack(a), *seeds))
    for row, params in enumerate(seeds):
        close(jax.tree.map(lambda leaf, row=row: leaf[row], together), hesscale(mlp, params, x, labels))


def layer_norm(p, x):
    h = x @ p["w"]
    h = h - h.mean(-1, keepdims=True)
    return h * jax.lax.rsqrt((h**2).mean(-1, keepdims=True) + 1e-5)


@jax.custom_vjp
def straight_through(x):
    return jnp.sign(x)


straight_through.defvjp(lambda x: (jnp.sign(x), None), lambda _, g: (g,))


@jax.custom_jvp
def weird_sum(x):
    return x.sum(-1, keepdims=True)


weird_sum.defjvp(lambda values, tangents: (weird_sum(*values), 2 * tangents[0].sum(-1, keepdims=True)))


@pytest.mark.parametrize(
    ("apply", "words"),
    [
        (layer_norm, "`mul` here: two different activations meet"),
        (lambda p, x: (x @ p["w"]) * jnp.tanh(x @ p["w"] @ p["w"]), "`mul` here: two different activations meet"),
        (lambda p, x: (x @ p["w"]) @ (x @ p["w"]).T, "`dot_general` here: it is a product of two activations"),
        (lambda p, x: jax.nn.softmax(x @ p["w"]) @ p["w"], "does not follow `.*` here"),
        (lambda p, x: jax.lax.fori_loop(0, 2, lambda _, h: h @ p["w"], x), "`scan` here: no rule is known"),
        (lambda p, x: straight_through(x @ p["w"]), "`custom_vjp_call.*` here: no rule is known"),
        (lambda p, x: weird_sum(x @ p["w"]), "`custom_jvp_call` here: its body is no elementwise function"),
        (lambda p, x: jnp.sort(x @ p["w"]), "`sort` here: no rule is known"),
        (lambda p, x: (x @ p["w"], x), "one array .* got arrays of shapes"),
        (lambda p, x: (x @ p["w"]).sum(-1), r"one array .* got arrays of shapes \[\(2,\)\]"),
    ],
)
def test_unsupported_operations_are_named(apply, words):
    with pytest.raises(ValueError, match=words):
        hesscale(apply, {"w": jnp.eye(3)}, jnp.ones((2, 3)), jnp.zeros(2, int))


def test_bad_arguments():
    params, x, labels = {"w": jnp.eye(3)}, jnp.ones((2, 3)), jnp.zeros(2, int)
    apply = lambda p, x: x @ p["w"]
    with pytest.raises(
        ValueError, match=r"loss must be one of \['softmax_cross_entropy', 'squared_error'\], got 'mse'"
    ):
        hesscale(apply, params, x, labels, loss="mse")
    with pytest.raises(ValueError, match=r"classes of shape \(2,\), got shape \(2, 1\)"):
        hesscale(apply, params, x, labels[:, None])
    with pytest.raises(ValueError, match=r"probabilities of shape \(2, 3\), got shape \(2,\)"):
        hesscale(apply, params, x, jnp.zeros(2))
    with pytest.raises(ValueError, match=r"outputs' shape \(2, 3\), got shape \(2,\)"):
        hesscale(apply, params, x, jnp.zeros(2), loss="squared_error")
    integers = {"layer": {"count": jnp.int32(3)}, **params}
    for function in (lambda p: hesscale(apply, p, x, labels), lambda p: hessian_diagonal(jnp.sum, p)):
        with pytest.raises(TypeError, match="'layer/count' is int32"):
            function(integers)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        hessian_diagonal(lambda p: jnp.sum(p["w"]), params, chunk_size=0)
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        hutchinson(lambda p: jnp.sum(p["w"]), params, jax.random.key(0), samples=0)
