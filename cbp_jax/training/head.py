"""The output layer: finding it, and resetting it or the whole network at the start of a task."""

from collections.abc import Collection

import jax
import jax.numpy as jnp
import optax

from cbp_jax.replacement import inner_state
from cbp_jax.units import LeftOutKind, Units, join_path, leaves_by_path


def output_layers(units: Units) -> tuple[str, ...]:
    """Return the layers that compute a network's output, as found by discovery.

    Args:
      units: of `discover_units`.

    Returns:
      paths of layers, or of kernels that are alone.

    Raises:
      ValueError: none was found.

    Example:
      >>> import jax, jax.numpy as jnp, cbp_jax
      >>> net = cbp_jax.nets.MLP((5,), 2)
      >>> params = jax.eval_shape(net.init, jax.random.key(0), jnp.ones((1, 3)))
      >>> output_layers(cbp_jax.discover_units(net.apply, params, jnp.ones((1, 3))))
      ('params/Dense_1',)
    """
    layers = tuple(item.name for item in units.left_out if item.kind is LeftOutKind.OUTPUT)
    if not layers:
        raise ValueError(
            f"no layer was found that makes the network's output; name it instead; left out: {units.left_out}"
        )
    return layers


def reset_layers(
    tx: optax.GradientTransformation,
    params: optax.Params,
    opt_state: optax.OptState,
    layers: Collection[str],
    fresh: optax.Params | None = None,
) -> tuple[optax.Params, optax.OptState]:
    """Set the weights and biases of layers to 0, or to given values, and reset the optimizer's state for them.

    Reset is every array in the optimizer's state that belongs to one of these parameters and has its shape, such as
    moments in any chain or wrapper. Utility and age of units do not belong to the output's weights, and are kept.

    Args:
      tx: the optimizer.
      params: the parameters that it updates, a tree of named arrays.
      opt_state: its state.
      layers: paths of layers or of single parameters, such as "params/Dense_2".
      fresh: parameters with the new values of the layers; by default they are 0.

    Returns:
      the parameters and the state.

    Raises:
      ValueError: the parameters have no such layer.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = optax.sgd(0.1, momentum=0.9)
      >>> params = {"hidden": jnp.ones(2), "head": jnp.ones(2)}
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> params, state = reset_layers(tx, params, state, ["head"])
      >>> params["head"].tolist(), state[0].trace["head"].tolist(), state[0].trace["hidden"].tolist()
      ([0.0, 0.0], [0.0, 0.0], [1.0, 1.0])
    """
    leaves = leaves_by_path(params)
    belongs = lambda path, layer: path == layer or path.startswith(f"{layer}/")
    # A list: in the order of a set, the traced program would differ from run to run, and miss JAX's compilation cache.
    paths = [path for path in leaves if any(belongs(path, layer) for layer in layers)]
    for layer in layers:
        if not any(belongs(path, layer) for path in paths):
            raise ValueError(f"the parameters have no layer {layer!r}; they are {sorted(leaves)}")
    fresh = jax.tree.map(jnp.zeros_like, params) if fresh is None else fresh
    new = lambda key_path, leaf, value: value if join_path(key_path) in paths else leaf
    params = jax.tree_util.tree_map_with_path(new, params, fresh)

    masks = {path: jnp.ones_like(leaves[path], bool) for path in paths}
    return params, inner_state.reset(tx, opt_state, params, masks)


def restart(
    what: str,
    tx: optax.GradientTransformation,
    params: optax.Params,
    opt_state: optax.OptState,
    layers: Collection[str],
    fresh: optax.Params,
) -> tuple[optax.Params, optax.OptState]:
    """Reinitialize the head or the whole network at a task change; see `reset_layers` for the arguments.

    Args:
      what: "network" for all parameters and the optimizer's whole state, "head" for only the layers.
      tx, params, opt_state, layers: as in `reset_layers`.
      fresh: parameters with the new values.

    Returns:
      the parameters and the state.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> old, fresh = ({"hidden": jnp.full(1, x), "head": jnp.full(1, x)} for x in (1.0, 2.0))
      >>> tx = optax.sgd(0.1)
      >>> restart("head", tx, old, tx.init(old), ["head"], fresh)[0]["hidden"].tolist()
      [1.0]
      >>> restart("network", tx, old, tx.init(old), ["head"], fresh)[0]["hidden"].tolist()
      [2.0]
    """
    return (fresh, tx.init(fresh)) if what == "network" else reset_layers(tx, params, opt_state, layers, fresh)
