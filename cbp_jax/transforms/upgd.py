"""Utility-gated perturbed gradient descent (Elsayed & Mahmood, ICLR 2024)."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cbp_jax import units as units_lib
from cbp_jax.numerics import keys, noise
from cbp_jax.numerics.rounding import rounded, unforeseen_zero
from cbp_jax.numerics.scalars import check_like, check_scalar
from cbp_jax.numerics.sharding import sharded_alike
from cbp_jax.transforms.adam import scale_by_adam

Scope = Literal["global", "local"]
IncomingAxes = Callable[[str, chex.Array], tuple[int, ...]]  # (path, leaf) -> the leaf's axes that lead to one unit


class ScaleByUpgdState(NamedTuple):
    """State of :func:`scale_by_upgd`."""

    key: chex.Array  # raw uint32 key data, constant
    count: chex.Array  # int32 [], updates so far
    utility: Any  # float32, running means, not corrected: the params' tree, or [units] by name of group
    inner_state: optax.OptState


def scale_by_upgd(
    inner: optax.GradientTransformation | None = None,
    *,
    beta_utility: chex.Numeric = 0.999,
    sigma: chex.Numeric = 1e-3,
    order: Literal[1, 2] = 1,
    scope: Scope = "global",
    protect: bool = True,
    units: Sequence[units_lib.UnitGroup] | None = None,
    incoming_axes: IncomingAxes | None = None,
    key: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Scale the updates of `inner`, plus noise, by a gate that depends on each weight's utility. See :func:`upgd`.

    With d the updates of `inner`, and the gate :math:`1 - \phi(\bar U)` of each weight as in :func:`upgd`,

    .. math:: u = (d + \xi) \circ (1 - \phi(\bar U)) \quad\text{or, unprotected,}\quad
        u = d + \xi \circ (1 - \phi(\bar U)).

    Utilities are always computed from the incoming gradients, not from the updates of `inner`.

    Args:
      inner: rescales gradients before they are gated, such as `cbp_jax.transforms.adam.scale_by_adam()`. By default
        they are not rescaled. It must not flip their sign: sign and learning rate are applied after the gate.
      beta_utility: as in :func:`upgd`, like all arguments below.
      sigma: standard deviation of the noise.
      order: 1 or 2.
      scope: "global" or "local".
      protect: whether the gate applies to gradients too, not only to noise.
      units: groups of units for feature-wise utilities.
      incoming_axes: `(path, leaf) -> axes`, the axes of a leaf over which "local" normalizes.
      key: int or jax key for the noise.

    Returns:
      an optax transformation, whose state is a `ScaleByUpgdState`. Its update needs the params, and with order 2
      `hessian_diag`. Other extra arguments are passed to `inner`.

    Raises:
      ValueError: a setting is out of range, or units do not match the params; in `update`, params or
        `hessian_diag` are missing, or the latter is not a tree of the gradients' shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = scale_by_upgd(sigma=0.0, beta_utility=0.0)
      >>> params, grads = jnp.array([1.0, 1.0, -1.0]), jnp.array([-1.0, 0.0, -1.0])
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> state.utility.tolist(), [f"{u:.2f}" for u in updates]
      ([1.0, 0.0, -1.0], ['-0.27', '0.00', '-0.73'])
    """
    check_scalar("beta_utility", beta_utility, at_least=0, below=1)
    check_scalar("sigma", sigma, at_least=0)
    for name, value, allowed in (("order", order, (1, 2)), ("protect", protect, (True, False))):
        if not isinstance(value, jax.Array) and value not in allowed:  # arrays come from optax.inject_hyperparams
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    if scope not in ("global", "local"):
        raise ValueError(f"scope must be 'global' or 'local', got {scope!r}")
    units = None if units is None else tuple(units)
    key_data, key_impl = keys.as_key_data(key)
    inner = optax.with_extra_args_support(optax.identity() if inner is None else inner)

    def init_fn(params: optax.Params) -> ScaleByUpgdState:
        if units is None:
            # In bfloat16, adding (1 - beta) g w to the mean would be rounded away.
            utility = jax.tree.map(lambda w: jnp.zeros(jnp.shape(w), jnp.float32), params)
        else:
            if jax.tree.leaves(params):  # optax.tree.map_params calls `init` with a placeholder that has no leaves
                units_lib.check_units(units, params)
            utility = {group.name: jnp.zeros(group.size, jnp.float32) for group in units}
        return ScaleByUpgdState(
            key=keys.init_key(jax.random.wrap_key_data(key_data, impl=key_impl), params),
            count=jnp.zeros([], jnp.int32),
            utility=utility,
            inner_state=inner.init(params),
        )

    def update_fn(
        updates: optax.Updates,
        state: ScaleByUpgdState,
        params: optax.Params | None = None,
        *,
        hessian_diag: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByUpgdState]:
        if params is None:
            raise ValueError("UPGD needs the params: tx.update(grads, state, params), got params=None")
        if hessian_diag is None and not isinstance(order, jax.Array) and order == 2:
            raise ValueError(
                "UPGD of order 2 needs the diagonal of the Hessian: tx.update(grads, state, params, "
                "hessian_diag=...), a tree like the params (see cbp_jax.curvature), got None"
            )
        instantaneous = jax.tree.map(_first_order, updates, params)
        if hessian_diag is not None:
            check_like("hessian_diag", hessian_diag, updates)
        if hessian_diag is not None and (isinstance(order, jax.Array) or order == 2):
            curved = lambda m, h, w: m + 0.5 * h.astype(jnp.float32) * jnp.square(w.astype(jnp.float32))
            second = jax.tree.map(curved, instantaneous, hessian_diag, params)
            chosen = lambda m, s: jnp.where(order == 2, s, m) if isinstance(order, jax.Array) else s
            instantaneous = jax.tree.map(chosen, instantaneous, second)
        if units is not None:
            instantaneous = _unit_utility(units, instantaneous)
        # One product in the sum, since of two a compiler may fuse either: vmapped seeds are bit for bit equal to solo
        # runs.
        average = lambda u, m: (u + (1 - beta_utility) * (m - u)).astype(u.dtype)
        utility = jax.tree.map(average, state.utility, instantaneous)
        gate = jax.tree.map(lambda ratio: jax.nn.sigmoid(-ratio), _normalize(utility, scope, units, incoming_axes))

        extra_args = extra_args if hessian_diag is None else {"hessian_diag": hessian_diag, **extra_args}
        direction, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        perturbation = noise.normal(state.key, state.count, params, scale=sigma)
        if units is not None:
            # Parameters that lead to no unit have neither a gate nor noise.
            owned = _spread(units, {group.name: jnp.ones(group.size) for group in units}, params, others=0.0)
            perturbation = jax.tree.map(jnp.multiply, perturbation, owned)
            gate = _spread(units, gate, params, others=1.0)

        zero = unforeseen_zero(state.count)

        def gated(d: chex.Array, x: chex.Array, a: chex.Array) -> chex.Array:
            if isinstance(protect, jax.Array):
                return jnp.where(protect, (d + x) * a, d + x * a).astype(d.dtype)
            # Rounded, because weight decay will be added.
            return (rounded((d + x) * a, zero) if protect else d + x * a).astype(d.dtype)

        new_updates = sharded_alike(jax.tree.map(gated, direction, perturbation, gate), params)
        return new_updates, ScaleByUpgdState(state.key, optax.safe_increment(state.count), utility, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def upgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: chex.Numeric = 0.0,
    beta_utility: chex.Numeric = 0.999,
    sigma: chex.Numeric = 1e-3,
    order: Literal[1, 2] = 1,
    scope: Scope = "global",
    protect: bool = True,
    units: Sequence[units_lib.UnitGroup] | None = None,
    incoming_axes: IncomingAxes | None = None,
    key: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Create utility-gated perturbed gradient descent, which protects useful weights and perturbs useless ones.

    The utility of a weight is how much the loss would increase if the weight were set to 0, in a Taylor expansion with
    gradient g and, for order 2, the diagonal h of the Hessian. It is averaged over steps,

    .. math::
        M = -g w \;[\; + \tfrac12 h w^2 \;], \qquad
        U \leftarrow \beta U + (1 - \beta) M, \qquad
        \bar U = \frac{U / (1 - \beta^t)}{\eta}.

    With global scope, :math:`\eta` is the maximum of the bias-corrected utilities of all weights. With local scope it
    is the Euclidean norm of the utilities of the weights that lead to the same unit. Then, with the sigmoid
    :math:`\phi` and noise :math:`\xi \sim N(0, \sigma^2)`,

    .. math:: w \leftarrow (1 - \alpha \lambda) w - \alpha (g + \xi) \circ (1 - \phi(\bar U)).

    The published Algorithm 1 has no factor of 2, so a weight of utility 0 moves at half the learning rate. Compare it
    with SGD at several learning rates.

    The bias correction of the mean is the same for all weights and cancels in :math:`\bar U`, so it is not computed. If
    no utility is positive, dividing by :math:`\eta` would reverse the order of weights; its absolute value is used
    instead, so that the more useful of two weights is always protected more. If all utilities are 0, the gate is 1/2.

    With global scope, the public code divides the corrected utilities by the maximum of the uncorrected ones. Its
    :math:`\bar U` is that of Algorithm 1, which is implemented here, times :math:`1 / (1 - \beta^t)`. For :math:`\beta
    = 0.999` this factor is 1,000 at the first step, 10.5 at the 100th and 1.6 at the 1,000th. For 0.9999, its best
    value on input-permuted MNIST, it is still 2.5 at the end of the first task. So its early gates are nearly binary: a
    weight of positive utility does not move and gets no noise, one of negative utility moves at the full learning rate,
    and only near utility 0 are there gates in between. The gates of the first step:

    >>> import jax, jax.numpy as jnp
    >>> utility, beta, t = jnp.array([1.0, 0.1, 0.0, -0.1]), 0.999, 1
    >>> gates = lambda relative: [f"{gate:.2f}" for gate in 1 - jax.nn.sigmoid(relative)]
    >>> gates(utility / utility.max())  # here
    ['0.27', '0.48', '0.50', '0.52']
    >>> gates(utility / utility.max() / (1 - beta**t))  # the public code's
    ['0.00', '0.00', '0.50', '1.00']

    With `units`, utilities are those of units instead ("feature-wise"): a unit of outgoing weights w with gradients g
    (and curvature h) has :math:`M = \sum (-g w \;[\; + \tfrac12 h w^2 \;])`, the sum running over its outgoing
    weights. In any network, that is the derivative of the loss with respect to a gate on the unit, so no gate needs to
    be built into the network. The unit's gate applies to its incoming weights and biases. Parameters that lead to no
    unit, such as the output layer, are trained by plain SGD without noise. :math:`\eta` is then the maximum over all
    units, or the norm over a group.

    Inside `cbp_jax.continual_backprop`, utilities of replaced weights restart at 0, so the two can be combined:

    >>> import cbp_jax
    >>> def with_cbp(units):
    ...   return cbp_jax.continual_backprop(cbp_jax.upgd(0.01, sigma=1e-3), units, replacement_rate=1e-4)

    Args:
      learning_rate: :math:`\alpha`, a number, a tracer, or an optax schedule.
      weight_decay: :math:`\lambda`, decoupled, scaled by the learning rate, >= 0. May be traced, as beta_utility and
        sigma.
      beta_utility: :math:`\beta`, decay of the mean of utilities, in [0, 1).
      sigma: :math:`\sigma`, standard deviation of the noise, which the learning rate and the gate scale, >= 0.
      order: 1, or 2 with the diagonal of the Hessian given to update as `hessian_diag`, a tree like the params.
      scope: "global" or "local".
      protect: whether the gate applies to gradients too. If not, it applies only to noise.
      units: groups of units from `discover_units`, for feature-wise utilities. By default every weight has its own
        utility.
      incoming_axes: `(path, leaf) -> axes`: the axes of a leaf that lead to one unit, over which "local" normalizes.
        By default all but the last, as in Flax kernels, and the single axis of a vector.
      key: int or jax key for the noise. `init` mixes the params into it, so that vmapped seeds differ.

    Returns:
      an optax transformation, the chain of :func:`scale_by_upgd`, `optax.add_decayed_weights` and
      `optax.scale_by_learning_rate`. In `optax.inject_hyperparams`, name `incoming_axes` in `static_args` if you pass
      it. An injected `order` has an effect only if `hessian_diag` is passed.

    Raises:
      ValueError: a setting is out of range; in `update`, params or `hessian_diag` are missing.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> tx = upgd(0.1, sigma=1e-3)
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> state = tx.init(params)
      >>> for _ in range(200):
      ...   grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2))(params)
      ...   updates, state = tx.update(grads, state, params)
      ...   params = optax.apply_updates(params, updates)
      >>> bool(jnp.abs(params["w"]).max() < 0.01)
      True

    References:
      Elsayed & Mahmood, `Addressing loss of plasticity and catastrophic forgetting in continual learning
      <https://openreview.net/forum?id=sKPzAXoylB>`_, ICLR 2024
    """
    gate = scale_by_upgd(
        beta_utility=beta_utility,
        sigma=sigma,
        order=order,
        scope=scope,
        protect=protect,
        units=units,
        incoming_axes=incoming_axes,
        key=key,
    )
    return _descend(gate, learning_rate, weight_decay)


def adaptive_upgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    weight_decay: chex.Numeric = 0.0,
    beta_utility: chex.Numeric = 0.999,
    sigma: chex.Numeric = 1e-3,
    order: Literal[1, 2] = 1,
    scope: Scope = "global",
    protect: bool = True,
    units: Sequence[units_lib.UnitGroup] | None = None,
    incoming_axes: IncomingAxes | None = None,
    key: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Create UPGD around Adam's moments: the gate of :func:`upgd` on Adam's direction.

    .. math::
        w \leftarrow (1 - \alpha \lambda) w
        - \alpha \Big(\frac{\hat m}{\sqrt{\hat v} + \epsilon} + \xi\Big) \circ (1 - \phi(\bar U))

    with the corrected moments :math:`\hat m, \hat v` of the gradient, as in :func:`cbp_jax.adam`.

    Args:
      learning_rate: as in :func:`upgd`.
      b1: decay rate of the mean of gradients, in [0, 1). May be traced, as b2 and eps.
      b2: decay rate of the mean of squared gradients, in [0, 1).
      eps: added to the root of the mean square, >= 0.
      weight_decay: as in :func:`upgd`, like all arguments below.
      beta_utility: decay of the mean of utilities.
      sigma: standard deviation of the noise.
      order: 1 or 2.
      scope: "global" or "local".
      protect: whether the gate applies to Adam's direction too.
      units: groups of units for feature-wise utilities.
      incoming_axes: axes of a leaf over which "local" normalizes.
      key: int or jax key for the noise.

    Returns:
      an optax transformation.

    Raises:
      ValueError: a setting is out of range; in `update`, params or `hessian_diag` are missing.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = adaptive_upgd(0.1, sigma=0.0)
      >>> params = jnp.array([1.0, 1.0, -1.0])
      >>> updates, _ = tx.update(jnp.array([-5.0, 0.0, -5.0]), tx.init(params), params)
      >>> [f"{u:.3f}" for u in updates]
      ['0.027', '-0.000', '0.073']

    References:
      Elsayed & Mahmood, `Addressing loss of plasticity and catastrophic forgetting in continual learning
      <https://openreview.net/forum?id=sKPzAXoylB>`_, ICLR 2024
    """
    gate = scale_by_upgd(
        scale_by_adam(b1, b2, eps),
        beta_utility=beta_utility,
        sigma=sigma,
        order=order,
        scope=scope,
        protect=protect,
        units=units,
        incoming_axes=incoming_axes,
        key=key,
    )
    return _descend(gate, learning_rate, weight_decay)


