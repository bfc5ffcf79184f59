"""Common parts of experiments on images of many classes: the source of images, and numbers of examples."""

import dataclasses
from pathlib import Path

from cbp_jax import data
from cbp_jax.experiments import learners, memory, stream
from cbp_jax.experiments.checks import check_counts
from cbp_jax.experiments.images import check_classes

PROCEDURAL = "procedural"


@dataclasses.dataclass(frozen=True)
class PoolSettings(stream.StreamSettings):
    """Settings of a stream whose tasks use some of a dataset's classes, for several epochs."""

    network: str = "convnet"
    """One of mlp, convnet, lenet, resnet18 and vit, optionally with settings: "vit:depth=2,width=32"; or a Flax module:
    "my_module:MyNet(width=64)"."""
    dataset: str = PROCEDURAL
    """"procedural" for generated images, a name of tensorflow-datasets, or the path of an array file (.npz)."""
    data_dir: Path | None = None
    """Folder of prepared datasets; by default that of tensorflow-datasets."""
    procedural_size: int = 32
    """Height and width of procedural images, before downsampling."""
    downsample: int = 1
    """Factor for downsampling images; it must divide their height and width."""
    train_per_class: int = 450
    """Training examples of each class."""
    test_per_class: int = 100
    """Test examples of each class."""
    epochs: int = 200
    """Number of epochs in a task."""
    dormant_threshold: float = 0.01
    """Largest activation of a dormant unit, relative to the mean of its layer."""


def check(settings: PoolSettings) -> list[learners.Method]:
    """Check settings, like `stream.check`, except those that depend on the images."""
    check_counts(settings, "procedural_size", "downsample", "train_per_class", "test_per_class", "epochs")
    if not settings.dormant_threshold >= 0:
        raise ValueError(f"dormant_threshold must not be negative, got {settings.dormant_threshold}")
    return stream.check(settings)


def load(settings: PoolSettings, split: str = "train", *, classes: int, per_class: int) -> data.Dataset:
    """Load or generate the images of the tasks.

    Args:
      settings: which images.
      split: split of a loaded dataset.
      classes: number of classes of procedural images.
      per_class: number of procedural images of each class.

    Raises:
      ValueError: the dataset holds features, or cannot be downsampled by that factor.
      cbp_jax.data.DatasetUnavailable: it is not on this machine.
    """
    if settings.dataset == PROCEDURAL:
        memory.check_images(classes * per_class, settings.procedural_size)
        images = data.procedural(classes, per_class, size=settings.procedural_size)
    else:
        images = data.load(settings.dataset, split, data_dir=settings.data_dir)
    if images.has_features:
        raise ValueError(f"dataset must hold images, and {settings.dataset!r} holds features")
    return data.downsample(check_classes(images), settings.downsample)
