"""Experiments by name: each is one file with a dataclass of settings, presets and a function."""

from types import ModuleType

from cbp_jax.experiments import (
    class_incremental,
    continual_imagenet,
    input_permuted,
    label_permuted,
    online_permuted,
    slippery_ant,
    slowly_changing_regression,
    stationary_ant,
    stream,
    utility_quality,
)
from cbp_jax.experiments.stream import Progress

EXPERIMENTS: dict[str, ModuleType] = {
    module.NAME: module
    for module in (
        online_permuted,
        input_permuted,
        label_permuted,
        slowly_changing_regression,
        utility_quality,
        continual_imagenet,
        class_incremental,
        slippery_ant,
        stationary_ant,
    )
}

__all__ = ["EXPERIMENTS", "Progress", "stream"]