def _descend(
    gate: optax.GradientTransformation, learning_rate: optax.ScalarOrSchedule, weight_decay: chex.Numeric
) -> optax.GradientTransformationExtraArgs:
    if not callable(learning_rate):
        check_scalar("learning_rate", learning_rate)
    check_scalar("weight_decay", weight_decay, at_least=0)
    return optax.chain(gate, optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(learning_rate))


def _first_order(g: chex.Array, w: chex.Array) -> chex.Array:
    """Return how much the loss would increase if a weight were set to 0, to first order, float32."""
    return -g.astype(jnp.float32) * w.astype(jnp.float32)


def _unit_utility(units: tuple[units_lib.UnitGroup, ...], per_weight: Any) -> dict[str, chex.Array]:
    """Sum utilities over the outgoing weights of each unit: [units] by name of group."""
    per_weight = units_lib.leaves_by_path(per_weight)
    return {
        group.name: sum(consumer.kernel.sum(per_weight[consumer.kernel.path]).sum(0) for consumer in group.outgoing)
        for group in units
    }


def _normalize(
    utility: Any, scope: Scope, units: tuple[units_lib.UnitGroup, ...] | None, axes: IncomingAxes | None
) -> Any:
    """Divide utilities by the maximum of all, or by the norm over the same unit's weights."""
    tiny = np.finfo(np.float32).tiny  # if it replaces 0, all utilities are 0, or all gates are open
    if scope == "global":
        largest = [jnp.max(u) for u in jax.tree.leaves(utility) if u.size]
        if not largest:  # a mask may leave no parameter
            return utility
        # Multiplied by the inverse, since divisions are expensive.
        inverse = 1 / jnp.maximum(jnp.abs(jnp.max(jnp.stack(largest))), tiny)
        return jax.tree.map(lambda u: u * inverse, utility)

    def over_norm(key_path: Any, u: chex.Array) -> chex.Array:
        if axes is None or units is not None:
            along = tuple(range(max(u.ndim - 1, min(u.ndim, 1))))
        else:
            along = axes(units_lib.join_path(key_path), u)
        # Scaled first, so that squares of small utilities do not underflow. Then the norm is at least 1, unless all are
        # 0. A smaller bound could underflow, as XLA may divide once, by the product of both divisors.
        u = u / jnp.maximum(jnp.max(jnp.abs(u), along, keepdims=True, initial=0.0), tiny)
        return u / jnp.maximum(jnp.sqrt(jnp.sum(u * u, along, keepdims=True)), 1.0)

    return jax.tree_util.tree_map_with_path(over_norm, utility)


def _spread(
    units: tuple[units_lib.UnitGroup, ...], per_unit: dict[str, chex.Array], params: optax.Params, others: float
) -> optax.Params:
    """Spread values [units] to factors that broadcast to the params, for incoming weights and biases; `others`
    elsewhere."""
    leaves = units_lib.leaves_by_path(params)
    factors: dict[str, chex.Array] = {}
    for group in units:
        for part in (*group.incoming, *group.biases):
            factor = part.along_axes(part.to_rows(per_unit[group.name], others), leaves[part.path])
            if part.path in factors:  # of other units
                factor = factor * factors[part.path] if others else factor + factors[part.path]
            factors[part.path] = factor
    return jax.tree_util.tree_map_with_path(
        lambda key_path, _: factors.get(units_lib.join_path(key_path), jnp.float32(others)), params
    )
