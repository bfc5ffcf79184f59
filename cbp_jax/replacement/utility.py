r"""Utilities of units: their running means rank the units of a group.

For a unit with activation h, incoming weights v and outgoing weights w, on one batch:

| name | utility | source |
|---|---|---|
| `contribution` | mean abs(h) sum abs(w) | Dohare et al. 2024 |
| `zero_contribution` | mean abs(h - m) sum abs(w), m the running mean of h | Dohare et al. 2021 |
| `adaptation` | 1 / sum abs(v) | Dohare et al. 2021 |
| `adaptable_contribution` | mean abs(h - m) sum abs(w) / sum abs(v) | Dohare et al. 2021 |
| `weight` | sum abs(w) | |
| `random` | uniform | |
| `taylor` | abs(s) | Molchanov et al. 2017 |
| `taylor_second_order` | abs(-s + c / 2) | LeCun et al. 1990 |
| `fisher` | s^2 | Theis et al. 2018, Molchanov et al. 2019 |
| `snip` | sum abs(w g) | Lee et al. 2019 |
| `gradient` | mean abs(gradient of v), divided by the group's mean | Liu et al. 2025 |
| `upgd` | -s | Elsayed & Mahmood 2024 |
| `upgd_second_order` | -s + c / 2 | Elsayed & Mahmood 2024 |

Here :math:`s = \sum_j w_j \, \partial L / \partial w_j` and :math:`c = \sum_j w_j^2 \, \partial^2 L / \partial w_j^2`
are the first and, without terms of two different weights, the second derivative of the loss with respect to a gate on
the unit (see `GroupView.gate_slope`). Removing the unit closes the gate, which by Taylor's expansion changes the loss
by -s + c / 2. The weights are those at which the gradient was taken, before the inner update. The gradients are those
passed to `update`.

The first derivative is that of the whole batch's loss, so contributions of opposite sign cancel before the absolute
value or the square is taken. The papers on pruning take it example by example; with batches of one example there is no
difference. If all gradients of a unit are 0, so are its first-order utilities.

For a ReLU unit without normalization, the sum of incoming weights and bias times their gradients is also s, so incoming
weights would add no information.
"""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from cbp_jax import by_path
from cbp_jax.numerics import by_unit
from cbp_jax.replacement.views import GroupView

Utility = Callable[[GroupView], chex.Array]


def contribution(view: GroupView) -> chex.Array:
    """Return `mean|h| sum|w|`: how strongly a unit acts on its consumers (Dohare et al. 2024, equation 1)."""
    return view.weighted_activity(centered=False)


def zero_contribution(view: GroupView) -> chex.Array:
    """Return `mean|h - m| sum|w|`: contribution without the part that a bias could replace (m the running mean of
    h)."""
    return view.weighted_activity(centered=True)


def adaptation(view: GroupView) -> chex.Array:
    """Return `1 / sum|v|`: how fast a unit can change; larger for small incoming weights v."""
    return 1.0 / jnp.maximum(view.incoming_magnitude(), 1e-30)  # a running mean would keep infinity forever


def adaptable_contribution(view: GroupView) -> chex.Array:
    """Return `mean|h - m| sum|w| / sum|v|`: mean-corrected contribution times adaptation."""
    incoming = view.incoming_magnitude()
    # Without incoming weights a unit is constant, up to rounding.
    return jnp.where(incoming > 0, zero_contribution(view) / incoming, 0.0)


def weight(view: GroupView) -> chex.Array:
    """Return `sum|w|`: magnitude of the outgoing weights."""
    return view.outgoing_magnitude()


def random(view: GroupView) -> chex.Array:
    """Return a uniform number in [0, 1), a random choice of units, as a control."""
    return jax.random.uniform(view.key, (view.group.size,), jnp.float32)


def taylor(view: GroupView) -> chex.Array:
    """Return `|sum w g|`: by how much the loss changes without the unit, to first order (Molchanov et al., ICLR
    2017)."""
    return jnp.abs(view.gate_slope())


def taylor_second_order(view: GroupView) -> chex.Array:
    """Return `|-sum w g + sum w^2 h / 2|`: the same to second order, h the Hessian's diagonal (LeCun et al., 1990)."""
    return jnp.abs(upgd_second_order(view))


def fisher(view: GroupView) -> chex.Array:
    """Return `(sum w g)^2`: Fisher information of a gate on the unit (Theis et al. 2018; Molchanov et al., CVPR
    2019)."""
    return jnp.square(view.gate_slope())


def snip(view: GroupView) -> chex.Array:
    """Return `sum |w g|`: how sensitive the loss is to each connection that the unit feeds (Lee et al., ICLR 2019)."""
    return view.outgoing_sum(lambda w, g: jnp.abs(w * g), view.grads)


def gradient(view: GroupView) -> chex.Array:
    """Return `mean|g| / mean of the group's`: how fast a unit learns, g the gradient of incoming weights (ReGraMa,
    2025).

    Biases are left out. Where the whole group's gradient is 0, all are 0. A unit whose outgoing weights are 0, such as
    a new one, has no gradient: ReGraMa measures which units can learn, not whose removal hurts.
    """
    entries = sum(view.grads[part.path].size // part.rows * part.positions for part in view.group.incoming)
    return by_unit.relative(view.incoming_gradient() / entries)


def upgd(view: GroupView) -> chex.Array:
    """Return `-sum w g`: how much the loss rises without the unit, to first order (Elsayed & Mahmood, ICLR 2024).

    Unlike `taylor` it is signed: a harmful unit has less utility than one that does nothing.
    """
    return -view.gate_slope()


def upgd_second_order(view: GroupView) -> chex.Array:
    """Return `-sum w g + sum w^2 h / 2`: the same to second order, h the Hessian's diagonal."""
    return -view.gate_slope() + 0.5 * view.gate_curvature()


UTILITIES: dict[str, Utility] = {
    function.__name__: function
    for function in (
        contribution,
        zero_contribution,
        adaptation,
        adaptable_contribution,
        weight,
        random,
        taylor,
        taylor_second_order,
        fisher,
        snip,
        gradient,
        upgd,
        upgd_second_order,
    )
}
_OF_CURVATURE = (taylor_second_order, upgd_second_order)


def needs_curvature(utility: str | Utility) -> bool:
    """Return whether a utility of this library needs the diagonal of the Hessian, `update(..., hessian_diag=...)`.

    Example:
      >>> needs_curvature("taylor_second_order"), needs_curvature("taylor")
      (True, False)
    """
    return get_utility(utility) in _OF_CURVATURE


def get_utility(utility: str | Utility) -> Utility:
    """Look up a utility by its name or import path. A callable is returned as it is.

    Args:
      utility: a name of `UTILITIES`; the path of a function of your own, "my_module:my_utility"; or the function.

    Returns:
      a function of a `GroupView` that returns an array [units].

    Raises:
      ValueError: there is no utility of that name, or the path does not name a function.

    Example:
      >>> get_utility("weight") is get_utility("cbp_jax.replacement.utility:weight")
      True
    """
    if callable(utility):
        return utility
    found = by_path.read(utility, "utility") if isinstance(utility, str) else None
    if found is not None:
        if not callable(found.value):
            raise ValueError(f"utility must be a function, and {found.path} is {found.value!r}")
        return functools.partial(found.value, **found.settings) if found.settings else found.value
    if not isinstance(utility, str) or utility not in UTILITIES:
        raise ValueError(
            f"utility must be a callable, its path as in 'my_module:my_utility', or one of {sorted(UTILITIES)}, "
            f"got {utility!r}"
        )
    return UTILITIES[utility]
