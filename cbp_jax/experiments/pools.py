"""What the experiments on images of many classes share: where the images come from, and how many of each class."""

import dataclasses
from pathlib import Path

from cbp_jax import data
from cbp_jax.experiments import learners, memory, stream

PROCEDURAL = "procedural"


@dataclasses.dataclass(frozen=True)
class PoolSettings(stream.StreamSettings):
    """Settings of a stream whose tasks are made of some of a dataset's classes, each shown for epochs."""

    network: str = "convnet"
    """One of mlp, convnet, lenet, resnet18 and vit, with settings if wanted: "vit:depth=2,width=32"; or a Flax module:
    "my_module:MyNet(width=64)"."""
    dataset: str = PROCEDURAL
    """"procedural" for images made here, a name of tensorflow-datasets, or the path of an array file (.npz)."""
    data_dir: Path | None = None
    """Where prepared datasets are; tensorflow-datasets' own default if not given."""
    procedural_size: int = 32
    """Height and width of procedural images, before they are made smaller."""
    downsample: int = 1
    """Factor by which images are made smaller; it divides their height and width."""
    train_per_class: int = 450
    """Training examples of each class."""
    test_per_class: int = 100
    """Test examples of each class."""
    epochs: int = 200
    """How often a task shows each of its training examples."""
    dormant_threshold: float = 0.01
    """Largest activation, over the mean of its layer, of a unit that counts as dormant."""


def check(settings: PoolSettings) -> list[learners.Method]:
    """Checks settings, as `stream.check` does, all but those that depend on the images."""
    stream.check_counts(settings, "procedural_size", "downsample", "train_per_class", "test_per_class", "epochs")
    if not settings.dormant_threshold >= 0:
        raise ValueError(f"dormant_threshold must not be negative, got {settings.dormant_threshold}")
    return stream.check(settings)


def load(settings: PoolSettings, split: str = "train", *, classes: int, per_class: int) -> data.Dataset:
    """The images that tasks are made of.

    Args:
      settings: which images.
      split: of a dataset that is loaded.
      classes: how many classes procedural images have.
      per_class: how many procedural images a class has.

    Raises:
      ValueError: the dataset holds features, or cannot be made smaller by that factor.
      cbp_jax.data.DatasetUnavailable: it is not on this machine.
    """
    if settings.dataset == PROCEDURAL:
        memory.check_images(classes * per_class, settings.procedural_size)
        images = data.procedural(classes, per_class, size=settings.procedural_size)
    else:
        images = data.load(settings.dataset, split, data_dir=settings.data_dir)
    if images.has_features:
        raise ValueError(f"dataset must hold images, and {settings.dataset!r} holds features")
    return data.downsample(stream.check_classes(images), settings.downsample)
