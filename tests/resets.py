"""Resets units as the transformations do, and asks what that did to the network."""

import jax
import jax.numpy as jnp
import numpy as np

from cbp_jax import units as units_lib
from cbp_jax.transforms import surgery, utility


def paths(parts):
    """Where the slices (or the kernels of the consumers) stand in the params."""
    return [getattr(part, "kernel", part).path for part in parts]


def rows_of(part, units, shape):
    """Bool array of `shape`: the entries of a parameter that a slice gives to units."""
    rows = np.zeros(part.rows, bool)
    rows[part.index[:, units]] = True
    other = [axis for axis in range(len(shape)) if axis not in part.axes]
    mask = rows.reshape([shape[axis] for axis in part.axes] + [1] * len(other))
    return np.broadcast_to(mask.transpose(np.argsort([*part.axes, *other])), shape)


def entries(parts, units, params):
    """By path, the entries of parameters that slices give to units."""
    leaves, found = units_lib.leaves_by_path(params), {}
    for part in parts:
        mask = rows_of(part, units, leaves[part.path].shape)
        found[part.path] = found.get(part.path, False) | mask
    return found


def edit(params, masks, values):
    """Params with entries set: masks and values by path."""

    def set_entries(path, leaf):
        name = units_lib.join_path(path)
        return jnp.where(masks[name], values(name, leaf), leaf) if name in masks else leaf

    return jax.tree_util.tree_map_with_path(set_entries, params)


def reset(groups, params, chosen, seed=0, features=None):
    """Params after a reset of units, as `continual_backprop` does it with an inner optimizer that does nothing.

    Args:
      groups: all groups.
      params: parameters.
      chosen: units by name of group.
      seed: of the fresh weights.
      features: activations; given, biases are compensated.
    """
    zeros = jax.tree.map(jnp.zeros_like, params)
    work = surgery.Surgery(units_lib.leaves_by_path(params), units_lib.leaves_by_path(zeros))
    numbers = [jnp.asarray(chosen.get(group.name, [group.size]), jnp.int32) for group in groups]
    for group, units in zip(groups, numbers, strict=True):
        if features is not None:
            arrays = features[group.name] if isinstance(features[group.name], tuple) else (features[group.name],)
            shapes = [consumer.kernel.index.shape for consumer in group.operands()]
            means = tuple(utility.batch_mean(a, shape[0]) for a, shape in zip(arrays, shapes, strict=True))
            work.compensate(group, units, means)
        work.drop(group, surgery.as_mask(units, group.size))
    normal = jax.nn.initializers.normal(1.0)
    work.replace(groups, numbers, normal, lambda: jax.random.key(seed))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + work.updates[units_lib.join_path(path)], params
    )  # fmt: skip


def check_resets(groups, params, output, rtol=1e-4):
    """Resets units of every group and asserts what must hold; returns how far the outputs moved.

    Args:
      groups: units of a network.
      params: its parameters.
      output: params -> array, whatever the network computes on a batch, with the statistics that mix units frozen.
    """
    weigh = jax.jit(lambda params: jnp.sum(jnp.sin(output(params) * 3.0 + 0.5)))
    gradient, run = jax.jit(jax.grad(weigh)), jax.jit(output)
    before = units_lib.leaves_by_path(gradient(params))
    for group in groups:
        for unit in {0, group.size - 1}:
            new = reset(groups, params, {group.name: [unit]})
            incoming = entries(group.incoming, [unit], params)
            outgoing = entries([consumer.kernel for consumer in group.outgoing], [unit], params)
            vectors = entries((*group.biases, *group.scales), [unit], params)
            old, now = units_lib.leaves_by_path(params), units_lib.leaves_by_path(new)
            for path, leaf in now.items():
                touched = incoming.get(path, False) | outgoing.get(path, False) | vectors.get(path, False)
                np.testing.assert_array_equal(np.where(touched, 0, leaf), np.where(touched, 0, old[path]))
            for part in (*group.biases, *group.scales):
                np.testing.assert_allclose(now[part.path][rows_of(part, [unit], now[part.path].shape)], part.reset)
            after = units_lib.leaves_by_path(gradient(new))
            for path, mask in incoming.items():
                label = f"{group.name} unit {unit}: {path}"
                assert mask.any() and np.all(np.asarray(after[path])[mask] == 0), f"{label} still matters"
                others = (np.asarray(after[path]) == 0) & (np.asarray(before[path]) != 0) & ~mask
                others &= ~outgoing.get(path, np.zeros_like(mask))
                assert not others.any(), f"{label}: a neighbour is silenced"
            # Drawn again, nothing changes; what changed at first is what the outgoing weights carried.
            got = run(new)
            np.testing.assert_array_equal(got, run(reset(groups, params, {group.name: [unit]}, seed=1)))
            removed = edit(params, {p: m & ~incoming.get(p, False) for p, m in outgoing.items()}, lambda *_: 0.0)
            np.testing.assert_allclose(got, run(removed), rtol=rtol, atol=1e-5)
