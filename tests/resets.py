"""Resets units as the transformations do, and checks the effect on the network."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np

import cbp_jax
from cbp_jax import units as units_lib
from cbp_jax.replacement import edits, views

_NORMAL = jax.nn.initializers.normal(1.0)


def paths(parts):
    """Return the paths of the slices (or of the consumers' kernels) in the params."""
    return [getattr(part, "kernel", part).path for part in parts]


def rows_of(part, units, shape):
    """Return a bool array of `shape`: the entries of a parameter that belong to units by a slice."""
    rows = np.zeros(part.rows, bool)
    rows[part.index[:, units]] = True
    other = [axis for axis in range(len(shape)) if axis not in part.axes]
    mask = rows.reshape([shape[axis] for axis in part.axes] + [1] * len(other))
    return np.broadcast_to(mask.transpose(np.argsort([*part.axes, *other])), shape)


def entries(parts, units, params):
    """Return the entries of parameters that belong to units by slices, by path."""
    leaves, found = units_lib.leaves_by_path(params), {}
    for part in parts:
        mask = rows_of(part, units, leaves[part.path].shape)
        found[part.path] = found.get(part.path, False) | mask
    return found


def make_reset(groups, initializer=_NORMAL):
    """Make a jitted function that resets units as `continual_backprop` does, without an inner update.

    Args:
      groups: all groups.
      initializer: draws fresh weights; None for the default.

    Returns:
      a function of the params, units by name of group, a seed for fresh weights, features, and whether they
      compensate the biases, where all kernels that read a group have one.
    """

    @jax.jit
    def run(params, numbers, seed, features, compensate):
        zeros = jax.tree.map(jnp.zeros_like, params)
        after = views.UpdatedParams(units_lib.leaves_by_path(params), units_lib.leaves_by_path(zeros))
        for group, units in zip(groups, numbers, strict=True):
            if features is not None and can_compensate(group):
                arrays = features[group.name] if isinstance(features[group.name], tuple) else (features[group.name],)
                shapes = [consumer.kernel.index.shape for consumer in group.operands()]
                means = [views.batch_mean(a, shape[0]) for a, shape in zip(arrays, shapes, strict=True)]
                means = tuple(mean * compensate for mean in means)
                after = after.with_updates(edits.compensate(after, group, units, means))
            after = after.without(group, edits.as_mask(units, group.size))
        updates, _ = edits.start_anew(
            after.params, after.updates, groups, numbers, initializer, lambda: jax.random.key(seed)
        )
        return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf + updates[units_lib.join_path(path)], params)

    def reset(params, chosen, seed=0, features=None, compensate=True):
        numbers = [jnp.asarray(chosen.get(group.name, [group.size]), jnp.int32) for group in groups]
        return run(params, numbers, seed, features, 1.0 * compensate)

    return reset


def can_compensate(group):
    """Return whether all kernels that read a group have a bias or need none."""
    return all(consumer.bias or consumer.absorbed for consumer in group.outgoing)


def without(params, masks):
    """Return params with the masked entries set to 0; masks are by path."""

    def zero(path, leaf):
        name = units_lib.join_path(path)
        return np.where(masks[name], 0, leaf) if name in masks else leaf

    return jax.tree_util.tree_map_with_path(zero, params)


def check_resets(groups, params, apply, rtol=1e-4):
    """Reset units of every group and assert what must hold.

    Args:
      groups: units of a network.
      params: its parameters.
      apply: params -> (array, features), whatever the network computes on a batch, with the statistics that mix units
        frozen; features may be None.
      rtol: tolerance of outputs, relative to their largest.

    Returns:
      by group, the mean square change of the output at a reset, without and with compensation.
    """

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(params):
        out, features = apply(params)
        return jnp.sum(jnp.sin(out * 3.0 + 0.5)), (out, features)

    reset = make_reset(groups)
    before, (out, features) = gradient(params)
    before, moved = units_lib.leaves_by_path(before), {}
    old = jax.tree.map(np.asarray, units_lib.leaves_by_path(params))
    for group in groups:
        for unit in (0, group.size - 1):
            new = reset(params, {group.name: [unit]}, features=features, compensate=False)
            incoming = entries(group.incoming, [unit], params)
            outgoing = entries([consumer.kernel for consumer in group.outgoing], [unit], params)
            vectors = entries((*group.biases, *group.scales), [unit], params)
            now = jax.tree.map(np.asarray, units_lib.leaves_by_path(new))
            for path, leaf in now.items():
                touched = incoming.get(path, np.False_) | outgoing.get(path, False) | vectors.get(path, False)
                np.testing.assert_array_equal(np.where(touched, 0, leaf), np.where(touched, 0, old[path]))
            for part in (*group.biases, *group.scales):
                values = now[part.path][rows_of(part, [unit], now[part.path].shape)]
                np.testing.assert_allclose(values, part.reset, atol=1e-6)
            gradients, (got, now_features) = gradient(new)
            after = units_lib.leaves_by_path(gradients)
            for path, mask in incoming.items():
                label = f"{group.name} unit {unit}: {path}"
                assert mask.any() and np.all(np.asarray(after[path])[mask] == 0), f"{label} still matters"
                others = (np.asarray(after[path]) == 0) & (np.asarray(before[path]) != 0) & ~mask
                others &= ~outgoing.get(path, np.zeros_like(mask))
                assert not others.any(), f"{label}: a neighbor is silenced"
            # A second reset changes no output; the first changed it only by the removed outgoing weights.
            again = reset(params, {group.name: [unit]}, seed=1, features=features, compensate=False)
            np.testing.assert_array_equal(got, gradient(again)[1][0])
            removed = without(params, {path: m & ~incoming.get(path, np.False_) for path, m in outgoing.items()})
            expected, unit_removed = gradient(removed)[1]
            np.testing.assert_allclose(got, expected, atol=rtol * np.abs(out).max())
            if features is not None:  # all other units have the activations of a network without the removed unit
                jax.tree.map(
                    lambda a, b: np.testing.assert_allclose(a, b, atol=rtol * max(np.abs(b).max(), 1e-3)),
                    without_unit(now_features, group.name, unit),
                    without_unit(unit_removed, group.name, unit),
                )
        if can_compensate(group) and features is not None:
            compensated = reset(params, {group.name: [unit]}, features=features)
            check_compensation(group, unit, params, compensated, features, vectors, rtol)
            corrected = gradient(compensated)[1][0]
            moved[group.name] = np.mean(np.square(got - out)), np.mean(np.square(corrected - out))
    return moved


