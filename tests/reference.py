"""Algorithm 1 of Dohare et al. (Nature, 2024) in float64 NumPy, written independently of the package.

This file does not use jax: networks, gradients, optimizers, utilities, selection and resets are written out.
The one thing that cannot be recomputed is the random draw, so `ContinualBackprop.step` is handed the parameters
that the tested implementation arrived at and reads from them the incoming columns of those units that *its own*
selection replaces. Known properties of these columns, such as orthogonality, are asserted.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Dense:
    features: int
    activation: str | None = None  # "relu", "tanh" or None


@dataclasses.dataclass(frozen=True)
class Conv:
    features: int
    kernel: int = 3
    padding: str = "VALID"
    activation: str = "relu"
    pool: int = 1  # a pool x pool max pooling with the same stride follows the activation


# ------------------------------------------------------------------------------------- forward and backward


def _activate(name, z):
    return {"relu": lambda: np.maximum(z, 0.0), "tanh": lambda: np.tanh(z), None: lambda: z}[name]()


def _activation_slope(name, z):
    return {
        "relu": lambda: (z > 0).astype(z.dtype),
        "tanh": lambda: 1.0 - np.tanh(z) ** 2,
        None: lambda: np.ones_like(z),
    }[name]()


def _pad(x, kernel, padding):
    if padding == "VALID":
        return x, (0, 0)
    low, high = (kernel - 1) // 2, kernel - 1 - (kernel - 1) // 2
    return np.pad(x, ((0, 0), (low, high), (low, high), (0, 0))), (low, high)


def _conv(x, kernel):
    """Compute the cross-correlation of [batch, height, width, in] with [kh, kw, in, out], stride 1, no padding."""
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], axis=(1, 2))
    return np.einsum("bhwikl,klio->bhwo", windows, kernel)


def _conv_backward(x, kernel, dz):
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], axis=(1, 2))
    dkernel = np.einsum("bhwikl,bhwo->klio", windows, dz)
    dx = np.zeros_like(x)
    height, width = dz.shape[1:3]
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            dx[:, i : i + height, j : j + width] += dz @ kernel[i, j].T
    return dkernel, dx


def _max_pool(a, size):
    batch, height, width, channels = a.shape
    blocks = a[:, : height // size * size, : width // size * size].reshape(
        batch, height // size, size, width // size, size, channels
    )
    blocks = blocks.transpose(0, 1, 3, 5, 2, 4).reshape(batch, height // size, width // size, channels, -1)
    return blocks.max(-1), blocks.argmax(-1)


def _max_pool_backward(dh, argmax, shape, size):
    da = np.zeros(shape)
    batch, height, width, channels = np.indices(dh.shape)
    da[batch, height * size + argmax // size, width * size + argmax % size, channels] = dh
    return da


def forward(layers, params, x):
    """Return the output and, for every layer, what its backward pass needs; `h` is the next layer's input."""
    tape, h = [], np.asarray(x, np.float64)
    for layer, (kernel, bias) in zip(layers, params, strict=True):
        if isinstance(layer, Conv):
            entry = {"x": _pad(h, layer.kernel, layer.padding)[0], "unpadded": h.shape}
            z = _conv(entry["x"], kernel) + bias
            a = _activate(layer.activation, z)
            h, argmax = _max_pool(a, layer.pool) if layer.pool > 1 else (a, None)
            entry |= {"z": z, "argmax": argmax, "h": h}
        else:
            entry = {"x": h.reshape(len(h), -1), "unpadded": h.shape}
            z = entry["x"] @ kernel + bias
            h = _activate(layer.activation, z)
            entry |= {"z": z, "h": h}
        tape.append(entry)
    return h, tape


def backward(layers, params, tape, doutput):
    grads, dh = [None] * len(layers), doutput
    for index in reversed(range(len(layers))):
        layer, entry, (kernel, _) = layers[index], tape[index], params[index]
        entry["dh"] = dh
        if isinstance(layer, Conv):
            if layer.pool > 1:
                dh = _max_pool_backward(dh, entry["argmax"], entry["z"].shape, layer.pool)
            dz = dh * _activation_slope(layer.activation, entry["z"])
            dkernel, dx = _conv_backward(entry["x"], kernel, dz)
            low, _ = _pad(np.zeros((1, 1, 1, 1)), layer.kernel, layer.padding)[1]
            _, height, width, _ = entry["unpadded"]
            dh = dx[:, low : low + height, low : low + width]
            grads[index] = (dkernel, dz.sum((0, 1, 2)))
        else:
            dz = dh * _activation_slope(layer.activation, entry["z"])
            grads[index] = (entry["x"].T @ dz, dz.sum(0))
            dh = (dz @ kernel.T).reshape(entry["unpadded"])
    return grads


