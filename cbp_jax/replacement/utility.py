"""What a unit is worth: the instantaneous utilities whose running means rank the units of a group."""

from collections.abc import Callable

import chex
import jax

from cbp_jax.replacement.views import GroupView

Utility = Callable[[GroupView], chex.Array]


def contribution(view: GroupView) -> chex.Array:
    """`mean|h| sum|w|`: how strongly a unit speaks to those that read it (Dohare et al. 2024, equation 1)."""
    return view.weighted_activity(centred=False)


def zero_contribution(view: GroupView) -> chex.Array:
    """`mean|h - m| sum|w|`: contribution less what a bias could give instead (m the running mean of h)."""
    return view.weighted_activity(centred=True)


def adaptation(view: GroupView) -> chex.Array:
    """`1 / sum|v|`: how fast a unit can change, its incoming weights v being small."""
    return 1.0 / view.incoming_magnitude()


def adaptable_contribution(view: GroupView) -> chex.Array:
    """`mean|h - m| sum|w| / sum|v|`: mean-corrected contribution times adaptation."""
    return zero_contribution(view) / view.incoming_magnitude()


def weight(view: GroupView) -> chex.Array:
    """`sum|w|`: magnitude of the outgoing weights."""
    return view.outgoing_magnitude()


def random(view: GroupView) -> chex.Array:
    """Uniform in [0, 1): any unit is as good as another; the control for all of the above."""
    return jax.random.uniform(view.key, (view.group.size,))


UTILITIES: dict[str, Utility] = {
    function.__name__: function
    for function in (contribution, zero_contribution, adaptation, adaptable_contribution, weight, random)
}


def get_utility(utility: str | Utility) -> Utility:
    """Looks a utility up by name; a callable is taken as it is.

    Raises:
      ValueError: there is no utility of that name.
    """
    if callable(utility):
        return utility
    if not isinstance(utility, str) or utility not in UTILITIES:
        raise ValueError(f"utility must be a callable or one of {sorted(UTILITIES)}, got {utility!r}")
    return UTILITIES[utility]
