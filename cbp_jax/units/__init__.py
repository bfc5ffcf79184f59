"""Units: hidden features of a network, the weights that write them and the weights that read them.

The documentation of `cbp_jax.units.discovery` describes what counts as a unit in each construct, which groups are found
in known networks, and what is left out, with reasons. `Units.select` chooses groups; `Units.to_dot` and
`report.plot_units` draw them.
"""

from cbp_jax.units.collection import LeftOut, NoUnits, Units, check_units
from cbp_jax.units.discovery import discover_units
from cbp_jax.units.features import Features, with_features
from cbp_jax.units.groups import Consumer, ParamSlice, UnitGroup, join_path, leaves_by_path
from cbp_jax.units.statistics import reset_batch_stats
from cbp_jax.units.values import LeftOutKind

__all__ = [
    "Consumer",
    "Features",
    "LeftOut",
    "LeftOutKind",
    "NoUnits",
    "ParamSlice",
    "UnitGroup",
    "Units",
    "check_units",
    "discover_units",
    "join_path",
    "leaves_by_path",
    "reset_batch_stats",
    "with_features",
]