def cross_entropy_gradient(logits, labels):
    """Return the gradient of the batch mean of the softmax cross-entropy with respect to the logits."""
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    p[np.arange(len(labels)), labels] -= 1.0
    return p / len(labels)


# ----------------------------------------------------------------------------------------------- optimizers


class SGD:
    def __init__(self, learning_rate):
        self.learning_rate = learning_rate

    def init(self, params):
        pass

    def updates(self, grads):
        return [tuple(-self.learning_rate * g for g in pair) for pair in grads]

    def reset(self, layer, leaf, where):
        pass


class PerWeightAdam:
    """Adam with a step count for every weight, so that a reset restarts its bias correction."""

    def __init__(self, learning_rate, b1=0.9, b2=0.999, eps=1e-8):
        self.learning_rate, self.b1, self.b2, self.eps = learning_rate, b1, b2, eps

    def init(self, params):
        zeros = lambda: [[np.zeros_like(leaf) for leaf in pair] for pair in params]
        self.mu, self.nu, self.count = zeros(), zeros(), zeros()

    def updates(self, grads):
        result = []
        for mu, nu, count, pair in zip(self.mu, self.nu, self.count, grads, strict=True):
            steps = []
            for i, g in enumerate(pair):
                count[i] += 1
                mu[i] = self.b1 * mu[i] + (1 - self.b1) * g
                nu[i] = self.b2 * nu[i] + (1 - self.b2) * g**2
                mu_hat, nu_hat = mu[i] / (1 - self.b1 ** count[i]), nu[i] / (1 - self.b2 ** count[i])
                steps.append(-self.learning_rate * mu_hat / (np.sqrt(nu_hat) + self.eps))
            result.append(tuple(steps))
        return result

    def reset(self, layer, leaf, where):
        for moments in (self.mu, self.nu, self.count):
            moments[layer][leaf][where] = 0.0


# ---------------------------------------------------------------------------------------------- Algorithm 1