def without_unit(features, name, unit):
    """Return features as float32 NumPy arrays, without those of one unit of a group."""
    drop = lambda array: np.delete(np.asarray(array, np.float32), unit, -1)
    return {
        group: jax.tree.map(drop if group == name else lambda array: np.asarray(array, np.float32), arrays)
        for group, arrays in features.items()
    }


def check_compensation(group, unit, params, compensated, features, vectors, rtol):
    """Assert that biases took over the unit's mean contribution, so that outputs of dense kernels change less.

    Args:
      group, unit: the replaced unit.
      params, compensated: parameters before, and after a replacement with compensation.
      features: features before the replacement.
      vectors: the entries of the unit's own biases, by path.
      rtol: tolerance of the biases.
    """
    arrays = features[group.name] if isinstance(features[group.name], tuple) else (features[group.name],)
    old, new = (jax.tree.map(np.float64, units_lib.leaves_by_path(tree)) for tree in (params, compensated))
    took, readers, grouped = {}, collections.defaultdict(list), set()
    for consumer in group.outgoing:
        if consumer.bias is None:
            continue
        kernel, weights = consumer.kernel, old[consumer.kernel.path]
        others = [axis for axis in range(weights.ndim) if axis not in kernel.axes]
        if not set(consumer.bias_axes) <= set(others):  # in a grouped convolution, every row has another output
            grouped.add(consumer.bias)
            continue
        rows = weights.transpose(*others, *kernel.axes).reshape(*(weights.shape[axis] for axis in others), -1)
        h = np.float64(np.asarray(arrays[consumer.operand], np.float32))[..., unit].reshape(-1, kernel.positions)
        gave = np.tensordot(h, rows[..., kernel.index[:, unit]], (1, -1))  # [batch and shared positions, others...]
        window = tuple(place + 1 for place, axis in enumerate(others) if axis not in consumer.bias_axes)
        mean = gave.mean(0, keepdims=True).sum(window)[0]
        took[consumer.bias] = took.get(consumer.bias, 0) + mean
        readers[consumer.bias].append(None if window else gave)
    for path in took.keys() - grouped:
        mean, own = took[path], vectors.get(path, np.zeros(new[path].shape, bool))
        change = np.where(own, mean, new[path] - old[path])
        np.testing.assert_allclose(change, mean, rtol=1e-3, atol=rtol * (np.abs(mean).max() + np.abs(old[path]).max()))
        if len(readers[path]) == 1 and readers[path][0] is not None and not own.any():
            (gave,) = readers[path]
            left = gave - (new[path] - old[path])
            assert np.mean(np.square(left)) <= np.mean(np.square(gave)) * 1.001 + 1e-9, (group.name, unit, path)


def train(units, params, apply, targets, steps=100, **settings):
    """Train a network on the mean squared error, with continual backpropagation.

    Args:
      units: its groups.
      params: its parameters.
      apply: params -> (array, features), on a batch.
      targets: what the array should be.
      steps: the number of updates.
      ***settings: settings of `continual_backprop`.

    Returns:
      the losses, [steps], and the total number of replaced units, by group.
    """
    settings = {"replacement_rate": 0.02, "maturity_threshold": 10, **settings}
    tx = cbp_jax.continual_backprop(cbp_jax.adam(1e-2), units, **settings)

    @jax.jit
    def run(params, state):
        def step(carry, _):
            params, state = carry
            loss_fn = lambda p: (lambda out, features: (jnp.mean((out - targets) ** 2), features))(*apply(p))
            (loss, features), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
            updates, state = tx.update(grads, state, params, features=features)
            return (jax.tree.map(jnp.add, params, updates), state), (loss, state.replaced)

        return jax.lax.scan(step, (params, state), None, steps)[1]

    losses, replaced = run(params, tx.init(params))
    return np.asarray(losses), {name: int(mask.sum()) for name, mask in replaced.items()}
