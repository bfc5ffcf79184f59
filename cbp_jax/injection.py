"""Plasticity injection (Nikishin et al., 2023): adds a fresh head that learns, without changing the outputs at first.

It is not an optax transformation but a wrapper of a network's last layers: `inject` creates the parameters and the
frozen heads, `with_injection` the network that uses them.
"""

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp

from cbp_jax.units import join_path, leaves_by_path

#: Frozen heads by path of the parameter, [heads, ...] each. Heads of even index are added, the others subtracted.
FrozenHeads = dict[str, jax.Array]


def inject(
    params: Any, fresh: Any, layers: Collection[str], frozen: FrozenHeads | None = None
) -> tuple[Any, FrozenHeads]:
    r"""Freeze a network's head and add a fresh one.

    With an encoder :math:`\phi` and a head :math:`h_\theta`, the network becomes

    .. math:: h_\theta(\phi(x)) + h_{\theta'_1}(\phi(x)) - h_{\theta'_2}(\phi(x)),

    where :math:`\theta'_1 = \theta'_2` are fresh, and only :math:`\theta'_1` and the encoder continue learning. So the
    outputs do not change at first, the number of trained parameters stays the same, and those of the head are fresh.

    The head should have a hidden layer. If it is a single linear layer, so is :math:`\theta + \theta'_1 - \theta'_2`,
    with the gradient of :math:`\theta`, and plain SGD learns as if nothing had been injected. In the paper the head is
    everything after the convolutions. We know of no public program by the authors.

    Args:
      params: the network's parameters, a tree of named arrays.
      fresh: parameters of the same structure, such as `net.init` with another key; its head is used.
      layers: paths of the head's layers, such as "params/Dense_2".
      frozen: frozen heads of an earlier injection into the same layers, to which this one adds two heads.

    Returns:
      the parameters with the fresh head, to be trained, and the frozen heads. The optimizer's state still belongs to
      the old head: `training.reset_layers(tx, params, state, layers, fresh)` returns the same parameters with a state
      to continue with.

    Raises:
      ValueError: the parameters have no such layer, or `fresh` or `frozen` have other shapes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from cbp_jax import nets
      >>> net, x = nets.MLP((5, 4), 2), jnp.ones((1, 3))
      >>> params, fresh = (net.init(jax.random.key(seed), x) for seed in (0, 1))
      >>> new, frozen = inject(params, fresh, ["params/Dense_1", "params/Dense_2"])
      >>> bool(jnp.allclose(with_injection(net.apply)(new, frozen, x), net.apply(params, x), atol=1e-6))
      True

    References:
      Nikishin et al., `Deep reinforcement learning with plasticity injection <https://arxiv.org/abs/2305.15555>`_,
      NeurIPS 2023
    """
    leaves, others = leaves_by_path(params), leaves_by_path(fresh)
    within = lambda path, layer: path == layer or path.startswith(f"{layer}/")
    for layer in layers:
        if not any(within(path, layer) for path in leaves):
            raise ValueError(f"the parameters have no layer {layer!r}; they are {sorted(leaves)}")
    head = [path for path in leaves if any(within(path, layer) for layer in layers)]
    if frozen is not None and set(frozen) != set(head):
        raise ValueError(f"frozen must be heads of the same layers, {head}, got {sorted(frozen)}")
    found = {}
    for path in head:
        if path not in others or jnp.shape(others[path]) != jnp.shape(leaves[path]):
            shape = jnp.shape(others[path]) if path in others else "nothing"
            raise ValueError(f"fresh must have {path!r} in the shape {jnp.shape(leaves[path])}, got {shape}")
        pair = jnp.stack([leaves[path], others[path]])
        found[path] = pair if frozen is None else jnp.concatenate([frozen[path], pair])
    new = lambda key_path, leaf: jnp.array(others[join_path(key_path)]) if join_path(key_path) in found else leaf
    return jax.tree_util.tree_map_with_path(new, params), found


def with_injection(apply_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return a network with frozen heads besides its own.

    The encoder is computed once for all heads. Its gradient flows through all of them; the frozen heads get none.

    Args:
      apply_fn: `(params, *inputs, **options) -> outputs`, an array or a tree of them.

    Returns:
      `(params, frozen, *inputs, **options) -> outputs`, for what `inject` returned. Running statistics among the
      outputs of `apply_fn` would be summed like outputs, so `apply_fn` must return outputs only.

    Example:
      >>> import jax.numpy as jnp
      >>> apply_fn = lambda params, x: jnp.tanh(x * params["encoder"]) * params["head"]
      >>> frozen = {"head": jnp.array([5.0, 2.0])}
      >>> round(float(with_injection(apply_fn)({"encoder": 1.0, "head": 3.0}, frozen, 100.0)), 4)  # 3 + 5 - 2
      6.0
    """

    def apply(params: Any, frozen: FrozenHeads, *inputs: Any, **options: Any) -> Any:
        outputs = heads_of(apply_fn)(params, frozen, *inputs, **options)
        count = next(iter(frozen.values())).shape[0]
        signs = jnp.array([1, *(1 if number % 2 == 0 else -1 for number in range(count))])
        return jax.tree.map(lambda y: jnp.tensordot(signs.astype(y.dtype), y, 1), outputs)

    return apply


def heads_of(apply_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return the outputs of a network with its own head and with each frozen head.

    Args:
      apply_fn: as in :func:`with_injection`.

    Returns:
      `(params, frozen, *inputs, **options) -> outputs`, each [1 + frozen heads, ...].

    Example:
      >>> import jax.numpy as jnp
      >>> apply_fn = lambda params, x: x * params["head"]
      >>> heads_of(apply_fn)({"head": 3.0}, {"head": jnp.array([5.0, 2.0])}, 10.0).tolist()
      [30.0, 50.0, 20.0]
    """

    def apply(params: Any, frozen: FrozenHeads, *inputs: Any, **options: Any) -> Any:
        def stacked(key_path, leaf):
            path = join_path(key_path)
            if path not in frozen:
                return leaf
            return jnp.concatenate([jnp.asarray(leaf)[None], jax.lax.stop_gradient(frozen[path])])

        axes = jax.tree_util.tree_map_with_path(lambda path, _: 0 if join_path(path) in frozen else None, params)
        heads = jax.tree_util.tree_map_with_path(stacked, params)
        return jax.vmap(lambda params: apply_fn(params, *inputs, **options), in_axes=(axes,))(heads)

    return apply