class ContinualBackprop:
    """The hidden layers of a feed-forward network under Algorithm 1.

    Group k contains the units of layer k. Its incoming weights are the last axis of kernel k, its outgoing weights the
    input axis of kernel k + 1, several rows a unit where positions are flattened between the two.
    """

    def __init__(self, layers, params, optimizer, *, rate, decay, maturity, utility, reinitialization="resample"):
        self.layers = layers
        self.params = [[np.array(leaf, np.float64) for leaf in pair] for pair in params]
        self.optimizer, self.rate, self.decay, self.maturity = optimizer, rate, decay, maturity
        self.kind, self.reinitialization = utility, reinitialization
        self.initial = [[leaf.copy() for leaf in pair] for pair in self.params]
        optimizer.init(self.params)
        sizes = [layer.features for layer in layers[:-1]]
        self.age = [np.zeros(n, int) for n in sizes]
        self.utility = [np.zeros(n) for n in sizes]
        self.mean = [0.0] * len(sizes)  # becomes [positions, units]
        self.budget = [0.0] * len(sizes)
        self.budget_margin = np.inf  # smallest distance of a budget from a whole number
        self.utility_margin = np.inf  # smallest relative distance between the last replaced unit and the first kept one
        self.chosen, self.ranking = [None] * len(sizes), [None] * len(sizes)  # in the last step

    def outgoing_shape(self, k):
        """Return kernel k + 1 as [leading, positions, units, outputs], a view."""
        kernel, units = self.params[k + 1][0], self.layers[k].features
        if kernel.ndim == 4:
            return (kernel.shape[0] * kernel.shape[1], 1, units, kernel.shape[3])
        return (1, kernel.shape[0] // units, units, kernel.shape[1])

    def activations(self, k, tape):
        """Return h as [samples, positions, units]; positions with shared outgoing weights are samples."""
        h, units = tape[k]["h"], self.layers[k].features
        return h.reshape(-1, self.outgoing_shape(k)[1], units)

    def step(self, x, labels, arrived):
        """Take one step. `arrived` are the tested implementation's parameters after it, [(kernel, bias), ...].

        Returns the list of boolean masks of replaced units.
        """
        logits, tape = forward(self.layers, self.params, x)
        grads = backward(self.layers, self.params, tape, cross_entropy_gradient(logits, labels))
        before = [pair[0].copy() for pair in self.params]
        for pair, step in zip(self.params, self.optimizer.updates(grads), strict=True):
            pair[0] += step[0]
            pair[1] += step[1]
        groups = range(len(self.layers) - 1)
        masks = [self._process(k, self.activations(k, tape), tape[k], before, grads) for k in groups]
        after = [[leaf.copy() for leaf in pair] for pair in self.params]
        for k in groups:
            self._start_outgoing(k, arrived, after)
        for k in groups:  # a weight from one new unit to another is drawn for the latter
            self._start_incoming(k, arrived, after, grads)
        return masks

    def _gradient_utility(self, k, entry, before, grads):
        """Compute the utilities that use gradients; a gate's gradient comes from the activation, not the weights."""
        slope = (entry["h"] * entry["dh"]).reshape(-1, self.layers[k].features).sum(0)
        w = before[k + 1].reshape(self.outgoing_shape(k))
        g = grads[k + 1][0].reshape(w.shape)
        curvature = (w**2 * g**2).sum((0, 1, 3))  # in tests, the Hessian's diagonal is g**2
        incoming = np.abs(grads[k][0]).mean(tuple(range(grads[k][0].ndim - 1)))
        return {
            "taylor": np.abs(slope),
            "taylor_second_order": np.abs(curvature / 2 - slope),
            "fisher": slope**2,
            "snip": np.abs(w * g).sum((0, 1, 3)),
            "gradient": incoming / incoming.mean(),
            "upgd": -slope,
            "upgd_second_order": curvature / 2 - slope,
        }

    def _donors(self, k):
        """Return the unit that is split for each replaced unit."""
        ranking, chosen = self.ranking[k].copy(), self.chosen[k]
        ranking[chosen] = -np.inf
        order = np.argsort(-ranking, kind="stable")[: len(chosen)]
        top = np.sort(ranking[np.isfinite(ranking)])[::-1][: len(chosen) + 1]
        if len(chosen) and len(top) > 1:
            self.utility_margin = min(self.utility_margin, np.min(-np.diff(top) / (np.abs(top[1:]) + 1e-30)))
        return [unit for unit in order if np.isfinite(ranking[unit])]

    def _start_outgoing(self, k, arrived, after):
        """Set bias and outgoing weights of new units, which are 0 already."""
        chosen, kind, bias = self.chosen[k], self.reinitialization, self.params[k][1]
        shape = self.outgoing_shape(k)
        outgoing, old = self.params[k + 1][0].reshape(shape), after[k + 1][0].reshape(shape)
        if kind == "rewind":
            bias[chosen] = self.initial[k][1][chosen]
        elif kind == "resample_both":
            outgoing[:, :, chosen] = np.asarray(arrived[k + 1][0], np.float64).reshape(shape)[:, :, chosen]
        elif kind == "split":
            donors = self._donors(k)
            for unit, donor in zip(chosen, donors, strict=False):
                outgoing[:, :, unit] = outgoing[:, :, donor] = old[:, :, donor] / 2
                bias[unit] = after[k][1][donor]

    def _start_incoming(self, k, arrived, after, grads):
        """Copy the drawn incoming weights of new units, after checking their properties."""
        chosen, kind, kernel = self.chosen[k], self.reinitialization, self.params[k][0]
        columns = lambda array: np.asarray(array, np.float64).reshape(-1, kernel.shape[-1])
        fresh, old, gradient = columns(arrived[k][0]), columns(after[k][0]), columns(grads[k][0])
        living = np.setdiff1d(np.arange(kernel.shape[-1]), chosen)
        size = np.sqrt(6.0 / len(fresh))  # the bound of he_uniform
        kernel[..., chosen] = np.asarray(arrived[k][0], np.float64)[..., chosen]
        if kind == "rewind":
            kernel[..., chosen] = self.initial[k][0][..., chosen]
        elif kind == "split":
            for unit, donor in zip(chosen, self._donors(k), strict=False):
                assert 0 < np.abs(fresh[:, unit] - old[:, donor]).max() <= 0.1 * size * 1.001
        elif kind == "regrow":
            for unit in chosen:
                way = gradient[:, unit] if gradient[:, unit].any() else gradient[:, living].mean(1)
                length = np.linalg.norm(fresh[:, unit])
                assert 0 < length <= size * np.sqrt(len(fresh))
                assert fresh[:, unit] @ way / (length * np.linalg.norm(way)) < -0.999
        elif kind == "orthogonal":
            for unit in chosen:
                length, spread = np.linalg.norm(fresh[:, unit]), np.linalg.svd(old[:, living], compute_uv=False)
                assert 0 < length <= size * np.sqrt(len(fresh))
                if kernel.shape[-1] < len(fresh):
                    assert np.linalg.norm(fresh[:, unit] @ old[:, living]) < 1e-2 * spread[0] * length
                else:  # no direction is orthogonal to all; the draw is recovered from the result
                    drawn = old[:, living] @ (old[:, living].T @ fresh[:, unit])
                    drawn += 1e-4 * np.square(spread).sum() / len(fresh) * fresh[:, unit]
                    assert np.abs(drawn * length / np.linalg.norm(drawn)).max() <= size * (1 + 1e-3)
        else:
            assert np.abs(fresh[:, chosen]).max(initial=0) <= size * (1 + 1e-5)
        if kind != "rewind":
            assert np.all((fresh != old.astype(np.float32))[:, chosen].any(0))

    def _process(self, k, h, entry, before, grads):
        kernel, bias = self.params[k]
        outgoing = self.params[k + 1][0].reshape(self.outgoing_shape(k))
        self.age[k] += 1
        correction = 1.0 - self.decay ** self.age[k]

        self.mean[k] = self.decay * self.mean[k] + (1 - self.decay) * h.mean(0)
        magnitude = np.abs(outgoing).sum((0, 3))  # [positions, units]
        incoming = np.abs(kernel).sum(tuple(range(kernel.ndim - 1)))
        contribution = (np.abs(h).mean(0) * magnitude).sum(0)
        zero_contribution = (np.abs(h - self.mean[k] / correction).mean(0) * magnitude).sum(0)
        with np.errstate(divide="ignore", invalid="ignore"):  # all inputs of a unit may be new in the same step
            y = {
                "contribution": contribution,
                "zero_contribution": zero_contribution,
                "adaptation": 1.0 / incoming,
                "adaptable_contribution": zero_contribution / incoming,
                "weight": magnitude.sum(0),
                **self._gradient_utility(k, entry, before, grads),
            }[self.kind]
        self.utility[k] = self.decay * self.utility[k] + (1 - self.decay) * y

        eligible = np.flatnonzero(self.age[k] > self.maturity)
        self.budget[k] += self.rate * len(eligible)
        if len(eligible):
            self.budget_margin = min(self.budget_margin, abs(self.budget[k] - round(self.budget[k])))
        count = int(np.floor(self.budget[k]))
        self.budget[k] -= count
        corrected = self.utility[k] / correction
        eligible = eligible[np.isfinite(corrected[eligible])]
        ranked = corrected[eligible]
        order = np.argsort(ranked, kind="stable")
        if 0 < count < len(eligible):
            last, first = ranked[order[count - 1]], ranked[order[count]]
            self.utility_margin = min(self.utility_margin, (first - last) / (abs(first) + 1e-30))
        replaced = np.zeros(len(self.age[k]), bool)
        self.chosen[k], self.ranking[k] = eligible[order[:count]], corrected
        replaced[self.chosen[k]] = True

        bias[replaced] = 0.0
        outgoing[:, :, replaced] = 0.0  # a view into kernel k + 1
        self.utility[k][replaced] = 0.0
        self.age[k][replaced] = 0
        self.mean[k][:, replaced] = 0.0
        self.optimizer.reset(k, 0, (..., replaced))
        self.optimizer.reset(k, 1, replaced)
        rows = np.zeros(self.outgoing_shape(k), bool)
        rows[:, :, replaced] = True
        self.optimizer.reset(k + 1, 0, rows.reshape(self.params[k + 1][0].shape))
        return replaced
