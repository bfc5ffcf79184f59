"""Panels of pictures: the measure, its label and its axis."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cbp_jax.report.statistics import is_accuracy, over_steps, performance

if TYPE_CHECKING:
    import xarray as xr


class Panel(NamedTuple):
    """A panel: the measure it shows, the label and the scale of its axis."""

    measure: str
    label: str
    scale: float
    zero: bool  # whether the axis starts at 0


PANELS = {
    panel.measure: panel
    for panel in (
        Panel("episode_return", "Reward per episode", 1.0, False),
        Panel("test_accuracy", "Test accuracy (%)", 100.0, False),
        Panel("relative_accuracy", "Accuracy minus retrained (points)", 100.0, False),
        Panel("accuracy", "Accuracy (%)", 100.0, False),
        Panel("loss", "Loss", 1.0, False),
        Panel("plasticity", "Plasticity", 1.0, False),
        Panel("dead_units", "Dead units (%)", 100.0, True),
        Panel("dormant_units", "Dormant units (%)", 100.0, True),
        Panel("stable_rank", "Stable rank (%)", 100.0, False),
        Panel("effective_rank", "Effective rank (%)", 100.0, False),
        Panel("weight_magnitude", "Weight magnitude", 1.0, False),
        Panel("weight_rank", "Weight rank (%)", 100.0, False),
        Panel("weight_effective_rank", "Effective rank of weights (%)", 100.0, False),
        Panel("weight_sparsity", "Weights near 0 (%)", 100.0, True),
        Panel("weight_l1", "L1 norm of weights", 1.0, False),
        Panel("weight_l2", "L2 norm of weights", 1.0, False),
        Panel("gradient_l0", "Gradients not 0 (%)", 100.0, False),
        Panel("gradient_l1", "L1 norm of gradients", 1.0, False),
        Panel("gradient_l2", "L2 norm of gradients", 1.0, False),
    )
}


def panels_of(measures: str, **labels: str) -> tuple[Panel, ...]:
    """Return the panels of some measures, optionally with their own labels."""
    if unknown := [name for name in measures.split() if name not in PANELS]:
        raise ValueError(f"measures must be some of {list(PANELS)}; got {', '.join(map(repr, unknown))}")
    return tuple(PANELS[name]._replace(label=labels.get(name, PANELS[name].label)) for name in measures.split())


def performance_label(results: xr.Dataset) -> str:
    """Return the label of an axis of the final performance."""
    if is_accuracy(performance(results)):
        return "Accuracy, last tenth of tasks (%)"
    return PANELS[performance(results)].label + ", last tenth" + " of tasks" * (not over_steps(results))
